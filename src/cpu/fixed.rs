//! Activations as integers of 16 bits.

use super::Machine;
use super::simd::{BLOCK, Kernel, Simd};
use super::tensor::{Aligned, Tensor};
use crate::backend::{ACTIVATION_STEP, FIXED_COLS};

/// Blocks of [`FIXED_COLS`].
pub(super) const FIXED_BLOCKS: usize = FIXED_COLS / BLOCK;

/// Blocks that products with a few tokens take at once.
pub(super) const FIXED_GROUP: usize = 4;

/// Activations in fixed point; a session keeps their memory.
pub(super) struct Fixed {
    /// `[T, stride]`: whole groups of [`FIXED_GROUP`] blocks, the last padded with zeros.
    levels: Aligned<i16>,
    /// `[T, ceil(cols / FIXED_COLS)]`: `x ~ level * scale`.
    scales: Vec<f32>,
}

/// What [`Fixed`] holds of a product's input.
#[derive(Clone, Copy)]
pub(super) struct FixedRows<'a> {
    levels: &'a [i16],
    scales: &'a [f32],
    stride: usize,
    parts: usize,
}

impl Fixed {
    pub(super) fn new() -> Self {
        Self { levels: Aligned::zeros(0), scales: Vec::new() }
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> u64 {
        self.levels.bytes() + (self.scales.capacity() * size_of::<f32>()) as u64
    }

    /// Rounds the live rows of `x`; blocks come in the order of [`Simd::words_apart`] if `apart`.
    pub(super) fn round(&mut self, machine: &Machine, x: &Tensor, apart: bool) -> FixedRows<'_> {
        let (tokens, cols) = (x.rows(), x.width());
        let stride = cols.next_multiple_of(FIXED_GROUP * BLOCK);
        let parts = cols.div_ceil(FIXED_COLS);
        self.levels.grow(tokens * stride);
        if self.scales.len() < tokens * parts {
            self.scales.resize(tokens * parts, 0.0);
        }
        let rows = self.levels.chunks_exact_mut(stride).zip(self.scales.chunks_exact_mut(parts));
        let rows: Vec<_> = x.floats().chunks_exact(cols).zip(rows).collect();
        machine.each_of(tokens * cols < 64 * 1024, rows, |_worker, (x, (levels, scales))| {
            machine.level.run(Round { x, levels, scales, apart });
        });
        let (levels, scales) = (&self.levels[..tokens * stride], &self.scales[..tokens * parts]);
        FixedRows { levels, scales, stride, parts }
    }
}

impl<'a> FixedRows<'a> {
    /// The blocks of a row, whole groups of them, and the scales of its parts.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> (&'a [[i16; BLOCK]], &'a [f32]) {
        let blocks = self.levels[row * self.stride..][..self.stride].as_chunks().0;
        (blocks, &self.scales[row * self.parts..][..self.parts])
    }

    /// The blocks of a row's part `part` of [`FIXED_COLS`], the last of which may be shorter; whole
    /// groups.
    #[inline(always)]
    pub(super) fn blocks(&self, row: usize, part: usize) -> &'a [[i16; BLOCK]] {
        let (blocks, _) = self.row(row);
        &blocks[part * FIXED_BLOCKS..blocks.len().min((part + 1) * FIXED_BLOCKS)]
    }

    /// The scale of that part.
    #[inline(always)]
    pub(super) fn scale(&self, row: usize, part: usize) -> f32 {
        self.scales[row * self.parts + part]
    }
}

/// One row.
struct Round<'a> {
    /// `[cols]`.
    x: &'a [f32],
    /// In whole groups of blocks.
    levels: &'a mut [i16],
    /// One a part.
    scales: &'a mut [f32],
    apart: bool,
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let parts = self.x.chunks(FIXED_COLS).zip(self.levels.chunks_mut(FIXED_COLS));
        for ((x, levels), scale) in parts.zip(self.scales) {
            let (whole, tail) = x.as_chunks::<BLOCK>();
            let mut rest = [0.0; BLOCK];
            rest[..tail.len()].copy_from_slice(tail);
            let blocks = || whole.iter().chain((!tail.is_empty()).then_some(&rest));
            let largest = largest(simd, blocks());
            // Not `largest >= ..`: NaN passes. What is smaller has no inverse.
            let none = largest < f32::MIN_POSITIVE / ACTIVATION_STEP;
            *scale = if none { 0.0 } else { largest * ACTIVATION_STEP };
            let per_level = simd.splat(if none { 0.0 } else { 1.0 / *scale });
            let levels = levels.as_chunks_mut().0;
            levels[x.len().div_ceil(BLOCK)..].fill([0; BLOCK]);
            for (x, levels) in blocks().zip(&mut *levels) {
                for i in 0..BLOCK / S::LANES {
                    simd.store_i16(levels, i, simd.mul(simd.load(x, i), per_level));
                }
            }
            if self.apart {
                levels.as_chunks_mut().0.iter_mut().for_each(|four| simd.words_apart(four));
            }
        }
    }
}

/// The largest magnitude; NaN where an element is not finite.
#[inline(always)]
fn largest<'a, S: Simd>(simd: S, blocks: impl Iterator<Item = &'a [f32; BLOCK]>) -> f32 {
    let zero = simd.splat(0.0);
    let (mut max, mut poison) = (zero, zero);
    for x in blocks {
        for i in 0..BLOCK / S::LANES {
            let x = simd.load(x, i);
            max = simd.max(max, simd.abs(x));
            // A maximum may lose NaN, a sum does not, and integers know neither NaN nor infinity.
            poison = simd.fma(x, zero, poison);
        }
    }
    simd.max_lane(max) + simd.sum(poison)
}
