//! `deltallm inspect DIR --prompt FILE`: what a policy does to the attention of a text, as a table,
//! a CSV file and pictures.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use deltallm::backend::AttentionShape;
use deltallm::delta::{
    AttentionPolicy, CompressedHead, HeadAnalysis, LayerTrace, PageStatistics, Window,
};
use deltallm::{Cancel, Error, check_context};

use crate::args::{DeviceArgs, open_checkpoint};
use crate::attention_args::Attention;
use crate::cache_report::percent;
use crate::heat_map::{Axis, AxisKind, HeatMap, Outline, Scale};
use crate::output::{Outcome, count_bar, say, stop_on_interrupt, token_bar};

/// Columns of the picture of kept deltas, at most.
const DELTA_COLUMNS: usize = 360;
/// Rows and columns of the attention map, at most.
const MAP_CELLS: usize = 256;
/// Weights below this look alike.
const LEAST_WEIGHT: f64 = 1e-6;
/// The scale of errors reaches this at least: less is rounding.
const LEAST_ERROR: f64 = 1e-6;
/// From here on it is said that the analysis takes time.
const LONG_PROMPT: usize = 4096;
/// Every file that this command writes.
const FILES: [&str; 5] = ["attention.csv", "zeros.svg", "deltas.svg", "attention.svg", "error.svg"];

/// Options of `inspect` that need `--prompt`.
#[derive(clap::Args)]
pub struct PromptArgs {
    /// Run the text of this file, and show what the attention options do to each head: a table, and
    /// in --out a CSV file and pictures
    #[arg(long, value_name = "FILE")]
    pub prompt: Option<PathBuf>,

    /// Directory for the CSV file and the pictures; made if it is not there
    #[arg(long, value_name = "DIR", default_value = "inspect", requires = "prompt")]
    out: PathBuf,

    /// Layer whose kept deltas and attention are drawn
    #[arg(long, value_name = "N", default_value_t = 0, requires = "prompt")]
    layer: usize,

    /// Query head whose attention is drawn, and whose KV head's kept deltas are
    #[arg(long, value_name = "N", default_value_t = 0, requires = "prompt")]
    head: usize,
}

/// What was found, and in which setting.
struct Inspected<'a> {
    attention: &'a Attention,
    policy: &'a AttentionPolicy,
    shape: AttentionShape,
    tokens: usize,
    /// `[layers][G]`.
    layers: Vec<Vec<HeadAnalysis>>,
}

/// Runs the prompt and writes everything.
pub fn run(
    dir: Option<&Path>,
    device: &DeviceArgs,
    attention: &Attention,
    prompt: &Path,
    args: &PromptArgs,
    context: Option<usize>,
) -> Outcome {
    let policy = &attention.policy;
    let text = fs::read_to_string(prompt).map_err(io_error(prompt))?;
    let cancel = Cancel::default();
    stop_on_interrupt(cancel.clone());
    let model = device.open(open_checkpoint(dir)?, &cancel)?;
    let config = model.config();
    attention.check(config)?;
    in_range("layer", args.layer, config.layers)?;
    in_range("head", args.head, config.attention.heads)?;
    let ids = model.tokenizer().encode(&text)?;
    if let Some(limit) = context {
        check_context(limit, config)?;
        if ids.len() > limit {
            let (needed, model_limit) = (ids.len(), config.context);
            return Err(Error::ContextFull { needed, limit, model_limit }.into());
        }
    }
    if ids.len() >= LONG_PROMPT {
        say!("{} tokens: the time of the analysis grows with their square", ids.len());
    }
    let bar = token_bar(ids.len());
    let traces = model.probe(&ids, &cancel, |tokens| bar.set_position(tokens as u64))?;
    bar.finish_and_clear();
    let bar = count_bar(traces.len(), "layers");
    let mut layers = Vec::with_capacity(traces.len());
    for (layer, trace) in traces.iter().enumerate() {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled.into());
        }
        layers.push(trace.analyse_heads(|kv_head| attention.of_head(layer, kv_head))?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let (shape, tokens) = (config.attention, ids.len());
    let found = Inspected { attention, policy, shape, tokens, layers };

    let mut files = vec![("attention.csv", to_csv(&found))];
    for (name, picture) in pictures(&found, &traces[args.layer], args)? {
        files.push((name, picture.draw().to_string()));
    }
    if cancel.is_cancelled() {
        return Err(Error::Cancelled.into());
    }
    let written = replace_files(&args.out, &files)?;
    print_table(&found)?;
    let names: Vec<String> = written.iter().map(|path| path.display().to_string()).collect();
    say!("wrote {}", names.join(", "));
    if policy.is_dense() {
        say!("keys are plain: --attention delta, or --keys with a format, would compress them");
    } else if ids.len() < policy.page {
        say!("no page of {} tokens is full: nothing was compressed", policy.page);
    }
    Ok(())
}

fn in_range(name: &'static str, value: usize, count: usize) -> Result<(), Error> {
    if value < count {
        return Ok(());
    }
    let allowed = format!("must be from 0 to {}", count - 1);
    Err(Error::Parameter { name, value: value.to_string(), allowed })
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

/// Puts these files into `dir` in place of all that an earlier run has left there. They are written
/// beside it first: where that fails, `dir` is as it was.
fn replace_files(dir: &Path, files: &[(&str, String)]) -> Result<Vec<PathBuf>, Error> {
    fs::create_dir_all(dir).map_err(io_error(dir))?;
    let new = tempfile::Builder::new().prefix(".inspect-").tempdir_in(dir);
    let new = new.map_err(io_error(dir))?;
    for (name, content) in files {
        let path = new.path().join(name);
        fs::write(&path, content).map_err(io_error(&path))?;
    }
    for name in FILES {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error(&path)(error));
            }
            _ => {}
        }
    }
    let mut written = Vec::new();
    for (name, _) in files {
        let path = dir.join(name);
        if let Err(error) = fs::rename(new.path().join(name), &path) {
            // Part of a set would be taken for the whole.
            written.iter().for_each(|path: &PathBuf| drop(fs::remove_file(path)));
            return Err(io_error(&path)(error));
        }
        written.push(path);
    }
    Ok(written)
}

/// A line a layer, and one for all.
fn print_table(found: &Inspected<'_>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "policy  {}", found.policy)?;
    if found.attention.thresholds.is_some() {
        writeln!(out, "theta   of each layer and KV head, from the policy file")?;
    }
    writeln!(out, "tokens  {}", found.tokens)?;
    writeln!(
        out,
        "\n{:>5}{:>9}{:>10}{:>15}{:>12}{:>12}{:>15}",
        "", "", "", "bits a", "output", "error", "largest"
    )?;
    writeln!(
        out,
        "{:>5}{:>9}{:>10}{:>15}{:>12}{:>12}{:>15}",
        "layer", "zeros", "sparsity", "key element", "mean", "worst head", "key error"
    )?;
    for (layer, heads) in found.layers.iter().enumerate() {
        print_row(&mut out, found.policy, &layer.to_string(), heads)?;
    }
    print_row(&mut out, found.policy, "all", &found.layers.concat())
}

fn print_row(
    out: &mut impl Write,
    policy: &AttentionPolicy,
    name: &str,
    heads: &[HeadAnalysis],
) -> io::Result<()> {
    let statistics: PageStatistics = heads.iter().map(|head| head.statistics).sum();
    let share = |share: Option<f64>| share.map_or("-".into(), percent);
    let bits = statistics.bits_per_element().map_or("-".into(), |bits| format!("{bits:.2}"));
    let errors = || heads.iter().flat_map(|head| head.output_errors.iter().copied());
    let mean = errors().sum::<f64>() / errors().count().max(1) as f64;
    writeln!(
        out,
        "{name:>5}{:>9}{:>10}{bits:>15}{mean:>12.2e}{:>12.2e}{:>15.4}",
        share(statistics.zero_share()),
        share(statistics.sparsity(policy)),
        errors().fold(0.0, f64::max),
        heads.iter().map(|head| head.key_error).fold(0.0, f32::max),
    )
}

/// A line a layer and query head; what belongs to a KV head stands in each line of its group.
fn to_csv(found: &Inspected<'_>) -> String {
    let mut text = "layer,head,kv_head,pages,compressed_tokens,key_elements,zero_elements,zeros,\
                    sparsity,bits_per_key_element,theta_min,theta_mean,theta_max,\
                    largest_key_error,output_error,policy\n"
        .to_owned();
    // An empty field where there is no number.
    let field = |x: Option<f64>| x.map_or(String::new(), |x| x.to_string());
    for (layer, heads) in found.layers.iter().enumerate() {
        for (kv_head, head) in heads.iter().enumerate() {
            let s = &head.statistics;
            let group = head.output_errors.len();
            for (index, error) in head.output_errors.iter().enumerate() {
                let fields = [
                    layer.to_string(),
                    (kv_head * group + index).to_string(),
                    kv_head.to_string(),
                    s.pages.to_string(),
                    s.tokens.to_string(),
                    s.elements.to_string(),
                    s.theta.map_or(String::new(), |_| s.zeros.to_string()),
                    field(s.zero_share()),
                    field(s.sparsity(found.policy)),
                    field(s.bits_per_element()),
                    field(s.theta.map(|theta| theta.min.into())),
                    field(s.theta.map(|theta| theta.mean())),
                    field(s.theta.map(|theta| theta.max.into())),
                    head.key_error.to_string(),
                    error.to_string(),
                    found.policy.to_string(),
                ];
                text += &fields.join(",");
                text.push('\n');
            }
        }
    }
    text
}

/// The pictures and the names of their files: those of deltas only where keys are deltas.
fn pictures(
    found: &Inspected<'_>,
    trace: &LayerTrace,
    args: &PromptArgs,
) -> Result<Vec<(&'static str, HeatMap)>, Error> {
    let kv_head = args.head / (found.shape.heads / found.shape.kv_heads);
    let compressed = trace.compress(&found.attention.of_head(args.layer, kv_head), kv_head)?;
    let mut pictures = Vec::new();
    if found.layers.iter().flatten().any(|head| head.statistics.theta.is_some()) {
        pictures.push(("zeros.svg", zeros(found)));
    }
    if let Some(picture) = kept(found, &compressed, args.layer, kv_head) {
        pictures.push(("deltas.svg", picture));
    }
    pictures.push(("attention.svg", attention(found, trace, &compressed, args)?));
    pictures.push(("error.svg", errors(found)));
    Ok(pictures)
}

fn entries(label: &'static str) -> Axis {
    Axis { label, kind: AxisKind::Entries }
}

fn positions(label: &'static str, end: usize) -> Axis {
    Axis { label, kind: AxisKind::Positions(end) }
}

/// Height of a plot with a row a layer.
fn layers_height(found: &Inspected<'_>) -> f64 {
    (26.0 * found.layers.len() as f64).clamp(160.0, 700.0)
}

fn zeros(found: &Inspected<'_>) -> HeatMap {
    let row = |heads: &Vec<HeadAnalysis>| -> Vec<Option<f64>> {
        heads.iter().map(|head| head.statistics.zero_share()).collect()
    };
    let cells: Vec<_> = found.layers.iter().map(row).collect();
    HeatMap {
        title: format!("Zeros among the deltas of {} tokens", found.tokens),
        subtitle: found.policy.to_string(),
        x: entries("KV head"),
        y: entries("layer"),
        scale: Scale::to(1.0, "share of zeros", percent),
        cells,
        outlines: Vec::new(),
        height: layers_height(found),
    }
}

fn errors(found: &Inspected<'_>) -> HeatMap {
    let row = |heads: &Vec<HeadAnalysis>| -> Vec<Option<f64>> {
        heads.iter().flat_map(|head| head.output_errors.iter().map(|e| Some(*e))).collect()
    };
    let cells: Vec<_> = found.layers.iter().map(row).collect();
    let largest = cells.iter().flatten().flatten().fold(LEAST_ERROR, |max, &x| max.max(x));
    HeatMap {
        title: "Error of the attention output, relative to dense attention".to_owned(),
        subtitle: found.policy.to_string(),
        x: entries("query head"),
        y: entries("layer"),
        scale: Scale::to(largest, "|o - dense| / |dense|", |x| format!("{x:.1e}")),
        cells,
        outlines: Vec::new(),
        height: layers_height(found),
    }
}

/// Which deltas are kept: one cell a channel and stretch of tokens; `None` where keys are not
/// deltas, or no page is full.
fn kept(
    found: &Inspected<'_>,
    compressed: &CompressedHead,
    layer: usize,
    kv_head: usize,
) -> Option<HeatMap> {
    let layout = compressed.layout.filter(|layout| layout.delta().is_some())?;
    let tokens = compressed.pages.len() * layout.tokens;
    if tokens == 0 {
        return None;
    }
    let stretch = tokens.div_ceil(DELTA_COLUMNS);
    let row = |channel: usize| -> Vec<Option<f64>> {
        let is_kept = |token: usize| {
            compressed.pages[token / layout.tokens].is_kept(&layout, token % layout.tokens, channel)
        };
        let cell = |start: usize| {
            let end = (start + stretch).min(tokens);
            let kept = (start..end).filter(|&token| is_kept(token)).count();
            Some(kept as f64 / (end - start) as f64)
        };
        (0..tokens).step_by(stretch).map(cell).collect()
    };
    let zeros = compressed.statistics().zero_share().map_or(String::new(), percent);
    Some(HeatMap {
        title: format!("Kept deltas of layer {layer}, KV head {kv_head}: {zeros} zeros"),
        subtitle: found.policy.to_string(),
        x: positions("token", tokens),
        y: entries("channel of the key"),
        cells: (0..found.shape.head_dim).map(row).collect(),
        scale: Scale::to(1.0, "share kept", |x| format!("{:.0}%", 100.0 * x)),
        outlines: Vec::new(),
        height: (5.0 * found.shape.head_dim as f64).clamp(200.0, 640.0),
    })
}

/// Where a query head looks, and which of the keys it sees are exact.
fn attention(
    found: &Inspected<'_>,
    trace: &LayerTrace,
    compressed: &CompressedHead,
    args: &PromptArgs,
) -> Result<HeatMap, Error> {
    let kv_head = args.head / (found.shape.heads / found.shape.kv_heads);
    let policy = found.attention.of_head(args.layer, kv_head);
    let cells = trace.attention_map(&policy, args.head, MAP_CELLS)?;
    let end = found.tokens as f64;
    let rule = compressed.rule();
    let mut outlines = Vec::new();
    if rule.window != Window::Everything {
        let sink = rule.sink.min(found.tokens);
        outlines.push(Outline {
            label: format!("sink: the first {sink} keys, left of this line, are exact"),
            colour: "#d62728",
            points: vec![(sink as f64, sink as f64), (sink as f64, end)],
        });
        // A step wherever the window moves, at most some hundreds of them.
        let mut points = Vec::new();
        for query in (0..found.tokens).step_by(found.tokens.div_ceil(400)) {
            let start = rule.start(query) as f64;
            if points.last().is_some_and(|&(x, _)| x != start) {
                points.extend(points.last().map(|&(x, _)| (x, query as f64)));
                points.push((start, query as f64));
            } else if points.is_empty() {
                points.push((start, 0.0));
            }
        }
        points.extend(points.last().map(|&(x, _)| (x, end)));
        outlines.push(Outline {
            label: "window: keys from this line to the diagonal are exact".to_owned(),
            colour: "#ff7f0e",
            points,
        });
    }
    let largest = cells.iter().flatten().flatten().fold(0.0, |max: f64, &x| max.max(x));
    Ok(HeatMap {
        title: format!("Attention of layer {}, query head {}", args.layer, args.head),
        subtitle: found.policy.to_string(),
        x: positions("key (position in tokens)", found.tokens),
        y: positions("query (position in tokens)", found.tokens),
        cells,
        scale: Scale {
            label: "mean weight",
            low: LEAST_WEIGHT,
            high: largest.max(10.0 * LEAST_WEIGHT),
            logarithmic: true,
            write: |x| format!("{x:.0e}"),
        },
        outlines,
        height: 690.0,
    })
}
