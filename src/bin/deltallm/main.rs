//! The command line: it parses, prints and exits; everything else is the library's.

mod args;
mod attention_args;
mod bench;
mod cache_report;
mod calibrate;
mod chat;
mod devices;
mod doctor;
mod eval;
mod generate;
mod heat_map;
mod inspect;
mod inspect_attention;
mod logits;
mod output;
mod picture;
mod remembered;
mod scatter;
mod table;
mod tune;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Language models on the GPU that you already own.
#[derive(Parser)]
#[command(name = "deltallm", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a text, printed as it comes
    Generate(generate::Args),
    /// Talk with a model, in a terminal or line by line from a script
    ///
    /// In a terminal: type, and read the answer; `/help` shows the commands. From a script: each line
    /// of standard input is a turn, and nothing but the replies goes to standard output.
    Chat(chat::Args),
    /// List the GPUs with driver, limits and abilities, and say which would be chosen
    Devices(devices::Args),
    /// Show a model directory: architecture, tensors, and the memory that a context needs; with
    /// --prompt, what the attention options do to each head
    Inspect(inspect::Args),
    /// Measure how fast a model runs: prompts and generation, at several depths, on several devices
    /// and with several attention modes side by side
    Bench(bench::Args),
    /// Tasks, their metrics, and what attention policies cost of them
    Eval(eval::Args),
    /// Write the f32 logits of every position, to compare with other engines
    Logits(logits::Args),
    /// Find thresholds for each layer and KV head that keep a budget on a text, and write them to a
    /// file that every command takes as --policy-file
    Calibrate(calibrate::Args),
    /// Measure how products of one token and of many are best cut for a GPU, and remember it for every
    /// other command; takes about half a minute
    Tune(tune::Args),
    /// Ask the GPUs for answers that are known, in every variant of every kernel; with --bisect, find
    /// the operation that differs from the CPU
    Doctor(doctor::Args),
}

fn main() -> ExitCode {
    // RUST_LOG overrides; drivers are chatty below an error.
    let filter = env_logger::Env::default().default_filter_or("warn,wgpu=error,naga=error");
    env_logger::Builder::from_env(filter).init();
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Devices(args) => devices::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Tune(args) => tune::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    output::exit(result)
}
