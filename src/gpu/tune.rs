//! Finds out how the work is best cut for a device, by doing it in every way.
//!
//! Products of one token are measured, which decoding consists of: each reads a matrix that has left
//! the caches since it was read last. And products of many, which reading a prompt consists of, and
//! which multiply more than they read. What gives a result that is not the CPU's is not taken, however
//! fast it is.
//!
//! Ternary weights are packed once, for one token and for many: the packing is that of the fastest product
//! of one token, whose bytes are of no account there, and tiles are looked for with this one.
//!
//! Where a device has a matrix unit, what it can make is measured with it and without: it is
//! not used before it was found to be faster, and right.
//!
//! The ways take turns: a machine that grows hot, or does something else meanwhile, is slower for all
//! of them. What else it does can only make a way slower, so the fastest round of each counts.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::trial::{Trials, Work, expected, same};
use super::{Cut, Gpu, GpuOptions, MatrixUnit, Packing, Tile, Tuning};
use crate::backend::{DeviceInfo, MatrixFormat};
use crate::error::{Error, Result};

/// How often each way is measured.
const ROUNDS: usize = 5;

/// A way that takes so many times as long as the fastest is not measured again: what disturbs a device
/// rarely does so in each round.
const TOO_SLOW: f64 = 2.0;

/// No round begins after so long: a product that takes a second is measured well by fewer.
const LONG: Duration = Duration::from_secs(5);

/// One way to cut the products of one format, measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measurement<W> {
    /// Of the matrix.
    pub format: MatrixFormat,
    /// How it was packed, where it is ternary.
    pub packing: Option<Packing>,
    /// How the work was cut.
    pub way: W,
    /// Multiplications in a second: by each weight once a token.
    pub speed: f64,
    /// Bytes of weights in a second, each counted once a product.
    pub bytes: f64,
    /// Whether the result was that of the CPU: to the bit for ternary matrices, else within rounding.
    /// Not where the driver failed: then `speed` and `bytes` are 0.
    pub right: bool,
}

/// What was found out about a device.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuned {
    /// Which device.
    pub device: DeviceInfo,
    /// The fastest of all; formats that were not measured are as they were.
    pub tuning: Tuning,
    /// Tokens of the products that tiles were measured with.
    pub tokens: usize,
    /// All cuts, by format and packing; the default of the kind of device is the first of each.
    pub cuts: Vec<Measurement<Cut>>,
    /// All tiles, by format, with the packing of `tuning`, and by the matrix unit where there is one;
    /// likewise.
    pub tiles: Vec<Measurement<Tile>>,
}

/// Gets how many of how many measurements are done.
type Progress<'a> = &'a mut dyn FnMut(usize, usize) -> ControlFlow<()>;

/// Measures every cut and every tile of these formats on a device; all of them take about half a minute.
/// Formats that are not among them stay as `options` have them. `progress` gets how many of how many
/// measurements are done; `Break` stops it with [`Error::Cancelled`].
///
/// # Errors
/// No such device, a fault of it, or too little memory; a format of which nothing gives right results.
pub fn tune(
    options: &GpuOptions,
    formats: &[MatrixFormat],
    progress: Progress<'_>,
) -> Result<Tuned> {
    let gpu = Gpu::open_to_tune(options)?;
    let (kind, unit) = (gpu.info().kind, gpu.device.abilities.matrix_unit);
    let formats: Vec<_> = Tuning::FORMATS.into_iter().filter(|of| formats.contains(of)).collect();
    let ways = |&format: &MatrixFormat| {
        packings(format).len() * Cut::all(format).count() + tiles_of(unit, format).count()
    };
    let total = (1 + ROUNDS) * formats.iter().map(ways).sum::<usize>();
    let mut search = Search { options, tuning: gpu.device.tuning, gpu, progress, done: 0, total };
    let (mut cuts, mut tiles) = (Vec::new(), Vec::new());
    for &format in &formats {
        let work = Work::one_token(kind, format);
        let all = || Cut::all(format);
        cuts.extend(search.best(&work, packings(format), all, |to| to.cuts.of_mut(format))?);
    }
    for &format in &formats {
        let work = Work::many_tokens(kind, format);
        let (chosen, all) = ([search.tuning.packing], || tiles_of(unit, format));
        tiles.extend(search.best(&work, &chosen, all, |to| to.tiles.of_mut(format))?);
    }
    let tokens = Work::many_tokens(kind, MatrixFormat::Ternary).tokens;
    let Search { gpu, tuning, .. } = search;
    Ok(Tuned { device: gpu.info().clone(), tuning, tokens, cuts, tiles })
}

/// Every tile, and those that a matrix unit makes once more by it.
fn tiles_of(unit: Option<MatrixUnit>, format: MatrixFormat) -> impl Iterator<Item = Tile> {
    Tile::all(format).chain(unit.into_iter().flat_map(move |unit| Tile::all_by(unit, format)))
}

/// In which packings a product of one token is measured.
fn packings(format: MatrixFormat) -> &'static [Packing] {
    match format {
        MatrixFormat::Ternary => &Packing::ALL,
        // Of no account.
        _ => &[Packing::Four],
    }
}

struct Search<'a> {
    options: &'a GpuOptions,
    gpu: Gpu,
    /// The best so far.
    tuning: Tuning,
    progress: Progress<'a>,
    done: usize,
    total: usize,
}

/// A way, and how many seconds it takes.
struct Tried<W> {
    way: W,
    tuning: Tuning,
    right: bool,
    seconds: f64,
}

impl Search<'_> {
    /// Does the work in every way with every one of these packings, and takes the fastest that gives right
    /// results.
    fn best<W: Copy + PartialEq, I: Iterator<Item = W>>(
        &mut self,
        work: &Work,
        packings: &[Packing],
        all: impl Fn() -> I,
        of: impl Fn(&mut Tuning) -> &mut W,
    ) -> Result<Vec<Measurement<W>>> {
        let ternary = work.format == MatrixFormat::Ternary;
        let default = *of(&mut Tuning::default_of(self.gpu.info().kind));
        let mut tried = Vec::new();
        for &packing in packings {
            for way in std::iter::once(default).chain(all().filter(|way| *way != default)) {
                let mut tuning = self.tuning;
                if ternary {
                    tuning.packing = packing;
                }
                *of(&mut tuning) = way;
                tried.push(Tried { way, tuning, right: true, seconds: f64::INFINITY });
            }
        }
        let trials = self.measure(work, &mut tried)?;
        let right = tried.iter().filter(|tried| tried.right);
        let Some(best) = right.min_by(|a, b| a.seconds.total_cmp(&b.seconds)) else {
            return Err(Error::Device {
                device: self.gpu.info().name.clone(),
                what: format!("products with {} weights", work.format.name()),
                message: "no way of computing them gives right results".to_owned(),
            });
        };
        self.tuning = best.tuning;
        let measurement = |Tried { way, tuning, right, seconds }| Measurement {
            format: work.format,
            packing: ternary.then_some(tuning.packing),
            way,
            speed: work.products() / seconds,
            bytes: trials.bytes(tuning.packing) as f64 / seconds,
            right,
        };
        Ok(tried.into_iter().map(measurement).collect())
    }

    /// Each once, to know which are right and about how long they take, and then in rounds.
    fn measure<W>(&mut self, work: &Work, ways: &mut [Tried<W>]) -> Result<Trials> {
        let expected = expected(work)?;
        let mut packings: Vec<_> = ways.iter().map(|way| way.tuning.packing).collect();
        packings.dedup();
        let mut trials = Trials::on(&self.gpu, work, &packings)?;
        for way in &mut *ways {
            self.step()?;
            match trials.of(way.tuning.packing).first(&self.gpu, way.tuning) {
                Ok((result, seconds)) => {
                    (way.right, way.seconds) = (same(work, &result, &expected), seconds);
                }
                Err(error) => {
                    drop(trials);
                    trials = self.without(way, work, &packings, &error)?;
                }
            }
        }
        let start = Instant::now();
        for round in 0..ROUNDS {
            let fastest = ways.iter().filter(|way| way.right).map(|way| way.seconds);
            let limit = TOO_SLOW * fastest.fold(f64::INFINITY, f64::min);
            let over = start.elapsed() > LONG;
            for way in &mut *ways {
                self.step()?;
                // The first round is for all: a single product says little.
                if !way.right || round > 0 && (over || way.seconds > limit) {
                    continue;
                }
                match trials.of(way.tuning.packing).measure(way.tuning, way.seconds) {
                    Ok(seconds) if round == 0 => way.seconds = seconds,
                    Ok(seconds) => way.seconds = way.seconds.min(seconds),
                    Err(error) => {
                        drop(trials);
                        trials = self.without(way, work, &packings, &error)?;
                    }
                }
            }
        }
        Ok(trials)
    }

    /// A kernel that a driver fails at is not taken, and may have taken the device with it.
    fn without<W>(
        &mut self,
        way: &mut Tried<W>,
        work: &Work,
        packings: &[Packing],
        error: &Error,
    ) -> Result<Trials> {
        log::warn!("{error}: not taken");
        (way.right, way.seconds) = (false, f64::INFINITY);
        let unit = self.gpu.device.abilities.matrix_unit;
        self.gpu = Gpu::open_to_tune(self.options)?;
        if self.gpu.device.abilities.matrix_unit != unit {
            // What is left to measure would be taken for what it is not.
            return Err(Error::Device {
                device: self.gpu.info().name.clone(),
                what: "opening the device again".to_owned(),
                message: "its matrix unit is gone".to_owned(),
            });
        }
        Trials::on(&self.gpu, work, packings)
    }

    fn step(&mut self) -> Result<()> {
        if (self.progress)(self.done, self.total).is_break() {
            return Err(Error::Cancelled);
        }
        self.done += 1;
        Ok(())
    }
}
