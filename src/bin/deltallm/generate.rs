//! `deltallm generate`: continue a text.

use std::fs;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use deltallm::model::MemoryUse;
use deltallm::{
    Cancel, DEFAULT_CONTEXT, Error, FinishReason, GenerateOptions, Model, Session, SessionOptions,
    Timings,
};
use serde_json::json;

use crate::args::{ModelArgs, SamplingArgs};
use crate::attention_args::{Attention, AttentionArgs, OPTIONS};
use crate::cache_report;
use crate::output::{Failure, Outcome, bytes, say, stop_on_interrupt, tokens};

/// Options of `generate`.
#[derive(clap::Args)]
pub struct Args {
    /// The text to continue; `-` reads it from standard input, as does nothing without --load
    prompt: Option<String>,

    /// Read the text to continue from a file
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,

    #[command(flatten)]
    model: ModelArgs,

    /// Write the session to a file at the end: the text with its keys and values
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,

    /// Go on with a session that --save has written, on whatever device; a prompt is appended to its
    /// text. How keys and values are kept, and the context, are the file's. A file of another model with
    /// equal shapes cannot be told apart
    #[arg(long, value_name = "FILE", conflicts_with_all = OPTIONS.into_iter().chain(["context", "echo"]))]
    load: Option<PathBuf>,

    /// Tokens that the text may have in all, up to the model's limit [default: 4096, or what prompt
    /// and --max-tokens need, up to the model's limit]
    #[arg(long, value_name = "N")]
    context: Option<usize>,

    /// Tokens to make at most
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,

    #[command(flatten)]
    sampling: SamplingArgs,

    /// Stop before this text comes up; may be given more than once
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Go on after the model's end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,

    /// Print the prompt before its continuation
    #[arg(long, conflicts_with = "json")]
    echo: bool,

    /// Print device, times and memory to standard error
    #[arg(short, long)]
    verbose: bool,

    /// Print one JSON object at the end instead of the text. Its bytes of keys and values are
    /// `in_use` by the tokens there are, `held` with room to grow, and what the same tokens take as
    /// `dense_f16`
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    attention: AttentionArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Outcome {
    args.sampling.check()?;
    let Attention { policy, thresholds } = args.attention.policy()?;
    args.check_save()?;
    let prompt = args.prompt()?;
    let cancel = Cancel::default();
    stop_on_interrupt(cancel.clone());
    let opened = args.model.open(&cancel)?;
    let model = &opened.model;

    let (ids, mut session) = match &args.load {
        Some(path) => {
            let ids = model.tokenizer().encode_continuation(&prompt)?;
            (ids, Session::load(model, path)?)
        }
        None => {
            let ids = model.tokenizer().encode(&prompt)?;
            let context = args.context.unwrap_or_else(|| {
                let needed = ids.len().saturating_add(args.max_tokens);
                needed.max(DEFAULT_CONTEXT).min(model.config().context)
            });
            let options = SessionOptions { context: Some(context), attention: policy, thresholds };
            (ids, Session::new(model, &options)?)
        }
    };
    session.cancel_with(cancel);

    let options = GenerateOptions {
        sampling: args.sampling.sampling(&model.config().sampling)?,
        max_tokens: args.max_tokens,
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
    };
    let mut out = io::stdout().lock();
    // Where nobody reads on, it ends as by Ctrl-C: what was made is still to be saved.
    let mut printed = Ok(());
    if args.echo {
        printed = write!(out, "{prompt}").and_then(|()| out.flush());
        if args.save.is_none() {
            std::mem::replace(&mut printed, Ok(()))?;
        }
    }
    let mut generation = session.generate(&ids, &options).inspect_err(|error| {
        if matches!(error, Error::ContextFull { .. }) {
            args.explain_full();
        }
    })?;
    let (mut new_ids, mut text) = (Vec::new(), String::new());
    while printed.is_ok() {
        let Some(piece) = generation.next().transpose()? else { break };
        new_ids.extend(piece.token);
        text.push_str(&piece.text);
        if !args.json {
            printed = out.write_all(piece.text.as_bytes()).and_then(|()| out.flush());
        }
    }
    let finish = generation.finish_reason().cloned().unwrap_or(FinishReason::Cancelled);
    let timings = generation.timings();
    if finish == FinishReason::ContextFull && new_ids.is_empty() {
        args.explain_full();
    }
    let memory = session.memory();
    let statistics = match args.json || args.verbose {
        true => Some(session.statistics()?),
        false => None,
    };
    if args.json {
        let mut object = json!({
            "model": opened.name,
            "prompt_ids": ids,
            "ids": new_ids,
            "text": text,
            "finish_reason": finish.name(),
            "device": describe(model),
            "timings": {
                "load_s": model.load_time().as_secs_f64(),
                "prompt_tokens": timings.prompt_tokens,
                "prefill_s": timings.prefill.as_secs_f64(),
                "prefill_tokens_per_s": timings.prefill_rate(),
                "new_tokens": timings.new_tokens,
                "decode_s": timings.decode.as_secs_f64(),
                "decode_tokens_per_s": timings.decode_rate(),
            },
            "bytes": {
                "weights": memory.weights,
                "activations": memory.activations,
                "scratch": memory.scratch,
            },
            "context": session.context(),
            "policy": session.policy().to_string(),
        });
        if let Some(thresholds) = session.thresholds() {
            object["thresholds"] = thresholds.iter().collect();
        }
        if let Some(statistics) = &statistics {
            let (keys, values) = cache_report::bytes_json(statistics, &memory);
            (object["bytes"]["keys"], object["bytes"]["values"]) = (keys, values);
            object["cache"] = cache_report::to_json(statistics);
        }
        printed = writeln!(out, "{object}");
    } else if printed.is_ok() {
        printed = writeln!(out);
    }
    if let Some(statistics) = statistics.filter(|_| args.verbose) {
        report(model, &timings, &memory, session.context(), &finish);
        cache_report::print(&statistics, &memory);
    }
    if let Some(path) = &args.save {
        session.save(path)?;
    }
    printed?;
    match finish {
        FinishReason::Cancelled => Err(Failure::Interrupted),
        _ => Ok(()),
    }
}

impl Args {
    /// Says why a text that was loaded does not grow.
    fn explain_full(&self) {
        if self.load.is_some() {
            say!("the context is full: a session's context is fixed when it is first saved");
        }
    }

    /// Before the model is opened: a path that cannot be written should not cost a minute.
    fn check_save(&self) -> Result<(), Error> {
        let Some(path) = &self.save else { return Ok(()) };
        let parent = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let found = fs::metadata(parent);
        found.map_err(|source| Error::Io { path: parent.to_owned(), source })?;
        if path.exists() && !path.is_file() {
            let message = "exists and is not a regular file".into();
            return Err(Error::Malformed { path: path.clone(), message });
        }
        Ok(())
    }

    fn prompt(&self) -> Result<String, Error> {
        let (path, bytes) = match (&self.file, self.prompt.as_deref()) {
            (Some(path), _) => (path.clone(), fs::read(path)),
            (None, Some(text)) if text != "-" => return Ok(text.to_owned()),
            (None, _) => {
                if self.load.is_some() && self.prompt.is_none() {
                    return Ok(String::new());
                }
                if io::stdin().is_terminal() {
                    say!("reading the prompt from standard input; end it with Ctrl-D");
                }
                let mut bytes = Vec::new();
                let read = io::stdin().read_to_end(&mut bytes);
                (PathBuf::from("standard input"), read.map(|_| bytes))
            }
        };
        let bytes = bytes.map_err(|source| Error::Io { path: path.clone(), source })?;
        String::from_utf8(bytes).map_err(|error| Error::Malformed {
            path,
            message: format!("is not UTF-8: {}", error.utf8_error()),
        })
    }
}

/// The device that a model runs on, for scripts.
pub fn describe(model: &Model) -> serde_json::Value {
    let device = model.device();
    json!({
        "name": device.name,
        "kind": device.kind.name(),
        "backend": device.backend,
        "driver": device.driver,
        "features": device.features,
    })
}

fn report(
    model: &Model,
    timings: &Timings,
    memory: &MemoryUse,
    context: usize,
    finish: &FinishReason,
) {
    let device = model.device();
    let rate = |rate: Option<f64>| {
        rate.map_or_else(|| "no rate".to_owned(), |rate| format!("{rate:.2} tokens/s"))
    };
    say!("");
    say!("device    {} ({}, {})", device.name, device.kind.name(), device.backend);
    say!("driver    {}", device.driver);
    if !device.features.is_empty() {
        say!("features  {}", device.features.join(", "));
    }
    say!("load      {:.2} s", model.load_time().as_secs_f64());
    say!(
        "prefill   {} in {:.3} s, {}",
        tokens(timings.prompt_tokens),
        timings.prefill.as_secs_f64(),
        rate(timings.prefill_rate())
    );
    say!(
        "decode    {} in {:.3} s, {}",
        tokens(timings.new_tokens.saturating_sub(1)),
        timings.decode.as_secs_f64(),
        rate(timings.decode_rate())
    );
    say!(
        "memory    {}: weights {}, cache {} of a context of {context} tokens, activations {}, scratch {}",
        bytes(memory.total()),
        bytes(memory.weights),
        bytes(memory.keys + memory.values),
        bytes(memory.activations),
        bytes(memory.scratch)
    );
    say!("finished  {}", finish.name());
}
