//! The end of `norm` and of `gate`: an optional RMSNorm of a row, then floats or 8 bits.

use super::simd::{BLOCK, Kernel, Simd};
use super::tensor::RowMut;

/// Blocks of a row; the last is padded with zeros where the row ends in it.
pub(super) struct Blocks<'a> {
    whole: &'a [[f32; BLOCK]],
    rest: [f32; BLOCK],
    len: usize,
}

impl<'a> Blocks<'a> {
    /// The blocks of `row`.
    pub(super) fn new(row: &'a [f32]) -> Self {
        let (whole, tail) = row.as_chunks();
        let mut rest = [0.0; BLOCK];
        rest[..tail.len()].copy_from_slice(tail);
        Self { whole, rest, len: row.len() }
    }

    /// One of them.
    #[inline(always)]
    pub(super) fn get(&self, block: usize) -> &[f32; BLOCK] {
        self.whole.get(block).unwrap_or(&self.rest)
    }
}

/// Where the elements of a row come from: read, or computed each time they are asked for.
pub(super) trait Source {
    /// Elements in a row.
    fn width(&self) -> usize;
    /// Vector `i` of a block; beyond the row's end it is zero. `#[inline(always)]`.
    fn load<S: Simd>(&self, simd: S, block: usize, i: usize) -> S::Floats;
}

impl Source for Blocks<'_> {
    fn width(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn load<S: Simd>(&self, simd: S, block: usize, i: usize) -> S::Floats {
        simd.load(self.get(block), i)
    }
}

/// Writes `out = source`, or `out = weight * source / rms(source)` where there is a norm.
pub(super) struct WriteRow<'a, Y> {
    pub(super) source: Y,
    /// Weight `[width]` and epsilon.
    pub(super) norm: Option<(Blocks<'a>, f32)>,
    pub(super) out: RowMut<'a>,
}

impl<Y: Source> WriteRow<'_, Y> {
    /// `1 / sqrt(mean(y^2) + eps)`.
    #[inline(always)]
    fn inverse_rms<S: Simd>(&self, simd: S, eps: f32) -> f32 {
        let mut sums = [simd.splat(0.0); 8];
        for block in 0..self.source.width().div_ceil(BLOCK) {
            for i in 0..BLOCK / S::LANES {
                let y = self.source.load(simd, block, i);
                sums[i] = simd.fma(y, y, sums[i]);
            }
        }
        for i in 0..4 {
            sums[i] = simd.add(sums[i], sums[i + 4]);
        }
        let squares: f32 = simd.sum4([sums[0], sums[1], sums[2], sums[3]]).iter().sum();
        1.0 / (squares / self.source.width() as f32 + eps).sqrt()
    }

    /// The element that is written, before it is quantised.
    #[inline(always)]
    fn load<S: Simd>(&self, simd: S, inverse: f32, block: usize, i: usize) -> S::Floats {
        let y = self.source.load(simd, block, i);
        match &self.norm {
            Some((weight, _)) => {
                let scaled = simd.mul(y, simd.splat(inverse));
                simd.mul(scaled, simd.load(weight.get(block), i))
            }
            None => y,
        }
    }

    /// The largest magnitude; NaN where an element is not finite.
    #[inline(always)]
    fn largest<S: Simd>(&self, simd: S, inverse: f32) -> f32 {
        let zero = simd.splat(0.0);
        let (mut max, mut poison) = (zero, zero);
        for block in 0..self.source.width().div_ceil(BLOCK) {
            for i in 0..BLOCK / S::LANES {
                let y = self.load(simd, inverse, block, i);
                max = simd.max(max, simd.abs(y));
                // A maximum may lose NaN, a sum does not, and NaN must not become silence.
                poison = simd.fma(y, zero, poison);
            }
        }
        simd.max_lane(max) + simd.sum(poison)
    }
}

impl<Y: Source> Kernel for WriteRow<'_, Y> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let inverse = match self.norm {
            Some((_, eps)) => self.inverse_rms(simd, eps),
            None => 1.0,
        };
        match std::mem::replace(&mut self.out, RowMut::F32(&mut [])) {
            RowMut::F32(out) => {
                for (block, out) in out.chunks_mut(BLOCK).enumerate() {
                    let mut y = [0.0; BLOCK];
                    for i in 0..BLOCK / S::LANES {
                        simd.store(&mut y, i, self.load(simd, inverse, block, i));
                    }
                    copy(&y, out);
                }
            }
            RowMut::Int8(out, scale, sum) => {
                let max = self.largest(simd, inverse);
                // Not `max`, which would drop NaN.
                let max = if max < 1e-5 { 1e-5 } else { max };
                let per_level = simd.splat(127.0 / max);
                for (block, out) in out.chunks_mut(BLOCK).enumerate() {
                    let mut levels = [0; BLOCK];
                    for i in 0..BLOCK / S::LANES {
                        let y = self.load(simd, inverse, block, i);
                        simd.store_i8(&mut levels, i, simd.mul(y, per_level));
                    }
                    copy(&levels, out);
                }
                *scale = max / 127.0;
                *sum = out.iter().map(|&level| i32::from(level)).sum();
            }
        }
    }
}

/// Copies a block, or as much as there is place for.
#[inline(always)]
pub(super) fn copy<T: Copy>(block: &[T; BLOCK], out: &mut [T]) {
    match <&mut [T; BLOCK]>::try_from(&mut *out) {
        Ok(whole) => *whole = *block,
        Err(_) => out.copy_from_slice(&block[..out.len()]),
    }
}
