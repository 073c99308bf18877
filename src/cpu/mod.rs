//! The CPU backend: threads and SIMD, on weights where they lie in the file.
//!
//! Each operation has a file of its name, as each has a shader. Kernels are written once over
//! `simd`'s vectors and are compiled for each set of instructions; which one runs is decided
//! when a [`Cpu`] is made.
//!
//! # Panics
//! Operations panic where shapes or formats break the contract of [`crate::backend`].

#![allow(
    clippy::needless_range_loop,
    reason = "the loops of kernels index several arrays of registers at once and are unrolled"
)]

mod attention;
mod attention_decoded;
mod attention_in_place;
mod attention_tiles;
mod cache;
mod embed;
mod encode_keys;
mod fixed;
mod gate;
mod linear_float;
mod linear_levels;
mod linear_levels_tiled;
mod linear_ternary;
mod linear_ternary_tiled;
mod multiply_speed;
mod norm;
mod page_scores;
mod pages;
mod read_speed;
mod reading;
mod rope_append;
mod rows;
mod sample;
mod simd;
mod stream;
mod strips;
mod tensor;
mod threads;
mod tiled;
mod values;
mod weights;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::f16;

use crate::backend::{
    Backend, CacheShape, DeviceInfo, DeviceKind, Footprint, MatrixFormat, Q8_BLOCK, ReadSpeed,
    StreamShape, TensorFormat,
};
use crate::checkpoint::{Bytes, MatrixSource};
use crate::error::{Error, Result};

pub use cache::Cache;
pub use simd::Kernels;
pub use stream::Stream;
pub use tensor::Tensor;

use reading::Reading;
use simd::Level;
use strips::Strip;
use tensor::Aligned;
use threads::Threads;

/// The CPU as a [`Backend`]. Cheap to clone; clones share their threads.
#[derive(Clone)]
pub struct Cpu {
    machine: Arc<Machine>,
}

impl Cpu {
    /// The CPU with its fastest kernels and `threads` threads, one for each core if not given.
    ///
    /// # Errors
    /// If threads cannot be started.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        let fastest = Kernels::available().pop().unwrap_or(Kernels::Portable);
        Self::with_kernels(threads, fastest)
    }

    /// The CPU with the kernels given, which must be of [`Kernels::available`].
    ///
    /// # Errors
    /// If the processor lacks the instructions, or threads cannot be started.
    pub fn with_kernels(threads: Option<usize>, kernels: Kernels) -> Result<Self> {
        Self::with_reading(threads, kernels, Reading::that_suits(kernels))
    }

    fn with_reading(threads: Option<usize>, kernels: Kernels, reading: Reading) -> Result<Self> {
        let level = Level::new(kernels).ok_or_else(|| Error::Device {
            device: "CPU".into(),
            what: "choosing kernels".into(),
            message: format!("it lacks {}; it has {}", kernels.name(), Kernels::listed()),
        })?;
        let threads = Threads::new(threads)?;
        let plural = if threads.count() == 1 { "" } else { "s" };
        let info = DeviceInfo {
            name: processor_name(),
            kind: DeviceKind::Cpu,
            backend: "cpu".into(),
            driver: format!("{}, {} thread{plural}", kernels.name(), threads.count()),
            features: Vec::new(),
        };
        Ok(Self { machine: Arc::new(Machine { info, level, reading, threads }) })
    }

    fn error(&self, what: &str, message: &str) -> Error {
        let device = self.machine.info.name.clone();
        Error::Device { device, what: what.into(), message: message.into() }
    }
}

/// The processor's name, or the architecture's where the system does not tell.
fn processor_name() -> String {
    let from_linux = || {
        let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    from_linux().unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// Bytes of encoded weights in a strip that several tokens pass by, so that it stays in the cache.
const STRIP_BYTES: usize = 64 * 1024;

/// Strips of a matrix for each thread, at least.
const STRIPS: usize = 8;

/// What all sessions share.
struct Machine {
    info: DeviceInfo,
    level: Level,
    reading: Reading,
    threads: Threads,
}

impl Machine {
    /// Calls `task` with each item, on this thread if the work is `small`.
    fn each_of<T: Send>(&self, small: bool, items: Vec<T>, task: impl Fn(usize, T) + Sync) {
        if small {
            items.into_iter().for_each(|item| task(0, item));
        } else {
            self.threads.each_of(items, task);
        }
    }

    /// Rows of a strip of a matrix that `tokens` pass by: one token reads on and on, and needs no
    /// more strips than let threads end together; where several pass by, a strip of about `bytes`
    /// stays in the cache.
    fn strip_height(&self, rows: usize, row_bytes: usize, tokens: usize, bytes: usize) -> usize {
        let share = rows.div_ceil(STRIPS * self.threads.count());
        let fit = if tokens > 1 { bytes / row_bytes.max(1) } else { share };
        fit.min(share).max(1).next_multiple_of(4)
    }

    /// Cuts the output of a product of `x` with stacked matrices that are not packed, and tells whether
    /// it is too small for threads. A strip is of `many` rows where that is given, else as high as
    /// suits a few tokens.
    fn product_strips<'a>(
        &self,
        x: &Tensor,
        parts: &[Matrix],
        out: &'a mut Tensor,
        many: Option<usize>,
    ) -> (Vec<Strip<'a>>, bool) {
        let (tokens, cols) = (x.rows(), x.width());
        assert!(parts.iter().all(|part| part.cols == cols), "input width");
        let pieces: Vec<usize> = parts.iter().map(|part| part.rows).collect();
        let rows: usize = pieces.iter().sum();
        let row_bytes = parts.first().map_or(1, Matrix::row_bytes);
        let height =
            many.unwrap_or_else(|| self.strip_height(rows, row_bytes, tokens, STRIP_BYTES));
        let strips = strips::cut(out.floats_mut(), tokens, &pieces, 1, |_| height);
        (strips, rows * cols * tokens < 8 * 1024)
    }
}

/// A buffer for each thread, kept by a session so that no step allocates.
struct Scratch(Vec<Mutex<Aligned<f32>>>);

impl Scratch {
    fn new(threads: usize) -> Self {
        Self((0..threads).map(|_| Mutex::new(Aligned::zeros(0))).collect())
    }

    /// The buffer of a thread, which no other asks for.
    fn of(&self, worker: usize) -> MutexGuard<'_, Aligned<f32>> {
        self.0[worker].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes held.
    fn bytes(&self) -> u64 {
        (0..self.0.len()).map(|worker| self.of(worker).bytes()).sum()
    }
}

/// Weight matrices stacked over their outputs.
pub struct Linear {
    parts: Vec<Matrix>,
}

/// One matrix `[rows, cols]` in a format of [`MatrixSource`].
struct Matrix {
    format: MatrixFormat,
    rows: usize,
    cols: usize,
    /// The file's own bytes where they can be.
    values: Bytes,
    /// Q8 and Q4 only: `[rows, ceil(cols / 32)]`.
    scales: Vec<f16>,
    /// Ternary: what the product is multiplied by.
    scale: f32,
}

impl Matrix {
    fn new(source: &MatrixSource) -> Self {
        let mut scales = Vec::new();
        let values = source.borrow().unwrap_or_else(|| {
            let (stride, scale_stride) = (source.row_bytes(), source.row_scales());
            let rows = source.storage_rows();
            scales.resize(rows * scale_stride, f16::ZERO);
            Bytes::filled(rows * stride, |values| {
                source.encode_into(0..rows, stride, scale_stride, values, &mut scales);
            })
        });
        let (format, rows, cols) = (source.format(), source.rows(), source.cols());
        Self { format, rows, cols, values, scales, scale: source.scale() }
    }

    /// Bytes of a row that is not packed.
    fn row_bytes(&self) -> usize {
        self.format.bytes_of(self.cols)
    }

    /// A row that is not packed.
    fn row(&self, row: usize) -> &[u8] {
        &self.values[row * self.row_bytes()..][..self.row_bytes()]
    }

    /// The scales of a row's blocks; empty where the format has none.
    fn row_scales(&self, row: usize) -> &[f16] {
        if self.scales.is_empty() {
            return &[];
        }
        let blocks = self.cols.div_ceil(Q8_BLOCK);
        &self.scales[row * blocks..][..blocks]
    }
}

impl Footprint for Linear {
    fn bytes(&self) -> u64 {
        self.parts.iter().map(|p| (p.values.len() + size_of_val(&p.scales[..])) as u64).sum()
    }
}

/// An RMSNorm: its weight `[width]` and epsilon.
pub struct Norm {
    weight: Vec<f32>,
    eps: f32,
}

impl Footprint for Norm {
    fn bytes(&self) -> u64 {
        size_of_val(&self.weight[..]) as u64
    }
}

/// The rotary table: for each position `[D / 2]` cosines, then as many sines.
pub struct Rope {
    table: Vec<f32>,
}

impl Footprint for Rope {
    fn bytes(&self) -> u64 {
        size_of_val(&self.table[..]) as u64
    }
}

impl Backend for Cpu {
    type Linear = Linear;
    type Norm = Norm;
    type Rope = Rope;
    type Tensor = Tensor;
    type Cache = Cache;
    type Stream = Stream;

    fn device(&self) -> &DeviceInfo {
        &self.machine.info
    }

    fn linear(&self, stack: &[MatrixSource]) -> Result<Linear> {
        let uniform =
            stack.windows(2).all(|w| w[0].cols() == w[1].cols() && w[0].format() == w[1].format());
        if stack.is_empty() || !uniform {
            return Err(self.error("stacking matrices", "they differ in width or format"));
        }
        Ok(Linear { parts: stack.iter().map(Matrix::new).collect() })
    }

    fn norm(&self, weight: &[f32], eps: f32) -> Result<Norm> {
        Ok(Norm { weight: weight.to_vec(), eps })
    }

    fn rope(&self, table: &[[f32; 2]], head_dim: usize) -> Result<Rope> {
        let mut split = Vec::with_capacity(2 * table.len());
        for position in table.chunks_exact(head_dim / 2) {
            split.extend(position.iter().map(|[cos, _]| cos));
            split.extend(position.iter().map(|[_, sin]| sin));
        }
        Ok(Rope { table: split })
    }

    fn tensor(&self, rows: usize, width: usize, format: TensorFormat) -> Result<Tensor> {
        Ok(Tensor::new(rows, width, format))
    }

    fn cache(&self, shape: &CacheShape) -> Result<Cache> {
        Cache::new(shape)
    }

    fn stream(&self, shape: &StreamShape) -> Result<Stream> {
        Ok(Stream::new(self.machine.clone(), shape))
    }

    fn write(&self, tensor: &mut Tensor, values: &[f32]) -> Result<()> {
        tensor.set_rows(values.len() / tensor.width());
        tensor.floats_mut().copy_from_slice(values);
        Ok(())
    }

    fn write_int8(&self, tensor: &mut Tensor, values: &[i8], scales: &[f32]) -> Result<()> {
        tensor.set_rows(scales.len());
        let width = tensor.width();
        let int8 = tensor.int8_mut();
        int8.values[..values.len()].copy_from_slice(values);
        int8.scales[..scales.len()].copy_from_slice(scales);
        for (sum, row) in int8.sums.iter_mut().zip(values.chunks_exact(width)) {
            *sum = row.iter().map(|&v| i32::from(v)).sum();
        }
        Ok(())
    }

    fn max_top_k(&self) -> usize {
        usize::MAX
    }

    fn look_ahead(&self) -> usize {
        0
    }

    fn fixed_point(&self) -> bool {
        true
    }

    fn read_speed(&self, bytes: u64) -> Result<ReadSpeed> {
        read_speed::measure(&self.machine, bytes)
    }

    fn multiply_speed(&self, format: MatrixFormat) -> Result<f64> {
        Ok(multiply_speed::measure(&self.machine, format))
    }
}
