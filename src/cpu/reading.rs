//! How what a token reads once, weights above all, is read as fast as memory gives it.

use super::simd::{Kernels, LINE, Simd};

/// How far ahead of a product its weights are asked for, where that pays: what a core reads in about
/// half a microsecond, so that no line is late, and little beside a second-level cache.
const AHEAD: usize = 16 * 1024;

/// How far ahead rows side by side are asked for, each: what a core reads of one of them in half a
/// microsecond, and little beside the nearest cache even where four are read.
pub(super) const NEAR: usize = 2 * 1024;

/// The order in which the rows of a strip are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// One row after the other, in one long stream, which most processors foresee.
    InTurn,
    /// As many rows at once as registers hold the sums of, from as many places of the strip, each asked
    /// for a little ahead.
    ///
    /// Where a processor does not foresee enough, lines that are asked for in time, and from several
    /// pages, twice the speed (measured in benches/runs/2026-11-29-xeon-cpu).
    SideBySide,
}

impl Reading {
    /// What suits these kernels on this processor, as far as it was measured: rows side by side made a
    /// Xeon with AVX-512 up to twice as fast, and AVX2 on an EPYC (Zen 3) up to 1.8 times. AVX-512 on an
    /// EPYC (Zen 4) read as fast as memory gives in turn, where asking ahead cost a little.
    pub(super) fn that_suits(kernels: Kernels) -> Self {
        match kernels {
            Kernels::Avx2 | Kernels::Avx2Vnni => Self::SideBySide,
            Kernels::Avx512 | Kernels::Avx512Amx if of_intel() => Self::SideBySide,
            _ => Self::InTurn,
        }
    }

    /// Whether what is read once is to be asked for a little ahead: see [`ask_near`].
    #[inline(always)]
    pub(super) fn asks(self) -> bool {
        self == Self::SideBySide
    }

    /// Rows at once.
    #[inline(always)]
    pub(super) fn rows<S: Simd>(self) -> usize {
        match self {
            Self::InTurn => 1,
            Self::SideBySide => S::TILE,
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn of_intel() -> bool {
    // SAFETY: every processor of 64 bits has the instruction.
    #[allow(unused_unsafe, reason = "safe in later versions of Rust")]
    let vendor = unsafe { std::arch::x86_64::__cpuid(0) };
    let words = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    words.as_flattened() == b"GenuineIntel"
}

#[cfg(not(target_arch = "x86_64"))]
fn of_intel() -> bool {
    false
}

/// Row `i` of the next `R` that are read at once, `group` groups of them having been read: each is of
/// another `R`-th of the first `rows`, a multiple of `R`.
#[inline(always)]
pub(super) fn side_by_side<const R: usize>(rows: usize, group: usize, i: usize) -> usize {
    i * (rows / R) + group
}

/// Asks for what follows `blocks` of one of several rows that are read at once.
#[inline(always)]
pub(super) fn ask_near<S: Simd, Raw: AsRef<[u8]>>(simd: S, blocks: &[Raw]) {
    ask_beyond(simd, blocks, NEAR);
}

/// Asks for as much as `blocks` are, so many bytes beyond them.
#[inline(always)]
pub(super) fn ask_beyond<S: Simd, Raw: AsRef<[u8]>>(simd: S, blocks: &[Raw], bytes: usize) {
    if let Some(first) = blocks.first() {
        for line in (0..size_of_val(blocks)).step_by(LINE) {
            simd.prefetch(first.as_ref(), bytes + line);
        }
    }
}

/// Whether a product with a few tokens is to [`ask_ahead`]: their activations, which pass by with each
/// row, take so many bytes.
///
/// Rows in turn are one long stream, which most processors foresee. But where activations do not fit the
/// nearest cache beside it, they are a stream as well, out of the next cache, and the two hinder each
/// other: rows of 8192 columns were read at half the speed of short ones. Where activations do fit,
/// asking costs a little and gains nothing.
pub(super) fn crowds(bytes: usize) -> bool {
    bytes >= 12 * 1024
}

/// Asks for what follows `blocks` at some distance, in the second-level cache: in the nearest it would
/// drive the activations out.
#[inline(always)]
pub(super) fn ask_ahead<S: Simd, Raw: AsRef<[u8]>, const N: usize>(simd: S, blocks: &[Raw; N]) {
    for line in (0..size_of_val(blocks)).step_by(LINE) {
        simd.prefetch_second(blocks[0].as_ref(), AHEAD + line);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cpu, Kernels};
    use super::*;
    use crate::backend::{
        AttentionShape, Backend, Input, MatrixFormat, Operations, Step, StreamShape, TensorFormat,
    };
    use crate::checkpoint::{FloatType, MatrixSource};
    use crate::delta::Phase;
    use crate::sampler::Draws;

    /// The product of a matrix with `tokens` rows.
    fn product(cpu: &Cpu, source: &MatrixSource, tokens: usize) -> Vec<f32> {
        let mut draws = Draws::new(3);
        let (rows, cols) = (source.rows(), source.cols());
        let linear = cpu.linear(std::slice::from_ref(source)).expect("linear");
        let count = tokens * cols;
        let mut x;
        if source.format() == MatrixFormat::Ternary {
            x = cpu.tensor(tokens, cols, TensorFormat::Int8).expect("tensor");
            let values: Vec<i8> = (0..count).map(|_| (255.0 * draws.draw()) as u8 as i8).collect();
            cpu.write_int8(&mut x, &values, &vec![0.01; tokens]).expect("written");
        } else {
            x = cpu.tensor(tokens, cols, TensorFormat::F32).expect("tensor");
            let values: Vec<f32> = (0..count).map(|_| draws.draw() - 0.5).collect();
            cpu.write(&mut x, &values).expect("written");
        }
        let mut out = cpu.tensor(tokens, rows, TensorFormat::F32).expect("tensor");
        let attention = AttentionShape { heads: 1, kv_heads: 1, head_dim: 64 };
        let shape = StreamShape { rows: tokens, context: tokens, attention, vocabulary: 32 };
        let mut stream = cpu.stream(&shape).expect("stream");
        let input = Input::Tokens(&vec![0; tokens]);
        stream.begin(&Step { input, position: 0, phase: Phase::Decode }).expect("begun");
        stream.linear(&x, &linear, &mut out).expect("product");
        stream.read(&out).expect("read")
    }

    #[test]
    fn rows_side_by_side_have_the_bits_of_rows_in_turn() {
        let mut draws = Draws::new(2);
        let mut bytes = |count: usize| -> Vec<u8> {
            (0..count).map(|_| (256.0 * draws.draw()) as u8).collect()
        };
        // Rows that four divides and does not, whole strips and parts; columns of whole blocks, of parts
        // of 512, and less.
        for (rows, cols) in [(1, 32), (7, 100), (64, 64), (203, 640), (1036, 544)] {
            let mut float = bytes(2 * rows * cols);
            float.chunks_exact_mut(2).for_each(|pair| pair[1] = 0x3c | pair[1] & 0x80);
            let float = MatrixSource::float("w", rows, cols, FloatType::BF16, float.into());
            let mut sources = vec![float.clone().into_q8(), float.clone().into_q4(), float];
            if rows.is_multiple_of(4) {
                let trits = |b: u8| b & !((b & b >> 1 & 0x55) << 1);
                let packed: Vec<u8> = bytes(rows / 4 * cols).into_iter().map(trits).collect();
                sources.push(MatrixSource::packed("w", rows, cols, packed.into(), 0.5));
            }
            for kernels in Kernels::available() {
                let cpu = |reading| Cpu::with_reading(Some(2), kernels, reading).expect("started");
                let (in_turn, side_by_side) = (cpu(Reading::InTurn), cpu(Reading::SideBySide));
                for (source, tokens) in sources.iter().flat_map(|s| [1, 2, 5].map(|t| (s, t))) {
                    let want = product(&in_turn, source, tokens);
                    assert!(want.iter().any(|y| *y != 0.0));
                    let found = product(&side_by_side, source, tokens);
                    let format = source.format();
                    assert_eq!(
                        found, want,
                        "{kernels:?} {format:?} {rows} x {cols}, {tokens} tokens"
                    );
                }
            }
        }
    }

    #[test]
    fn both_ways_read_all_there_is() {
        // Strips of a MiB, one of less, and words beyond the last line.
        let bytes = (5 << 19) + 12;
        let sum = |reading| {
            let kernels = Kernels::available().pop().expect("there is always one");
            let cpu = Cpu::with_reading(Some(2), kernels, reading).expect("started");
            cpu.read_speed(bytes).expect("read").sum
        };
        let want = (0..bytes as u32 / 4).map(crate::backend::read_pattern);
        let want = want.fold(0, |sum: u32, word| sum.wrapping_add(word));
        assert_eq!(sum(Reading::InTurn), want);
        assert_eq!(sum(Reading::SideBySide), want);
    }
}
