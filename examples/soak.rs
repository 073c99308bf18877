//! Runs the model inside for as long as is wanted and prints what the process holds: memory that
//! grows, or a handle that is leaked, shows in hours what users find in days.
//!
//! ```sh
//! cargo run --release --example soak -- cpu 200
//! cargo run --release --example soak -- llvmpipe 50
//! ```
//!
//! The first argument is a device as `--device` spells it, the second the number of rounds: in each,
//! two threads open and drop sessions one after the other. See `tests/soak_common` for what they do.

#[path = "../tests/soak_common/mod.rs"]
mod soak_common;

use std::time::Instant;

use deltallm::{Model, ModelOptions};
use soak_common::{Held, Soak};

/// Threads that have a session each.
const THREADS: usize = 2;
/// Sessions of each thread in a round.
const SESSIONS: usize = 5;
/// Tokens of a session, about.
const TOKENS: usize = 400;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let device = args.next().unwrap_or_else(|| "cpu".to_owned()).parse()?;
    let rounds: usize = args.next().unwrap_or_else(|| "100".to_owned()).parse()?;
    let model = Model::embedded(&ModelOptions { device, ..ModelOptions::default() })?;
    println!("{}, {}", model.device().name, model.device().driver);
    println!(
        "{:>6} {:>8} {:>9} {:>8} {:>6} {:>6} {:>6} {:>9} {:>9} {:>8} {:>8}",
        "round",
        "sessions",
        "tokens",
        "cancels",
        "left",
        "cuts",
        "saved",
        "host MB",
        "device MB",
        "handles",
        "threads"
    );
    let dir = std::env::temp_dir().join(format!("deltallm-soak-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let mut soak = Soak::new(model, &dir, 1);
    let start = Instant::now();
    let mut held = Vec::new();
    for round in 0..rounds {
        soak.round(THREADS, SESSIONS, TOKENS)?;
        let now = Held::now(soak.model());
        held.push(now);
        let last = round + 1 == rounds;
        // The first ones, and then a screenful.
        if round < 3 || last || round % rounds.div_ceil(20) == 0 {
            print(round + 1, &soak, now);
        }
    }
    std::fs::remove_dir_all(&dir)?;
    println!("{:.0} s", start.elapsed().as_secs_f64());
    if let [_, _, .., end] = held[..] {
        let middle = held[held.len() / 2];
        println!("from the middle to the end: {}", changes(middle, end));
    }
    Ok(())
}

fn print(round: usize, soak: &Soak, now: Held) {
    let counts = soak.counts;
    let megabytes = |bytes: Option<u64>| match bytes {
        Some(bytes) => format!("{:.1}", bytes as f64 / 1e6),
        None => "unknown".to_owned(),
    };
    let number = |count: Option<usize>| count.map_or("unknown".to_owned(), |n| n.to_string());
    println!(
        "{round:>6} {:>8} {:>9} {:>8} {:>6} {:>6} {:>6} {:>9} {:>9} {:>8} {:>8}",
        counts.sessions,
        counts.tokens,
        counts.cancels,
        counts.left,
        counts.cuts,
        counts.saved,
        megabytes(now.host),
        megabytes(now.device),
        number(now.handles),
        number(now.threads)
    );
}

/// What has changed between two moments, in words.
fn changes(before: Held, after: Held) -> String {
    let of = |name: &str, before: Option<i64>, after: Option<i64>| match (before, after) {
        (Some(before), Some(after)) => format!("{name} {:+}", after - before),
        _ => format!("{name} unknown"),
    };
    let bytes = |bytes: Option<u64>| bytes.map(|bytes| bytes as i64);
    let count = |count: Option<usize>| count.map(|count| count as i64);
    [
        of("host bytes", bytes(before.host), bytes(after.host)),
        of("device bytes", bytes(before.device), bytes(after.device)),
        of("handles", count(before.handles), count(after.handles)),
        of("threads", count(before.threads), count(after.threads)),
    ]
    .join(", ")
}
