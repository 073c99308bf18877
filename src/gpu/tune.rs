//! Finds out how the work is best cut for a device, by doing it in every way.
//!
//! Products of one token are measured, which decoding consists of: each reads a matrix that no cache
//! holds. A cut whose result differs from the first one's is not taken, however fast it is.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use half::f16;

use super::{Cut, Gpu, GpuOptions, Stream, Tuning, Tunings};
use crate::backend::{
    AttentionShape, Backend, DeviceInfo, DeviceKind, Footprint, Input, MatrixFormat, Operations,
    Step, StreamShape, TensorFormat,
};
use crate::checkpoint::{FloatType, MatrixSource};
use crate::delta::Phase;
use crate::error::{Error, Result};

/// Bytes of the matrix of each format: beyond the caches of integrated GPUs, within WebGPU's
/// smallest limit.
const BYTES: usize = 48 << 20;

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
    /// Whether the result was that of the default.
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
/// No such device, a fault of it, or too little memory.
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
        let (mut right, mut best) = (Vec::new(), 0.0);
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
            if right.is_empty() {
                right.clone_from(&result);
            }
            let right = same(&result, &right);
            if right && bytes_per_second > best {
                best = bytes_per_second;
                *tuning.of_mut(format) = cut;
            }
            measurements.push(Measurement { format, cut, bytes_per_second, right });
        }
    }
    Ok(Tuned { device, tuning, measurements })
}

/// Sums of the same products in another order: a few roundings apart, and equal where they are
/// integers.
fn same(result: &[f32], right: &[f32]) -> bool {
    let largest = right.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    result.len() == right.len()
        && result.iter().zip(right).all(|(a, b)| (a - b).abs() <= 1e-4 * largest)
}

/// The result of a product with one token, and how fast its matrix was read.
fn measure(gpu: &Gpu, format: MatrixFormat) -> Result<(Vec<f32>, f64)> {
    let software = gpu.info().kind == DeviceKind::SoftwareGpu;
    let matrix = matrix(format, if software { SOFTWARE_BYTES } else { BYTES });
    let weight = gpu.linear(std::slice::from_ref(&matrix))?;
    let rows = matrix.rows();
    drop(matrix);
    let attention = AttentionShape { heads: 2, kv_heads: 1, head_dim: 16 };
    let shape = StreamShape { rows: 1, context: 1, attention, vocabulary: 32 };
    let mut stream = gpu.stream(&shape)?;
    let ternary = format == MatrixFormat::Ternary;
    let mut x =
        gpu.tensor(1, COLS, if ternary { TensorFormat::Int8 } else { TensorFormat::F32 })?;
    let mut y = gpu.tensor(1, rows, TensorFormat::F32)?;
    let level = |i: usize| (i * 37 % 255) as i32 - 127;
    if ternary {
        gpu.write_int8(&mut x, &(0..COLS).map(|i| level(i) as i8).collect::<Vec<_>>(), &[1.0])?;
    } else {
        gpu.write(&mut x, &(0..COLS).map(|i| level(i) as f32 / 127.0).collect::<Vec<_>>())?;
    }
    stream.begin(&Step { input: Input::Tokens(&[0]), position: 0, phase: Phase::Decode })?;
    stream.linear(&x, &weight, &mut y)?;
    let result = stream.read(&y)?;
    let mut run = |stream: &mut Stream, count: usize| -> Result<Duration> {
        let start = Instant::now();
        for _ in 0..count {
            stream.linear(&x, &weight, &mut y)?;
        }
        stream.submit()?;
        stream.wait()?;
        Ok(start.elapsed())
    };
    // As many at once as fill the time, so that a submission weighs nothing; the best of three.
    let once = run(&mut stream, 1)?.max(Duration::from_micros(1));
    let count = (TIME.as_secs_f64() / 3.0 / once.as_secs_f64()).ceil().clamp(1.0, 1000.0) as usize;
    let mut best = once.as_secs_f64();
    for _ in 0..3 {
        best = best.min(run(&mut stream, count)?.as_secs_f64() / count as f64);
    }
    Ok((result, weight.bytes() as f64 / best))
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
