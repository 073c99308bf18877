//! A product as [`tune`](super::tune) measures it.

use std::time::{Duration, Instant};

use half::f16;

use super::{Gpu, Packing, Tuning};
use crate::backend::{
    AttentionShape, Backend, DeviceKind, Footprint, Input, MatrixFormat, Operations, Step,
    StreamShape, TensorFormat, WEIGHT_STEP,
};
use crate::checkpoint::{FloatType, MatrixSource};
use crate::cpu::Cpu;
use crate::delta::Phase;
use crate::error::Result;

/// How long a measurement takes, where a single product does not take longer.
const TIME: Duration = Duration::from_millis(20);

/// What is multiplied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    pub(super) format: MatrixFormat,
    /// Of the matrix.
    rows: usize,
    cols: usize,
    /// How often the matrix is there, and they take turns: for what is about reading it.
    copies: usize,
    pub(super) tokens: usize,
}

impl Work {
    /// A matrix that is beyond the caches of integrated GPUs and within WebGPU's smallest limit, as
    /// wide as BitNet-2B. The caches of discrete ones may hold a hundred megabytes: several take turns.
    /// Software renderers are bound by work and not by memory.
    pub(super) fn one_token(kind: DeviceKind, format: MatrixFormat) -> Self {
        let cols = 2560;
        let bytes = if kind == DeviceKind::SoftwareGpu { 2 << 20 } else { 48 << 20 };
        let fields = if format == MatrixFormat::Ternary { 4 } else { 1 };
        let rows = fields * (bytes / format.bytes_of(cols));
        let copies = if kind == DeviceKind::DiscreteGpu { 6 } else { 1 };
        Self { format, rows, cols, copies, tokens: 1 }
    }

    /// As many tokens as a prompt is read at a time, with a matrix whose tiles fill the widest GPU; less
    /// of everything on software renderers, which compute no tile faster where there are more of them.
    pub(super) fn many_tokens(kind: DeviceKind, format: MatrixFormat) -> Self {
        let software = kind == DeviceKind::SoftwareGpu;
        let (rows, cols, tokens) = if software { (512, 640, 128) } else { (8192, 2560, 256) };
        Self { format, rows, cols, copies: 1, tokens }
    }

    /// Multiplications of a product; of one token as many as weights.
    pub(super) fn products(&self) -> f64 {
        (self.rows * self.cols * self.tokens) as f64
    }
}

/// Sums of the same products in another order: equal where they are integers, else each within
/// `n u sum |x| |w|`, a tenth for `n = 2560` products of a quarter on average. The CPU rounds levels to
/// fixed point where there are many tokens.
pub(super) fn same(work: &Work, result: &[f32], right: &[f32]) -> bool {
    let n = work.cols as f32;
    let order = n * n * f32::EPSILON / 8.0;
    let apart = match work.format {
        MatrixFormat::Ternary => 0.0,
        MatrixFormat::Q8 | MatrixFormat::Q4 if work.tokens > 1 => order + n * WEIGHT_STEP / 4.0,
        _ => order,
    };
    // Written so that NaN is wrong.
    result.len() == right.len() && result.iter().zip(right).all(|(a, b)| (a - b).abs() <= apart)
}

/// A backend in the middle of products: `y = W x`.
pub(super) struct Trial<B: Backend> {
    stream: B::Stream,
    /// The same matrix several times.
    weights: Vec<B::Linear>,
    /// Whose turn it is.
    turn: usize,
    /// Of the matrix.
    bytes: u64,
    x: B::Tensor,
    y: B::Tensor,
    /// Of `y`.
    elements: usize,
}

impl<B: Backend> Trial<B> {
    fn new(backend: &B, work: &Work, copies: usize) -> Result<Self> {
        let &Work { format, rows, cols, tokens, .. } = work;
        let matrix = matrix(format, rows, cols);
        let weight = |_| backend.linear(std::slice::from_ref(&matrix));
        let weights = (0..copies).map(weight).collect::<Result<Vec<_>>>()?;
        let attention = AttentionShape { heads: 2, kv_heads: 1, head_dim: 16 };
        let shape = StreamShape { rows: tokens, context: tokens, attention, vocabulary: 32 };
        let mut stream = backend.stream(&shape)?;
        // No two tokens are alike.
        let level = |i: usize| (i * 37 % 255) as i32 - 127;
        let x = if format == MatrixFormat::Ternary {
            let mut x = backend.tensor(tokens, cols, TensorFormat::Int8)?;
            let values: Vec<i8> = (0..tokens * cols).map(|i| level(i) as i8).collect();
            backend.write_int8(&mut x, &values, &vec![1.0; tokens])?;
            x
        } else {
            // With all bits of a float: a kernel may take them apart.
            let mut x = backend.tensor(tokens, cols, TensorFormat::F32)?;
            let values: Vec<f32> = (0..tokens * cols).map(|i| level(i) as f32 / 129.0).collect();
            backend.write(&mut x, &values)?;
            x
        };
        let y = backend.tensor(tokens, rows, TensorFormat::F32)?;
        let ids = vec![0; tokens];
        let phase = if tokens == 1 { Phase::Decode } else { Phase::Prefill { length: tokens } };
        stream.begin(&Step { input: Input::Tokens(&ids), position: 0, phase })?;
        let bytes = weights[0].bytes();
        Ok(Self { stream, weights, turn: 0, bytes, x, y, elements: tokens * rows })
    }

    fn result(&mut self) -> Result<Vec<f32>> {
        self.stream.linear(&self.x, &self.weights[0], &mut self.y)?;
        self.stream.read(&self.y)
    }

    /// How many seconds each of so many products takes.
    fn time(&mut self, count: usize) -> Result<f64> {
        let start = Instant::now();
        let turns = self.weights.iter().cycle().skip(self.turn).take(count);
        for weight in turns {
            self.stream.linear(&self.x, weight, &mut self.y)?;
        }
        self.turn = (self.turn + count) % self.weights.len();
        self.stream.submit()?;
        self.stream.wait()?;
        Ok(start.elapsed().as_secs_f64() / count as f64)
    }
}

/// The result of a product on the CPU.
pub(super) fn expected(work: &Work) -> Result<Vec<f32>> {
    Trial::new(&Cpu::new(None)?, work, 1)?.result()
}

/// The same product with the matrix packed in several ways.
pub(super) struct Trials(Vec<(Packing, Trial<Gpu>)>);

impl Trials {
    /// At least one packing.
    pub(super) fn on(gpu: &Gpu, work: &Work, packings: &[Packing]) -> Result<Self> {
        let trial = |&packing: &Packing| Ok((packing, Trial::on(&gpu.packed(packing), work)?));
        packings.iter().map(trial).collect::<Result<_>>().map(Self)
    }

    fn at(&self, packing: Packing) -> usize {
        self.0.iter().position(|(of, _)| *of == packing).unwrap_or(0)
    }

    /// That of a packing.
    pub(super) fn of(&mut self, packing: Packing) -> &mut Trial<Gpu> {
        let at = self.at(packing);
        &mut self.0[at].1
    }

    /// Bytes of the matrix.
    pub(super) fn bytes(&self, packing: Packing) -> u64 {
        self.0[self.at(packing)].1.bytes
    }
}

impl Trial<Gpu> {
    fn on(gpu: &Gpu, work: &Work) -> Result<Self> {
        Self::new(gpu, work, work.copies)
    }

    /// The result of a product that is cut like this, and about how many seconds it takes.
    pub(super) fn first(&mut self, gpu: &Gpu, tuning: Tuning) -> Result<(Vec<f32>, f64)> {
        self.stream.tuning = tuning;
        // A kernel that writes nothing must not find the right result of another.
        gpu.write(&mut self.y, &vec![f32::NAN; self.elements])?;
        Ok((self.result()?, self.time(1)?))
    }

    /// How many seconds a product takes that is cut like this and takes `about` so many: as many at
    /// once as fill the time, so that a submission weighs nothing.
    pub(super) fn measure(&mut self, tuning: Tuning, about: f64) -> Result<f64> {
        self.stream.tuning = tuning;
        let count = TIME.as_secs_f64() / about.max(1e-6);
        self.time(count.ceil().clamp(1.0, 1000.0) as usize)
    }
}

/// A matrix whose products tell rows and columns apart.
fn matrix(format: MatrixFormat, rows: usize, cols: usize) -> MatrixSource {
    if format == MatrixFormat::Ternary {
        // No field is 3.
        let trit = |i: usize, field: usize| i * 7 / (1 + 2 * field) % 3;
        let byte = |i| (0..4).map(|field| trit(i, field) << (2 * field)).sum::<usize>() as u8;
        let data: Vec<u8> = (0..rows / 4 * cols).map(byte).collect();
        return MatrixSource::packed("tuning", rows, cols, data.into(), 0.01);
    }
    // Halves of one period, and the upper halves of floats.
    let value = |i: usize| (i * 31 % 127) as f32 / 64.0 - 1.0;
    let period: Vec<f32> = (0..127 * cols).map(value).collect();
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
    let bytes = rows * cols * stored.bytes();
    let data: Vec<u8> = row.iter().copied().cycle().take(bytes).collect();
    let source = MatrixSource::float("tuning", rows, cols, stored, data.into());
    match format {
        MatrixFormat::Q8 => source.into_q8(),
        MatrixFormat::Q4 => source.into_q4(),
        _ => source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{GpuOptions, Sabotage, Select};

    /// All ways write to one tensor.
    #[test]
    fn a_kernel_that_does_nothing_is_not_taken_for_the_one_before() {
        for (name, format) in
            [("linear_float_tiled", MatrixFormat::Q8), ("linear_ternary", MatrixFormat::Ternary)]
        {
            let many = name.ends_with("tiled");
            let options = GpuOptions {
                select: Select::Named(String::new()),
                sabotage: Sabotage(vec![name.to_owned()]),
                ..GpuOptions::default()
            };
            let gpu = Gpu::open(&options).expect("a GPU or a software one");
            let kind = DeviceKind::SoftwareGpu;
            let work =
                if many { Work::many_tokens(kind, format) } else { Work::one_token(kind, format) };
            let right = expected(&work).expect("the CPU");
            let mut trial = Trial::on(&gpu, &work).expect("a trial");
            gpu.write(&mut trial.y, &right).expect("written");
            let (result, _) = trial.first(&gpu, gpu.device.tuning).expect("a result");
            assert!(!same(&work, &result, &right), "{name}");
        }
    }
}
