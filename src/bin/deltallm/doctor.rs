//! `deltallm doctor`: whether this machine's GPU drivers compute what they should, to paste in a bug
//! report.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use deltallm::bisect::{BisectOptions, Bisection, Comparison, bisect};
use deltallm::gpu::{
    Adapter, Answer, Diagnosis, GpuOptions, Sabotage, Select, Verdict, adapters, diagnose,
};
use deltallm::{Cancel, Tokenizer};
use serde_json::{Value, json};

use crate::args::{Weights, open_checkpoint};
use crate::attention_args::{Attention, AttentionArgs};
use crate::devices::describe;
use crate::output::{Failure, Outcome, count_bar, load_bar, stop_on_interrupt};
use crate::table::aligned;

/// A text with questions, as the model inside this program knows it.
const PROMPT: &str = "Anna lives in Oslo. She has a grey cat named Milo. Tom put the red ball in the \
                      box.\n\nQuestion: Where does Anna live?\nAnswer:";

/// Options of `doctor`.
#[derive(clap::Args)]
pub struct Args {
    /// One GPU only: part of its name, as `deltallm devices` shows it [default: all, software ones
    /// included]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,

    /// Run a model on the GPU and on the CPU, operation by operation, and name the first layer and
    /// operation that differ beyond rounding
    #[arg(long)]
    bisect: bool,

    /// Model directory [default: the model inside this program]
    #[arg(long, value_name = "DIR", requires = "bisect")]
    model: Option<PathBuf>,

    /// The text to run
    #[arg(long, value_name = "TEXT", requires = "bisect", default_value = PROMPT, hide_default_value = true)]
    prompt: String,

    /// Tokens to decode after it
    #[arg(long, value_name = "N", requires = "bisect", default_value_t = 8)]
    tokens: usize,

    /// Format of float weights on the device
    #[arg(long, value_enum, requires = "bisect", default_value_t = Weights::Stored)]
    weights: Weights,

    /// Threads of the CPU [default: one a core]
    #[arg(long, value_name = "N", requires = "bisect")]
    threads: Option<usize>,

    #[command(flatten)]
    attention: AttentionArgs,

    /// One JSON object
    #[arg(long)]
    json: bool,

    /// Break a kernel, to see that it is noticed: its name, or its name and an ability, such as
    /// `norm+subgroups`
    #[arg(long, value_name = "KERNEL", hide = true)]
    sabotage: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Outcome {
    let cancel = Cancel::default();
    stop_on_interrupt(cancel.clone());
    if args.bisect { run_bisect(args, &cancel) } else { run_diagnosis(args, &cancel) }
}

impl Args {
    fn gpu(&self, name: String) -> GpuOptions {
        let sabotage = Sabotage(self.sabotage.clone());
        GpuOptions { select: Select::Named(name), sabotage, ..crate::remembered::gpu_options() }
    }
}

fn run_diagnosis(args: &Args, cancel: &Cancel) -> Outcome {
    let named = args.device.as_ref().map(|name| name.to_lowercase());
    let found: Vec<Adapter> = adapters()
        .into_iter()
        .filter(|a| named.as_ref().is_none_or(|name| a.name.to_lowercase().contains(name)))
        .collect();
    let mut out = io::stdout().lock();
    let (mut objects, mut wrong) = (Vec::new(), 0);
    if !args.json {
        let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
        writeln!(out, "deltallm {} on {os}, {arch}", env!("CARGO_PKG_VERSION"))?;
    }
    for adapter in &found {
        let bar = count_bar(0, "known answers");
        let diagnosis = diagnose(&args.gpu(adapter.name.clone()), &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            if cancel.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        bar.finish_and_clear();
        if !args.json {
            writeln!(out)?;
            describe(&mut out, adapter)?;
        }
        match diagnosis {
            Ok(diagnosis) => {
                wrong += usize::from(!diagnosis.is_healthy());
                match args.json {
                    true => objects.push(json_of(&diagnosis)),
                    false => report(&mut out, &diagnosis)?,
                }
            }
            Err(deltallm::Error::Cancelled) => return Err(Failure::Interrupted),
            // The next adapter may be of use.
            Err(error) => {
                wrong += 1;
                match args.json {
                    true => {
                        objects.push(json!({"device": adapter.name, "error": error.to_string()}))
                    }
                    false => writeln!(out, "\n{error}")?,
                }
            }
        }
    }
    if args.json {
        let version = env!("CARGO_PKG_VERSION");
        writeln!(out, "{}", json!({"version": version, "devices": objects}))?;
    }
    match (found.is_empty(), wrong) {
        (true, _) => {
            let wanted = match &args.device {
                Some(name) => format!("no GPU named {name:?}"),
                None => "no GPU: no Vulkan, Metal or DX12 driver was found".to_owned(),
            };
            Err(Failure::Usage(format!("{wanted}; the CPU runs everything")))
        }
        (false, 0) => Ok(()),
        (false, wrong) => Err(Failure::Usage(format!(
            "{wrong} of {} GPUs compute something wrongly",
            found.len()
        ))),
    }
}

/// The matrix of questions and variants.
fn report(out: &mut impl Write, diagnosis: &Diagnosis) -> io::Result<()> {
    let mut rows = vec![vec!["known answer".to_owned(), "kernels".to_owned()]];
    rows[0].extend(diagnosis.variants.iter().map(|variant| variant.names()));
    for answer in &diagnosis.answers {
        let mut row = vec![answer.question.clone(), answer.kernels.join(", ")];
        row.extend(answer.verdicts.iter().map(|verdict| verdict.as_ref().map_or("=".into(), cell)));
        rows.push(row);
    }
    writeln!(out, "\n{}", aligned(&rows, 2))?;
    writeln!(
        out,
        "error as a share of its tolerance, time with compilation; = where the code is that of a \
         variant before"
    )?;
    let verdicts = |answer: &Answer| answer.verdicts.iter().flatten().cloned().collect::<Vec<_>>();
    let all: Vec<_> = diagnosis.answers.iter().flat_map(verdicts).collect();
    let wrong = all.iter().filter(|verdict| !verdict.is_right()).count();
    writeln!(out, "{} of {} answers are right", all.len() - wrong, all.len())?;
    for (answer, verdict) in
        diagnosis.answers.iter().flat_map(|a| verdicts(a).into_iter().map(move |v| (a, v)))
    {
        if let Some(wrong) = &verdict.wrong {
            writeln!(out, "WRONG {}: {wrong}", answer.question)?;
        }
    }
    Ok(())
}

fn cell(verdict: &Verdict) -> String {
    let time = verdict.time.as_secs_f64() * 1e3;
    match verdict.is_right() {
        true => format!("{:.2}, {time:.0} ms", verdict.share),
        false => "WRONG".to_owned(),
    }
}

fn json_of(diagnosis: &Diagnosis) -> Value {
    let verdict = |verdict: &Option<Verdict>| match verdict {
        None => Value::Null,
        Some(verdict) => json!({
            "right": verdict.is_right(),
            "error_share": verdict.share.is_finite().then_some(verdict.share),
            "wrong": verdict.wrong,
            "seconds": verdict.time.as_secs_f64(),
        }),
    };
    let answer = |answer: &Answer| {
        json!({
            "question": answer.question,
            "kernels": answer.kernels,
            "verdicts": answer.verdicts.iter().map(verdict).collect::<Vec<_>>(),
        })
    };
    json!({
        "device": diagnosis.device.name,
        "driver": diagnosis.device.driver,
        "backend": diagnosis.device.backend,
        "variants": diagnosis.variants.iter().map(|v| v.names()).collect::<Vec<_>>(),
        "answers": diagnosis.answers.iter().map(answer).collect::<Vec<_>>(),
    })
}

fn run_bisect(args: &Args, cancel: &Cancel) -> Outcome {
    let checkpoint = open_checkpoint(args.model.as_deref())?;
    let prompt = Tokenizer::open(&checkpoint)?.encode(&args.prompt)?;
    let Attention { policy, thresholds } = args.attention.policy()?;
    let select = match &args.device {
        None => Select::Hardware,
        Some(name) => Select::Named(name.clone()),
    };
    let options = BisectOptions {
        gpu: GpuOptions { select, ..args.gpu(String::new()) },
        weights: args.weights.into(),
        threads: args.threads,
        attention: policy,
        thresholds,
        decode: args.tokens,
    };
    let found = bisect(&checkpoint, &prompt, &options, load_bar(cancel))?;
    let mut out = io::stdout().lock();
    match args.json {
        true => writeln!(out, "{}", json_of_bisection(&found))?,
        false => report_bisection(&mut out, &found, prompt.len())?,
    }
    match found.first() {
        None => Ok(()),
        Some(_) => Err(Failure::Usage("the devices differ beyond rounding".to_owned())),
    }
}

fn report_bisection(out: &mut impl Write, found: &Bisection, prompt: usize) -> io::Result<()> {
    let Bisection { device, layers, comparisons } = found;
    writeln!(out, "{} ({}) against the CPU", device.name, device.driver)?;
    let steps = comparisons.iter().filter(|c| c.operation.starts_with("embed")).count();
    writeln!(
        out,
        "{prompt} tokens of prompt, {steps} steps, {layers} layers, {} operations compared\n",
        comparisons.len()
    )?;
    // The worst of each operation, whatever the layer.
    let kind = |c: &Comparison| c.operation.split(" model").next().unwrap_or_default().to_owned();
    let mut worst: Vec<(String, &Comparison, usize)> = Vec::new();
    for comparison in comparisons {
        let kind = kind(comparison);
        match worst.iter_mut().find(|worst| worst.0 == kind) {
            None => worst.push((kind, comparison, 1)),
            Some(worst) => {
                worst.2 += 1;
                if comparison.share > worst.1.share {
                    worst.1 = comparison;
                }
            }
        }
    }
    let head = ["operation", "compared", "worst", "where"].map(str::to_owned).to_vec();
    let rows = worst.into_iter().map(|(kind, worst, count)| {
        vec![kind, count.to_string(), format!("{:.3}", worst.share), place(worst, *layers)]
    });
    let rows: Vec<_> = std::iter::once(head).chain(rows).collect();
    writeln!(out, "{}", aligned(&rows, 1))?;
    writeln!(out, "worst difference as a share of what rounding explains")?;
    match found.first() {
        None => writeln!(out, "the devices agree but for rounding"),
        Some(first) if !first.finite => writeln!(
            out,
            "first NaN or infinity: {}, {}, on the CPU as well: the checkpoint is broken",
            place(first, *layers),
            first.operation
        ),
        Some(first) => {
            let (place, operation) = (place(first, *layers), &first.operation);
            writeln!(out, "first difference beyond rounding: {place}, {operation}")
        }
    }
}

/// Layer and tokens of an operation, in words.
fn place(comparison: &Comparison, layers: usize) -> String {
    let Comparison { position, tokens, layer, .. } = *comparison;
    let end = position + tokens - 1;
    let tokens = if tokens == 1 {
        format!("token {position}")
    } else {
        format!("tokens {position} to {end}")
    };
    if layer == layers {
        format!("after the layers, {tokens}")
    } else {
        format!("layer {layer}, {tokens}")
    }
}

fn json_of_bisection(found: &Bisection) -> Value {
    let comparison = |c: &Comparison| {
        json!({
            "position": c.position,
            "tokens": c.tokens,
            "layer": c.layer,
            "operation": c.operation,
            "share": c.share.is_finite().then_some(c.share),
            "finite": c.finite,
        })
    };
    json!({
        "device": found.device.name,
        "driver": found.device.driver,
        "layers": found.layers,
        "first": found.first().map(comparison),
        "comparisons": found.comparisons.iter().map(comparison).collect::<Vec<_>>(),
    })
}
