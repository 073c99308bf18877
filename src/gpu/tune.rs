//! Finds out how the work is best cut for a device, by doing it in every way.
//!
//! Products of one token are measured, which decoding consists of: each reads a matrix that has left
//! the caches since it was read last. And products of many, which reading a prompt consists of, and
//! which multiply more than they read. What gives a result that is not the CPU's is not taken, however
//! fast it is.

use std::ops::ControlFlow;

use super::trial::{Work, measure, product, same};
use super::{Cut, Formats, Gpu, GpuOptions, Tile, Tuning, Tunings};
use crate::backend::{DeviceInfo, MatrixFormat};
use crate::cpu::Cpu;
use crate::error::{Error, Result};

/// One way to cut the products of one format, measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measurement<W> {
    /// Of the matrix.
    pub format: MatrixFormat,
    /// How the work was cut.
    pub way: W,
    /// Of cuts: bytes of weights read in a second. Of tiles: multiplications in a second.
    pub speed: f64,
    /// Whether the result was that of the CPU: to the bit for ternary matrices, else within rounding.
    pub right: bool,
}

/// What was found out about a device.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuned {
    /// Which device.
    pub device: DeviceInfo,
    /// The fastest of all.
    pub tuning: Tuning,
    /// Tokens of the products that tiles were measured with.
    pub tokens: usize,
    /// All cuts, by format; the default is the first of each.
    pub cuts: Vec<Measurement<Cut>>,
    /// All tiles, likewise.
    pub tiles: Vec<Measurement<Tile>>,
}

/// Gets how many of how many measurements are done.
type Progress<'a> = &'a mut dyn FnMut(usize, usize) -> ControlFlow<()>;

/// Measures every cut and every tile of every format on a device; takes about a minute. `progress` gets how
/// many of how many are done; `Break` stops it with [`Error::Cancelled`].
///
/// # Errors
/// No such device, a fault of it, or too little memory; a format of which nothing gives right results.
pub fn tune(options: &GpuOptions, progress: Progress<'_>) -> Result<Tuned> {
    let device = Gpu::open(options)?.info().clone();
    let kind = device.kind;
    let ways = |format| 2 + Cut::all(format).count() + Tile::all(format).count();
    let total = Tuning::FORMATS.into_iter().map(ways).sum();
    let mut search = Search { options, device, progress, done: 0, total };
    let one = |format| Work::one_token(kind, format);
    let (cuts, best_cuts) = search.best(one, Cut::all, |tuning| &mut tuning.cuts)?;
    let many = |format| Work::many_tokens(kind, format);
    let (tiles, best_tiles) = search.best(many, Tile::all, |tuning| &mut tuning.tiles)?;
    let tuning = Tuning { cuts: best_cuts, tiles: best_tiles };
    let tokens = many(MatrixFormat::Ternary).tokens;
    Ok(Tuned { device: search.device, tuning, tokens, cuts, tiles })
}

struct Search<'a> {
    options: &'a GpuOptions,
    device: DeviceInfo,
    progress: Progress<'a>,
    done: usize,
    total: usize,
}

impl Search<'_> {
    /// Does the work of every format in every way; the fastest ways that give right results.
    fn best<W: Copy, All: Iterator<Item = W>>(
        &mut self,
        work: impl Fn(MatrixFormat) -> Work,
        all: impl Fn(MatrixFormat) -> All,
        of: impl Fn(&mut Tuning) -> &mut Formats<W>,
    ) -> Result<(Vec<Measurement<W>>, Formats<W>)> {
        let mut default = Tuning::default_of(self.device.kind);
        let (mut measurements, mut fastest) = (Vec::new(), *of(&mut default));
        for format in Tuning::FORMATS {
            let work = work(format);
            let right = product(&Cpu::new(None)?, &work)?;
            let mut best = 0.0;
            let first = *of(&mut default).of(format);
            for way in std::iter::once(first).chain(all(format)) {
                if (self.progress)(self.done, self.total).is_break() {
                    return Err(Error::Cancelled);
                }
                self.done += 1;
                let mut tried = default;
                *of(&mut tried).of_mut(format) = way;
                let (result, speed) = measure(&self.open(tried)?, &work)?;
                let right = same(&work, &result, &right);
                if right && speed > best {
                    best = speed;
                    *fastest.of_mut(format) = way;
                }
                measurements.push(Measurement { format, way, speed, right });
            }
            if best == 0.0 {
                return Err(Error::Device {
                    device: self.device.name.clone(),
                    what: format!("products with {} weights", format.name()),
                    message: "no way of computing them gives right results".to_owned(),
                });
            }
        }
        Ok((measurements, fastest))
    }

    /// The device, with its work cut like this.
    fn open(&self, tuning: Tuning) -> Result<Gpu> {
        let mut tunings = Tunings::default();
        tunings.insert(&self.device, tuning);
        Gpu::open(&GpuOptions { tunings, ..self.options.clone() })
    }
}
