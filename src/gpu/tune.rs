//! Finds out how the work is best cut for a device, by doing it in every way.
//!
//! Products of one token are measured, which decoding consists of: each reads a matrix that has left
//! the caches since it was read last. A cut whose result is not the CPU's is not taken, however fast
//! it is.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use half::f16;

use super::{Cut, Gpu, GpuOptions, Tuning, Tunings};
use crate::backend::{
    AttentionShape, Backend, DeviceInfo, DeviceKind, Footprint, Input, MatrixFormat, Operations,
    Step, StreamShape, TensorFormat,
};
use crate::checkpoint::{FloatType, MatrixSource};
use crate::cpu::Cpu;
use crate::delta::Phase;
use crate::error::{Error, Result};

/// Bytes of the matrix of each format: beyond the caches of integrated GPUs, within WebGPU's
/// smallest limit.
const BYTES: usize = 48 << 20;

/// Copies of it that discrete GPUs take turns with: their caches may hold a hundred megabytes.
const DISCRETE_COPIES: usize = 6;

/// The same for software renderers, which are bound by work and not by memory.
const SOFTWARE_BYTES: usize = 2 << 20;

/// Columns: the width of BitNet-2B.
const COLS: usize = 2560;

/// How long a cut is measured.
const TIME: Duration = Duration::from_millis(60);

/// One cut of one format, measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measurement {
    /// Of the matrix.
    pub format: MatrixFormat,
    /// How it was cut.
    pub cut: Cut,
    /// Bytes of weights read in a second.
    pub bytes_per_second: f64,
    /// Whether the result was that of the CPU: to the bit for ternary matrices, else within rounding.
    pub right: bool,
}

/// What was found out about a device.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuned {
    /// Which device.
    pub device: DeviceInfo,
    /// The fastest cuts.
    pub tuning: Tuning,
    /// All measurements, by format; the default's is the first of each.
    pub measurements: Vec<Measurement>,
}

/// Measures every cut of every format on a device; takes some ten seconds on a GPU. `progress` gets
/// how many of how many are done; `Break` stops it with [`Error::Cancelled`].
///
/// # Errors
/// No such device, a fault of it, or too little memory; a format of which no cut gives right results.
pub fn tune(
    options: &GpuOptions,
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Tuned> {
    let device = Gpu::open(options)?.info().clone();
    let cuts = Cut::all(MatrixFormat::Ternary).count();
    let total = Tuning::FORMATS.len() * (1 + cuts);
    let default = Tuning::default_of(device.kind);
    let (mut measurements, mut tuning) = (Vec::new(), default);
    for format in Tuning::FORMATS {
        let right = product(&Cpu::new(None)?, format, bytes_of(device.kind))?;
        let mut best = 0.0;
        for cut in std::iter::once(default.of(format)).chain(Cut::all(format)) {
            if progress(measurements.len(), total).is_break() {
                return Err(Error::Cancelled);
            }
            let mut tried = default;
            *tried.of_mut(format) = cut;
            let mut tunings = Tunings::default();
            tunings.insert(&device, tried);
            let gpu = Gpu::open(&GpuOptions { tunings, ..options.clone() })?;
            let (result, bytes_per_second) = measure(&gpu, format)?;
            let right = same(format, &result, &right);
            if right && bytes_per_second > best {
                best = bytes_per_second;
                *tuning.of_mut(format) = cut;
            }
            measurements.push(Measurement { format, cut, bytes_per_second, right });
        }
        if best == 0.0 {
            return Err(Error::Device {
                device: device.name,
                what: format!("products with {} weights", format.name()),
                message: "no way of computing them gives right results".to_owned(),
            });
        }
    }
    Ok(Tuned { device, tuning, measurements })
}

/// Sums of the same products in another order: equal where they are integers, else each within
/// `n u sum |x| |w|`, a tenth for `n` products of a quarter on average.
fn same(format: MatrixFormat, result: &[f32], right: &[f32]) -> bool {
    let n = COLS as f32;
    let apart = match format {
        MatrixFormat::Ternary => 0.0,
        _ => n * n * f32::EPSILON / 8.0,
    };
    // Written so that NaN is wrong.
    result.len() == right.len() && result.iter().zip(right).all(|(a, b)| (a - b).abs() <= apart)
}

/// Bytes of a matrix for a kind of device.
fn bytes_of(kind: DeviceKind) -> usize {
    if kind == DeviceKind::SoftwareGpu { SOFTWARE_BYTES } else { BYTES }
}

/// A backend in the middle of a product: `y = W x`, with one token.
struct Trial<B: Backend> {
    stream: B::Stream,
    /// The same matrix several times.
    weights: Vec<B::Linear>,
    x: B::Tensor,
    y: B::Tensor,
}

impl<B: Backend> Trial<B> {
    fn new(backend: &B, format: MatrixFormat, bytes: usize, copies: usize) -> Result<Self> {
        let matrix = matrix(format, bytes);
        let weight = |_| backend.linear(std::slice::from_ref(&matrix));
        let weights = (0..copies).map(weight).collect::<Result<Vec<_>>>()?;
        let attention = AttentionShape { heads: 2, kv_heads: 1, head_dim: 16 };
        let shape = StreamShape { rows: 1, context: 1, attention, vocabulary: 32 };
        let mut stream = backend.stream(&shape)?;
        let level = |i: usize| (i * 37 % 255) as i32 - 127;
        let x = if format == MatrixFormat::Ternary {
            let mut x = backend.tensor(1, COLS, TensorFormat::Int8)?;
            let values: Vec<i8> = (0..COLS).map(|i| level(i) as i8).collect();
            backend.write_int8(&mut x, &values, &[1.0])?;
            x
        } else {
            let mut x = backend.tensor(1, COLS, TensorFormat::F32)?;
            let values: Vec<f32> = (0..COLS).map(|i| level(i) as f32 / 128.0).collect();
            backend.write(&mut x, &values)?;
            x
        };
        let y = backend.tensor(1, matrix.rows(), TensorFormat::F32)?;
        stream.begin(&Step { input: Input::Tokens(&[0]), position: 0, phase: Phase::Decode })?;
        Ok(Self { stream, weights, x, y })
    }

    fn result(&mut self) -> Result<Vec<f32>> {
        self.stream.linear(&self.x, &self.weights[0], &mut self.y)?;
        self.stream.read(&self.y)
    }

    /// How long so many products take.
    fn time(&mut self, count: usize) -> Result<Duration> {
        let start = Instant::now();
        for weight in self.weights.iter().cycle().take(count) {
            self.stream.linear(&self.x, weight, &mut self.y)?;
        }
        self.stream.submit()?;
        self.stream.wait()?;
        Ok(start.elapsed())
    }
}

/// The result of a product.
fn product<B: Backend>(backend: &B, format: MatrixFormat, bytes: usize) -> Result<Vec<f32>> {
    Trial::new(backend, format, bytes, 1)?.result()
}

/// The result of a product, and how many bytes of weights it reads in a second.
fn measure(gpu: &Gpu, format: MatrixFormat) -> Result<(Vec<f32>, f64)> {
    let kind = gpu.info().kind;
    let copies = if kind == DeviceKind::DiscreteGpu { DISCRETE_COPIES } else { 1 };
    let mut trial = Trial::new(gpu, format, bytes_of(kind), copies)?;
    let result = trial.result()?;
    // As many at once as fill the time, so that a submission weighs nothing; the best of three.
    let once = trial.time(1)?.max(Duration::from_micros(1)).as_secs_f64();
    let count = (TIME.as_secs_f64() / 3.0 / once).ceil().clamp(1.0, 1000.0) as usize;
    let mut best = once;
    for _ in 0..3 {
        best = best.min(trial.time(count)?.as_secs_f64() / count as f64);
    }
    Ok((result, trial.weights[0].bytes() as f64 / best))
}

/// A matrix whose products tell rows and columns apart.
fn matrix(format: MatrixFormat, bytes: usize) -> MatrixSource {
    let rows = bytes / format.bytes_of(COLS);
    if format == MatrixFormat::Ternary {
        // No field is 3.
        let trit = |i: usize, field: usize| i * 7 / (1 + 2 * field) % 3;
        let byte = |i| (0..4).map(|field| trit(i, field) << (2 * field)).sum::<usize>() as u8;
        let data: Vec<u8> = (0..rows * COLS).map(byte).collect();
        return MatrixSource::packed("tuning", 4 * rows, COLS, data.into(), 0.01);
    }
    // Halves of one period, and the upper halves of floats.
    let value = |i: usize| (i * 31 % 127) as f32 / 64.0 - 1.0;
    let period: Vec<f32> = (0..127 * COLS).map(value).collect();
    let (stored, row): (_, Vec<u8>) = match format {
        MatrixFormat::F32 => {
            (FloatType::F32, period.iter().flat_map(|x| x.to_le_bytes()).collect())
        }
        MatrixFormat::F16 => {
            let halves = period.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes());
            (FloatType::F16, halves.collect())
        }
        _ => {
            let halves = period.iter().flat_map(|x| [x.to_le_bytes()[2], x.to_le_bytes()[3]]);
            (FloatType::BF16, halves.collect())
        }
    };
    let bytes = rows * COLS * stored.bytes();
    let data: Vec<u8> = row.iter().copied().cycle().take(bytes).collect();
    let source = MatrixSource::float("tuning", rows, COLS, stored, data.into());
    match format {
        MatrixFormat::Q8 => source.into_q8(),
        MatrixFormat::Q4 => source.into_q4(),
        _ => source,
    }
}
