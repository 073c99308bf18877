//! `deltallm tune`: how the work is best cut for a GPU, remembered for every other command.

use std::fmt::Display;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;

use deltallm::backend::MatrixFormat;
use deltallm::gpu::{Cut, GpuOptions, Measurement, Packing, Select, Tuned, Tuning, tune};
use deltallm::{Cancel, Error};
use serde::Serialize;
use serde_json::{Value, json};

use crate::output::{Failure, Outcome, count_bar, say, stop_on_interrupt};
use crate::remembered::{tunings, tunings_path};

/// Options of `tune`.
#[derive(clap::Args)]
pub struct Args {
    /// The GPU: part of its name, as `deltallm devices` shows it [default: the hardware GPU]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,

    /// Measure only products with these weights: ternary, f32, f16, bf16, q8, q4 [default: all]
    #[arg(long, value_name = "FORMATS", value_delimiter = ',', value_parser = format)]
    weights: Vec<MatrixFormat>,

    /// Measure, but remember nothing
    #[arg(long)]
    dry_run: bool,

    /// Every measurement as one JSON object
    #[arg(long)]
    json: bool,
}

fn format(name: &str) -> Result<MatrixFormat, String> {
    let named = Tuning::FORMATS.into_iter().find(|format| format.name() == name);
    named.ok_or_else(|| format!("weights are {}", Tuning::FORMATS.map(|of| of.name()).join(", ")))
}

/// Runs the command.
pub fn run(args: &Args) -> Outcome {
    // Better said before half a minute of measuring than after it.
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
    let formats = if args.weights.is_empty() { &Tuning::FORMATS[..] } else { &args.weights };
    // What was found out of other formats stays.
    let options = GpuOptions { select, tunings: tunings(), ..GpuOptions::default() };
    let bar = count_bar(0, "measurements");
    let tuned = tune(&options, formats, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        if cancel.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let tuned = tuned?;
    let mut out = io::stdout().lock();
    if args.json {
        let object = json!({
            "device": tuned.device.name,
            "driver": tuned.device.driver,
            "tuning": tuned.tuning,
            "cuts": json_of(&tuned.cuts, |m, object| {
                object["weights_per_second"] = m.speed.into();
                object["bytes_per_second"] = m.bytes.into();
            }),
            "tokens": tuned.tokens,
            "tiles": json_of(&tuned.tiles, |m, object| {
                object["multiplications_per_second"] = m.speed.into();
            }),
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

/// Each measurement, with its speed as `add` puts it.
fn json_of<W: Serialize>(
    measurements: &[Measurement<W>],
    add: impl Fn(&Measurement<W>, &mut Value),
) -> Vec<Value> {
    let one = |m: &Measurement<W>| {
        let mut object = json!(m.way);
        object["format"] = m.format.name().into();
        if let Some(packing) = m.packing {
            object["packing"] = json!(packing);
        }
        add(m, &mut object);
        object["right"] = m.right.into();
        object
    };
    measurements.iter().map(one).collect()
}

fn report(out: &mut impl Write, tuned: &Tuned) -> io::Result<()> {
    let Tuned { device, tuning, tokens, cuts, tiles } = tuned;
    writeln!(out, "{} ({})", device.name, device.driver)?;
    writeln!(out, "\nproducts of one token, GB/s of weights; workgroup x rows\n")?;
    table(out, cuts, |m| m.bytes)?;
    packings(out, cuts, tuning.packing)?;
    let by = match tiles.iter().any(|m| m.way.matrix_unit) {
        true => "; m: by its matrix unit",
        false => "",
    };
    writeln!(
        out,
        "\nproducts of {tokens} tokens, billions of multiplications a second; \
         workgroup x rows x tokens of an invocation{by}\n"
    )?;
    table(out, tiles, |m| m.speed)
}

/// Of each format and packing the default and the best way.
fn table<W: Display>(
    out: &mut impl Write,
    measurements: &[Measurement<W>],
    speed: impl Fn(&Measurement<W>) -> f64,
) -> io::Result<()> {
    writeln!(out, "{:13} {:>9} {:>9} {:>9} {:>9} {:>6}", "", "default", "", "best", "", "times")?;
    let alike =
        |a: &Measurement<W>, b: &Measurement<W>| (a.format, a.packing) == (b.format, b.packing);
    for group in measurements.chunk_by(alike) {
        let default = &group[0];
        let right = group.iter().filter(|m| m.right);
        let best = right.max_by(|a, b| speed(a).total_cmp(&speed(b))).unwrap_or(default);
        let name = match default.packing {
            Some(packing) => format!("{}, {packing}", default.format.name()),
            None => default.format.name().to_owned(),
        };
        writeln!(
            out,
            "{name:13} {:>9.2} {:>9} {:>9.2} {:>9} {:>6.2}",
            speed(default) / 1e9,
            default.way.to_string(),
            speed(best) / 1e9,
            best.way.to_string(),
            speed(best) / speed(default)
        )?;
        for m in group.iter().filter(|m| !m.right) {
            let what = if m.speed > 0.0 { "gives wrong results on" } else { "fails on" };
            writeln!(out, "              {} {what} this driver", m.way)?;
        }
    }
    Ok(())
}

/// How many ternary weights to a byte are fastest. Bytes a second do not tell: those of five weights say
/// more.
fn packings(out: &mut impl Write, cuts: &[Measurement<Cut>], chosen: Packing) -> io::Result<()> {
    let best = |packing| {
        let of = cuts.iter().filter(|m| m.right && m.packing == Some(packing));
        of.fold(0.0f64, |best, m| best.max(m.speed))
    };
    let [four, five] = Packing::ALL.map(best);
    if four.max(five) > 0.0 {
        writeln!(
            out,
            "\nternary weights, billions a second: {:.2} where four share a byte, {:.2} where five do: \
             {chosen} it is",
            four / 1e9,
            five / 1e9
        )?;
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
