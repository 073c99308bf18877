//! `deltallm calibrate`: thresholds for each layer and KV head that keep a budget on a text.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use deltallm::delta::{Measured, PolicyFile};
use deltallm::eval::{
    Budget, Calibrated, CalibrationProgress, CalibrationText, Divergence, calibrate,
};
use deltallm::{Cancel, Error};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::args::ModelArgs;
use crate::attention_args::AttentionArgs;
use crate::cache_report::percent;
use crate::output::{Outcome, count_bar, say, stop_on_interrupt};

/// Tokens of a segment, where the text and the context allow it.
const LENGTH: usize = 1024;

/// Options of `calibrate`.
#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("budget").required(true)))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// The text; every second segment of it is held out, to tell what the thresholds do
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    /// At least this sparsity, from 0 to 1: the share of zeros times 1 - alpha
    #[arg(long, value_name = "S", group = "budget")]
    sparsity: Option<f64>,

    /// The largest sparsity with at most this divergence from dense attention, in nats a token
    #[arg(long, value_name = "X", group = "budget")]
    kl: Option<f64>,

    /// The largest sparsity with at most this increase of perplexity, such as 0.5%
    #[arg(long, value_name = "P%", group = "budget", value_parser = percentage)]
    perplexity: Option<f64>,

    /// File to write: the policy with its thresholds, and what was measured
    #[arg(long, value_name = "FILE")]
    out: PathBuf,

    /// Tokens of a segment [default: 1024, or the model's context, or half of the text where that is
    /// less]
    #[arg(long, value_name = "N")]
    length: Option<usize>,

    /// Segments to use at most, spread over the text
    #[arg(long, value_name = "N", default_value_t = 8,
        value_parser = clap::value_parser!(u32).range(1..))]
    segments: u32,

    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,

    /// Where the thresholds go in: delta attention unless they say otherwise. Of --theta the unit
    /// counts
    #[command(flatten)]
    attention: AttentionArgs,
}

/// `0.5%` as the share 0.005; the sign may be left out.
fn percentage(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim().parse::<f64>();
    number.map(|x| x / 100.0).map_err(|_| "must be a number of per cent, such as 0.5%".to_owned())
}

/// Runs the command.
pub fn run(args: &Args) -> Outcome {
    let attention = args.attention.delta_policy()?;
    if attention.thresholds.is_some() {
        return Err(Error::Parameter {
            name: "policy-file",
            value: "thresholds".into(),
            allowed: "has thresholds already: give the policy alone, with --policy".into(),
        }
        .into());
    }
    let budget = match (args.sparsity, args.kl, args.perplexity) {
        (Some(share), _, _) => Budget::Sparsity(share),
        (_, Some(nats), _) => Budget::Kl(nats),
        (_, _, share) => Budget::Perplexity(share.unwrap_or_default()),
    };
    check_out(&args.out)?;
    let text = fs::read_to_string(&args.text).map_err(io_error(&args.text))?;
    let cancel = Cancel::default();
    stop_on_interrupt(cancel.clone());
    let opened = args.model.open(&cancel)?;
    let model = &opened.model;

    let tokenizer = model.tokenizer();
    let (beginning, ids) = (tokenizer.encode("")?, tokenizer.encode_continuation(&text)?);
    let limit = model.config().context;
    // Half of a short text is held out.
    let halves = (beginning.len() + ids.len() / 2).max(attention.policy.page + 1);
    if ids.len() < attention.policy.page {
        let message = format!("has {} tokens, fewer than a page of keys", ids.len());
        return Err(Error::Malformed { path: args.text.clone(), message }.into());
    }
    let length = args.length.unwrap_or(LENGTH.min(limit).min(halves));
    let text = CalibrationText::new(&beginning, &ids, length, args.segments as usize)?;
    if text.held_out.is_empty() {
        say!("the text has one segment: the figures are of the text that thresholds are fitted to");
    }
    let mut bar = Bar::default();
    let found = calibrate(model, &text, &attention.policy, budget, &cancel, |at| bar.show(at));
    bar.finish();
    let found = found?;

    let file = found.to_file(model, &text, budget);
    file.write(&args.out)?;
    if args.json {
        writeln!(io::stdout(), "{}", to_json(&file, &opened.name, &found, &text, budget))?;
    } else {
        print(&found, &text, budget)?;
        say!("wrote {}", args.out.display());
    }
    Ok(())
}

/// One bar after another.
#[derive(Default)]
struct Bar(Option<(CalibrationProgress, ProgressBar)>);

impl Bar {
    fn show(&mut self, at: CalibrationProgress) {
        let same = |(last, _): &(CalibrationProgress, ProgressBar)| {
            (last.things, last.total) == (at.things, at.total)
        };
        if !self.0.as_ref().is_some_and(same) {
            self.finish();
        }
        let (last, bar) = self.0.get_or_insert_with(|| (at, count_bar(at.total, at.things)));
        *last = at;
        bar.set_position(at.done as u64);
    }

    fn finish(&mut self) {
        if let Some((_, bar)) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}

/// Before the model is opened: a path that cannot be written should not cost minutes.
fn check_out(path: &Path) -> Result<(), Error> {
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    fs::metadata(parent).map_err(io_error(parent))?;
    if path.exists() && !path.is_file() {
        let message = "exists and is not a regular file".into();
        return Err(Error::Malformed { path: path.to_owned(), message });
    }
    Ok(())
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

fn segments(count: usize, length: usize) -> String {
    let s = if count == 1 { "" } else { "s" };
    format!("{count} segment{s} of {length} tokens")
}

fn print(found: &Calibrated, text: &CalibrationText, budget: Budget) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let length = text.fitting.first().map_or(0, Vec::len);
    writeln!(out, "policy   {}", found.policy)?;
    writeln!(out, "budget   {budget}, on {}", segments(text.fitting.len(), length))?;
    if !text.held_out.is_empty() {
        writeln!(out, "held out {}", segments(text.held_out.len(), length))?;
    }
    let rows = found.measured(text);
    let dense = rows.last().map_or(0.0, |row| row.dense_perplexity);
    writeln!(
        out,
        "\n{:<22}{:<10}{:>9}{:>20}{:>12}{:>12}{:>10}",
        "thresholds", "text", "sparsity", "bits a key element", "KL", "perplexity", "change"
    )?;
    writeln!(
        out,
        "{:<22}{:<10}{:>9}{:>20}{:>12}{dense:>12.4}{:>10}",
        "none: dense f32",
        rows.last().map_or("", |row| &row.text),
        "-",
        "32.00",
        "0",
        "-"
    )?;
    for row in &rows {
        let change = 100.0 * (row.perplexity / row.dense_perplexity - 1.0);
        writeln!(
            out,
            "{:<22}{:<10}{:>9}{:>20.2}{:>12.3e}{:>12.4}{change:>+9.3}%",
            row.policy,
            row.text,
            percent(row.sparsity),
            row.bits_per_key_element,
            row.kl,
            row.perplexity
        )?;
    }
    let [global, calibrated] = &found.compared;
    let spent = |found: &Divergence| match budget {
        Budget::Kl(most) => found.mean_kl().map(|kl| kl > most),
        Budget::Perplexity(most) => found.perplexity_increase().map(|share| share > most),
        Budget::Sparsity(_) => Some(calibrated.mean_kl() > global.mean_kl()),
    };
    if !text.held_out.is_empty() && spent(calibrated) == Some(true) {
        let what = match budget {
            Budget::Sparsity(_) => "one threshold for all does better",
            _ => "the budget is not kept",
        };
        say!("warning: on the held-out text {what}: give more text, or more --segments");
    }
    let change = 100.0 * (calibrated.kl / global.kl - 1.0);
    // At unequal sparsity the two cannot be compared.
    let shares = [global, calibrated].map(|found| found.statistics.total().zero_share());
    let apart = shares[0].zip(shares[1]).map(|(a, b)| (a - b).abs());
    if change.is_finite() && apart.is_some_and(|apart| apart < 0.005) {
        let what = if change < 0.0 { "less" } else { "more" };
        writeln!(
            out,
            "\nthresholds of each head take {:.1}% {what} KL than one for all, on this text",
            change.abs()
        )?;
    }
    Ok(())
}

fn to_json(
    file: &PolicyFile,
    model: &str,
    found: &Calibrated,
    text: &CalibrationText,
    budget: Budget,
) -> Value {
    let measured = |row: &Measured| {
        json!({
            "policy": row.policy,
            "text": row.text,
            "tokens": row.tokens,
            "sparsity": row.sparsity,
            "bits_per_key_element": row.bits_per_key_element,
            "kl": row.kl,
            "perplexity": row.perplexity,
            "dense_perplexity": row.dense_perplexity,
        })
    };
    json!({
        "model": model,
        "budget": budget.to_string(),
        "policy": file.policy.to_string(),
        "thresholds": found.thresholds.iter().collect::<Vec<_>>(),
        "length": text.fitting.first().map_or(0, Vec::len),
        "fitting_segments": text.fitting.len(),
        "held_out_segments": text.held_out.len(),
        "measured": found.measured(text).iter().map(measured).collect::<Vec<_>>(),
    })
}
