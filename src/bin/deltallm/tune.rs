//! `deltallm tune`: how the work is best cut for a GPU, remembered for every other command.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;

use deltallm::backend::MatrixFormat;
use deltallm::gpu::{GpuOptions, Measurement, Select, Tuned, Tuning, tune};
use deltallm::{Cancel, Error};
use serde_json::{Value, json};

use crate::output::{Failure, Outcome, count_bar, say, stop_on_interrupt};
use crate::remembered::{tunings, tunings_path};

/// Options of `tune`.
#[derive(clap::Args)]
pub struct Args {
    /// The GPU: part of its name, as `deltallm devices` shows it [default: the hardware GPU]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,

    /// Measure, but remember nothing
    #[arg(long)]
    dry_run: bool,

    /// Every measurement as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Outcome {
    // Better said before a minute of measuring than after it.
    let path = match tunings_path() {
        _ if args.dry_run => None,
        Some(path) => Some(path),
        None => {
            let message =
                "this system does not say where caches are kept: only --dry-run is possible";
            return Err(Failure::Usage(message.to_owned()));
        }
    };
    let cancel = Cancel::default();
    stop_on_interrupt(cancel.clone());
    let select = match args.device.as_deref() {
        None => Select::Hardware,
        Some(name) => Select::Named(name.to_owned()),
    };
    let bar = count_bar(0, "cuts");
    let tuned = tune(&GpuOptions { select, ..GpuOptions::default() }, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        if cancel.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let tuned = tuned?;
    let mut out = io::stdout().lock();
    if args.json {
        let all: Vec<Value> = tuned.measurements.iter().map(json_of).collect();
        let object = json!({
            "device": tuned.device.name,
            "driver": tuned.device.driver,
            "tuning": tuned.tuning,
            "measurements": all,
        });
        writeln!(out, "{object}")?;
    } else {
        report(&mut out, &tuned)?;
    }
    match path {
        Some(path) => remember(&tuned, &path),
        None => Ok(()),
    }
}

fn json_of(measurement: &Measurement) -> Value {
    json!({
        "format": measurement.format.name(),
        "workgroup": measurement.cut.workgroup,
        "rows": measurement.cut.rows,
        "bytes_per_second": measurement.bytes_per_second,
        "right": measurement.right,
    })
}

/// Of each format the default and the best cut.
fn report(out: &mut impl Write, tuned: &Tuned) -> io::Result<()> {
    writeln!(out, "{} ({})", tuned.device.name, tuned.device.driver)?;
    writeln!(out, "products of one token, GB/s of weights; workgroup x rows\n")?;
    writeln!(out, "{:8} {:>9} {:>8} {:>9} {:>8} {:>6}", "", "default", "", "best", "", "times")?;
    for format in Tuning::FORMATS {
        let of = |m: &&Measurement| m.format == format;
        let Some(default) = tuned.measurements.iter().find(of) else {
            continue;
        };
        let best = tuned.measurements.iter().filter(of);
        let best = best.filter(|m| m.cut == tuned.tuning.of(format) && m.right);
        let best = best.fold(0.0f64, |best, m| best.max(m.bytes_per_second));
        let cut = |cut: deltallm::gpu::Cut| format!("{}x{}", cut.workgroup, cut.rows);
        writeln!(
            out,
            "{:8} {:>9.2} {:>8} {:>9.2} {:>8} {:>6.2}",
            format.name(),
            default.bytes_per_second / 1e9,
            cut(default.cut),
            best / 1e9,
            cut(tuned.tuning.of(format)),
            best / default.bytes_per_second
        )?;
        wrong(out, tuned, format)?;
    }
    Ok(())
}

/// Cuts that this driver computes wrongly.
fn wrong(out: &mut impl Write, tuned: &Tuned, format: MatrixFormat) -> io::Result<()> {
    for m in tuned.measurements.iter().filter(|m| m.format == format && !m.right) {
        let (workgroup, rows) = (m.cut.workgroup, m.cut.rows);
        writeln!(out, "         {workgroup}x{rows} gives wrong results on this driver")?;
    }
    Ok(())
}

fn remember(tuned: &Tuned, path: &Path) -> Outcome {
    let folder = path.parent().unwrap_or(path);
    std::fs::create_dir_all(folder)
        .map_err(|source| Error::Io { path: folder.to_owned(), source })?;
    let mut tunings = tunings();
    tunings.insert(&tuned.device, tuned.tuning);
    tunings.write(path)?;
    say!("remembered in {}", path.display());
    Ok(())
}
