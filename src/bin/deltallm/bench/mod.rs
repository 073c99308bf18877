//! `deltallm bench`: how fast a model runs, devices and attention modes side by side.

mod chart;
mod folder;
mod report;
mod subjects;

use std::io::Write;
use std::path::PathBuf;

use deltallm::backend::ReadSpeed;
use deltallm::bench::{Bench, BenchOptions, Event, Line};
use deltallm::checkpoint::ModelConfig;
use deltallm::checkpoint::synthetic::Synthetic;
use deltallm::gpu::GpuOptions;
use deltallm::{Cancel, Error, ModelOptions};

use crate::args::Weights;
use crate::output::{Failure, Outcome, count_bar, load_bar, say, stop_on_interrupt};
use crate::remembered::gpu_options;
use report::{Report, Subject};
use subjects::{Counts, Device, Mode, Source};

const COLUMNS: &str = "\
Tests are named as the field names them: pp512 runs a prompt of 512 tokens and chooses the token
after it, tg128 makes 128 tokens one after another, and @ d4096 says that 4096 tokens are in the
cache before. Tokens and weights of --synthetic are random; what they are does not change what is
computed, but for how much delta attention keeps.

  tokens/s      the median of the repeats, and from the slowest to the fastest
  bytes a token what a token moves at least, counted from the buffers: each operation reads its
                weights, its input and the part of the cache that it sees once, and writes its
                output. Of a prompt, weights count once for the tokens that run together
  GB/s          these bytes at the median rate
  of reading    their share of the speed at which the device reads a quarter of a GiB, measured on
                the spot: by a kernel that does nothing else, on the CPU by a loop on all threads.
                Above 100 % where caches hold what is read
  launches, submits, read back
                kernels, submissions to the queue, and bytes that the host reads back, each a token
  memory        held on the device at the end of the test
  first token   time to the first token of a prompt, in a new session right after loading, and again

With --profile, time is taken by the device's own clock, a kernel at a time; where it has none and on
the CPU, by the host's clock around each operation. Operations a second count a multiplication
with its addition as two, of matrices and attention; of multiplying is their share of what the device
multiplies in registers, measured on the spot: floats; for ternary weights bytes; on the CPU for
weights of 8 and 4 bits 16-bit integers where those are faster. An operation is at its ceiling where the larger of both shares is 100 %.";

/// Options of `bench`.
#[derive(clap::Args)]
#[command(after_long_help = COLUMNS)]
pub struct Args {
    /// Model directory; without it and --synthetic the model inside this program runs
    #[arg(long, value_name = "DIR", conflicts_with = "synthetic")]
    model: Option<PathBuf>,

    /// Random weights in the exact shape of a model, made in memory: no files are needed. Its context
    /// is as long as the tests ask for
    #[arg(long, value_name = "SHAPE", value_parser = Synthetic::NAMES)]
    synthetic: Option<String>,

    /// Devices: auto, gpu, cpu, cpu:INSTRUCTIONS, or part of an adapter's name, as `deltallm devices`
    /// shows them; may be given more than once [default: gpu where there is one, and cpu]
    #[arg(long, value_name = "DEVICE,..")]
    device: Vec<String>,

    /// Attention modes: dense, delta, paper, a policy as --verbose prints it, or a file that calibrate
    /// has written (.json); may be given more than once
    #[arg(long, value_name = "MODE,..", value_delimiter = ',', default_values = ["dense", "delta"])]
    attention: Vec<String>,

    /// Tokens of prompts, or none [default: 128,512,2048 as far as the context allows]
    #[arg(long, value_name = "N,..")]
    prompt: Option<Counts>,

    /// Tokens to make, or none [default: 32,128]
    #[arg(long, value_name = "N,..")]
    generate: Option<Counts>,

    /// Tokens in the cache before [default: 0,4096,16384 as far as the context allows]
    #[arg(long, value_name = "N,..")]
    depths: Option<Counts>,

    /// Measurements of each test
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeats: usize,

    /// Runs of each test before it is measured
    #[arg(long, value_name = "N", default_value_t = 1)]
    warm_up: usize,

    /// Format of float weights on the device
    #[arg(long, value_enum, default_value_t = Weights::Stored)]
    weights: Weights,

    /// Threads of the CPU backend [default: one a core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Run each test once more and list every kernel: its time, bytes and operations
    #[arg(long)]
    profile: bool,

    /// Where the run's own directory is made, <date>-<device>, with README.md, results.json,
    /// results.csv and chart.svg
    #[arg(long, value_name = "DIR", default_value = "benches/runs")]
    out: PathBuf,

    /// Write no files
    #[arg(long, conflicts_with = "out")]
    no_files: bool,

    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,

    /// Print CSV instead of tables; it has no place for a profile
    #[arg(long, conflicts_with_all = ["json", "profile"])]
    csv: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Outcome {
    let modes = subjects::modes(&args.attention)?;
    let mut options = args.options();
    let device_options = ModelOptions {
        weights: args.weights.into(),
        threads: args.threads,
        gpu: GpuOptions { timestamps: args.profile, ..gpu_options() },
        ..ModelOptions::default()
    };
    // What is wrong with the options should not cost the making of weights.
    if args.synthetic.is_some() {
        options.check(usize::MAX)?;
    }
    if !args.no_files {
        folder::check(&args.out)
            .map_err(|error| Failure::Usage(format!("{error}; --no-files writes nothing")))?;
    }
    let devices = subjects::devices(&args.device, &device_options)?;
    let cancel = Cancel::default();
    stop_on_interrupt(cancel.clone());
    let source = Source::new(args.model.as_deref(), args.synthetic.as_deref(), options.context())?;
    let config = source.open()?.config;
    args.leave_out(&mut options, config.context);
    options.check(config.context)?;
    for mode in &modes {
        mode.attention.check(&config)?;
    }
    if args.model.is_none() && args.synthetic.is_none() {
        say!("neither --model nor --synthetic: running the model inside this program");
    }

    let mut report = Report::new(&source, &config, args.weights, &options, &devices);
    let measured =
        measure(&devices, &modes, &source, &device_options, &options, &cancel, &mut report);
    // What was measured before a fault or Ctrl-C is shown, too.
    let complete = measured.is_ok() && report.failures() == 0;
    report.complete = complete;
    let mut stdout = std::io::stdout().lock();
    match (args.json, args.csv) {
        (true, _) => writeln!(stdout, "{:#}", report.json())?,
        (_, true) => write!(stdout, "{}", report.csv())?,
        _ => write!(stdout, "{}", report.tables())?,
    }
    if complete && !args.no_files {
        say!("written to {}", folder::write(&args.out, &report)?.display());
    }
    measured?;
    match report.failures() {
        0 => Ok(()),
        n => Err(Failure::Usage(format!("{n} of {} runs failed", devices.len() * modes.len()))),
    }
}

/// Measures every device with every mode. A fault of one does not keep the others from being
/// measured.
fn measure(
    devices: &[Device],
    modes: &[Mode],
    source: &Source,
    device_options: &ModelOptions,
    options: &BenchOptions,
    cancel: &Cancel,
    report: &mut Report,
) -> Outcome {
    for device in devices {
        let mut read_speed = None;
        for mode in modes {
            let mut subject = Subject::new(device, mode);
            let with = ModelOptions { device: device.choice.clone(), ..device_options.clone() };
            let done = one(&mut subject, source, &with, options, &mut read_speed, cancel);
            match done {
                Err(Failure::Error(error)) => {
                    say!("{} {}: {error}", device.name, mode.name);
                    subject.error = Some(error.to_string());
                    report.subjects.push(subject);
                }
                done => {
                    report.subjects.push(subject);
                    done?;
                }
            }
        }
    }
    Ok(())
}

/// Measures one device with one mode.
fn one(
    subject: &mut Subject,
    source: &Source,
    device_options: &ModelOptions,
    options: &BenchOptions,
    read_speed: &mut Option<ReadSpeed>,
    cancel: &Cancel,
) -> Outcome {
    let Mode { name, attention } = &subject.mode;
    let (policy, thresholds) = (attention.policy, attention.thresholds.clone());
    let progress = load_bar(cancel);
    let bench = Bench::open(source.open()?, device_options, policy, thresholds, progress)?;
    if let Some(reason) = bench.model().fallback() {
        say!("{reason}: using the CPU ({})", bench.device().driver);
    }
    subject.load = Some(bench.model().load_time());
    if read_speed.is_none() {
        *read_speed = match bench.read_speed() {
            // Beside a large model there may be no room for what is read.
            Err(error @ Error::DeviceMemory { .. }) => {
                say!("{}: the speed of its memory is not measured: {error}", subject.device);
                None
            }
            measured => Some(measured?),
        };
    }
    subject.read_speed = *read_speed;
    let title = format!("{} {name}", subject.device);
    let bar = count_bar(Bench::tokens(options), &format!("tokens of {title}"));
    let (lines, first_token) = (&mut subject.lines, &mut subject.first_token);
    let mut events = |event| match event {
        Event::Tokens(count) => bar.inc(count as u64),
        Event::FirstToken(first) => *first_token = Some(first),
        Event::Line(line) => {
            bar.suspend(|| say!("{title}: {}", outcome(&line)));
            lines.push(line);
        }
    };
    let run = bench.run(options, cancel, &mut events);
    bar.finish_and_clear();
    Ok(run?)
}

/// A line of progress.
fn outcome(line: &Line) -> String {
    let rate = &line.rate;
    let (test, median) = (line.test, report::rate(rate.median));
    format!("{test}: {median} tokens/s ({} to {})", report::rate(rate.min), report::rate(rate.max))
}

impl Args {
    fn options(&self) -> BenchOptions {
        let defaults = BenchOptions::default();
        let list = |given: &Option<Counts>, default: Vec<usize>| match given {
            Some(counts) => counts.0.clone(),
            None => default,
        };
        BenchOptions {
            prompts: list(&self.prompt, defaults.prompts),
            generates: list(&self.generate, defaults.generates),
            depths: list(&self.depths, defaults.depths),
            repeats: self.repeats,
            warm_up: self.warm_up,
            profile: self.profile,
        }
    }

    /// Takes out of the lists that were not given what the context has no room for, and says so.
    fn leave_out(&self, options: &mut BenchOptions, context: usize) {
        let before = (options.prompts.clone(), options.generates.clone(), options.depths.clone());
        let least = match &self.depths {
            Some(depths) => depths.0.iter().copied().max().unwrap_or(0),
            None => 0,
        };
        let fits = |tokens: &usize| least.saturating_add(*tokens) <= context;
        if self.prompt.is_none() {
            options.prompts.retain(fits);
        }
        if self.generate.is_none() {
            options.generates.retain(fits);
        }
        if options.prompts.is_empty() && options.generates.is_empty() {
            // Then the error about the first of them says more.
            (options.prompts, options.generates, options.depths) = before;
            return;
        }
        if self.depths.is_none() {
            let longest = options.prompts.iter().chain(&options.generates).copied().max();
            options.depths.retain(|depth| *depth == 0 || depth + longest.unwrap_or(0) <= context);
        }
        let mut left_out = Vec::new();
        for (what, all, kept) in [
            ("prompts", &before.0, &options.prompts),
            ("generation", &before.1, &options.generates),
            ("depths", &before.2, &options.depths),
        ] {
            let missing = all.iter().filter(|n| !kept.contains(n)).map(usize::to_string);
            let missing: Vec<String> = missing.collect();
            if !missing.is_empty() {
                left_out.push(format!("{what} of {}", missing.join(" and ")));
            }
        }
        if !left_out.is_empty() {
            let left_out = left_out.join(", ");
            say!("the model's context of {context} tokens has no room for {left_out}: left out");
        }
    }
}

/// What runs, in a word and a size.
fn about(config: &ModelConfig) -> String {
    let size = crate::output::parameters(config.parameters());
    format!("{}, {size} parameters", config.architecture.name())
}
