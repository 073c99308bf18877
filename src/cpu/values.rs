//! Quantised values: 8 or 4 bits an element, each row with its scale.

use half::f16;

use super::rows::{Blocks, Source, copy};
use super::simd::{BLOCK, Kernel, Simd, pairs_apart};
use super::weights::{Row, Signed8, Unsigned4};
use crate::backend::CacheShape;
use crate::delta::ValueFormat;

/// Tokens of a piece: what memory grows by. A multiple of the keys of a block of attention.
const PIECE: usize = 256;

/// Values of all KV heads, rows as [`encode_value`](crate::delta::encode_value) writes them.
pub(super) struct Quantised {
    pub(super) format: ValueFormat,
    head_dim: usize,
    /// Bytes of a row.
    row: usize,
    /// Tokens of a piece.
    piece: usize,
    /// `[G]`, pieces of `[piece, row]` bytes.
    heads: Vec<Vec<Box<[u8]>>>,
}

impl Quantised {
    pub(super) fn new(shape: &CacheShape) -> Self {
        let head_dim = shape.attention.head_dim;
        let heads = (0..shape.attention.kv_heads).map(|_| Vec::new()).collect();
        Self {
            format: shape.policy.values,
            head_dim,
            row: shape.policy.value_row_bytes(head_dim),
            piece: shape.context.clamp(1, PIECE).next_multiple_of(BLOCK),
            heads,
        }
    }

    /// The value of position `n`.
    pub(super) fn row(&self, head: usize, n: usize) -> &[u8] {
        &self.heads[head][n / self.piece][n % self.piece * self.row..][..self.row]
    }

    /// Where the values of `rows` tokens from `position` on go, `[G][rows]`.
    pub(super) fn append(&mut self, position: usize, rows: usize) -> Vec<Vec<&mut [u8]>> {
        let Self { row, piece, heads, .. } = self;
        for pieces in &mut *heads {
            while pieces.len() * *piece < position + rows {
                pieces.push(vec![0; *piece * *row].into());
            }
        }
        let first = position / *piece;
        let mut append = Vec::with_capacity(heads.len());
        for pieces in heads {
            let pieces = pieces[first..].iter_mut();
            let all = pieces.flat_map(|piece| piece.chunks_exact_mut(*row));
            append.push(all.skip(position - first * *piece).take(rows).collect());
        }
        append
    }

    /// Gives back the pieces beyond the first `length` tokens.
    pub(super) fn truncate(&mut self, length: usize) {
        for pieces in &mut self.heads {
            pieces.truncate(length.div_ceil(self.piece));
        }
    }

    /// Bytes held.
    pub(super) fn held(&self) -> u64 {
        let list = |pieces: &Vec<Box<[u8]>>| pieces.capacity() * size_of::<Box<[u8]>>();
        let bytes = |pieces: &Vec<Box<[u8]>>| list(pieces) + pieces.len() * self.piece * self.row;
        self.heads.iter().map(bytes).sum::<usize>() as u64
    }

    /// `count` values from position `first` on, which are of one piece, and the bytes of a row.
    pub(super) fn rows(&self, head: usize, first: usize, count: usize) -> (&[u8], usize) {
        let at = first % self.piece * self.row;
        (&self.heads[head][first / self.piece][at..][..count * self.row], self.row)
    }

    /// Bytes from the value of one position to that of a later one, wherever that lies, if it is there.
    pub(super) fn distance(&self, head: usize, from: usize, to: usize) -> Option<usize> {
        let place = |n: usize| {
            let piece = self.heads[head].get(n / self.piece)?;
            Some(piece.as_ptr().addr() + n % self.piece * self.row)
        };
        Some(place(to)?.wrapping_sub(place(from)?))
    }

    /// Multiplies `weights` `[queries]` of at most a block of values by the values' scales, and adds
    /// weights times minima to the last of each query's `sums` `[queries, blocks + 1]`: what is left
    /// is to multiply levels.
    #[inline(always)]
    pub(super) fn scale_weights<S: Simd>(
        &self,
        simd: S,
        head: usize,
        first: usize,
        count: usize,
        weights: &mut [[f32; BLOCK]],
        sums: &mut [[f32; BLOCK]],
    ) {
        let int4 = self.format == ValueFormat::Int4;
        let rows = self.rows(head, first, count).0.chunks_exact(self.row);
        let (mut scales, mut minima) = ([0.0; BLOCK], [0.0; BLOCK]);
        if int4 {
            // A row ends in both.
            let mut pairs = [[0; 4]; BLOCK];
            for (pair, row) in pairs.iter_mut().zip(rows) {
                *pair = *row.last_chunk().unwrap_or(&[0; 4]);
            }
            let halves: &[[u8; 2 * BLOCK]; 2] = bytemuck::cast_ref(&pairs);
            let mut both = [[0.0; BLOCK]; 2];
            for (both, halves) in both.iter_mut().zip(halves) {
                for i in 0..BLOCK / S::LANES {
                    simd.store(both, i, simd.load_f16(halves, i));
                }
            }
            [scales, minima] = pairs_apart(simd, &both);
        } else {
            let mut halves = [[0; 2]; BLOCK];
            for (half, row) in halves.iter_mut().zip(rows) {
                *half = *row.last_chunk().unwrap_or(&[0; 2]);
            }
            let halves: &[u8; 2 * BLOCK] = bytemuck::cast_ref(&halves);
            for i in 0..BLOCK / S::LANES {
                simd.store(&mut scales, i, simd.load_f16(halves, i));
            }
        }
        let width = sums.len() / weights.len();
        for (weights, sums) in weights.iter_mut().zip(sums.chunks_exact_mut(width)) {
            let to_all = &mut sums[width - 1];
            for i in 0..BLOCK / S::LANES {
                let weight = simd.load(weights, i);
                if int4 {
                    let minimum = simd.load(&minima, i);
                    simd.store(to_all, i, simd.fma(weight, minimum, simd.load(to_all, i)));
                }
                simd.store(weights, i, simd.mul(weight, simd.load(&scales, i)));
            }
        }
    }

    /// Decodes `count` values from position `first` on, which are of one piece, into
    /// `[count, blocks]`.
    #[inline(always)]
    pub(super) fn decode<S: Simd>(
        &self,
        simd: S,
        head: usize,
        first: usize,
        count: usize,
        out: &mut [[f32; BLOCK]],
    ) {
        let (rows, _) = self.rows(head, first, count);
        let blocks = self.head_dim.div_ceil(BLOCK);
        for (row, out) in rows.chunks_exact(self.row).zip(out.chunks_exact_mut(blocks)) {
            if self.format == ValueFormat::Int8 {
                let scale = simd.splat_f16(half_at(row, self.head_dim));
                let row = Row::<Signed8>::new(&row[..self.head_dim], &[]);
                row.scale_all(simd, scale, simd.splat(0.0), out);
            } else {
                let bytes = self.head_dim.div_ceil(2);
                let scale = simd.splat_f16(half_at(row, bytes));
                let minimum = simd.splat_f16(half_at(row, bytes + 2));
                Row::<Unsigned4>::new(&row[..bytes], &[]).scale_all(simd, scale, minimum, out);
            }
        }
    }
}

/// The bits of the `f16` at byte `at`.
#[inline(always)]
fn half_at(row: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([row[at], row[at + 1]])
}

/// Encodes a row with the bits of [`encode_value`](crate::delta::encode_value).
pub(super) struct Quantise<'a> {
    pub(super) format: ValueFormat,
    /// `[D]`.
    pub(super) row: Blocks<'a>,
    /// The bytes of the row.
    pub(super) place: &'a mut [u8],
}

impl Kernel for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { format, row, place } = self;
        let head_dim = row.width();
        // What pads the last block is no element.
        let ends = |row: &[f32; BLOCK], len: usize| {
            let bounds = (f32::INFINITY, f32::NEG_INFINITY);
            row[..len].iter().fold(bounds, |(low, high), &v| (low.min(v), high.max(v)))
        };
        let (mut low, mut high) = (simd.splat(f32::INFINITY), simd.splat(f32::NEG_INFINITY));
        // Nothing but what is not finite makes a sum of zeros anything else.
        let (zero, mut zeros) = (simd.splat(0.0), simd.splat(0.0));
        for block in 0..head_dim / BLOCK {
            for i in 0..BLOCK / S::LANES {
                let v = row.load(simd, block, i);
                (low, high) = (simd.min(low, v), simd.max(high, v));
                zeros = simd.fma(v, zero, zeros);
            }
        }
        let last = &row.get(head_dim / BLOCK)[..head_dim % BLOCK];
        let finite = simd.sum(zeros) == 0.0 && last.iter().all(|v| v.is_finite());
        let scaled = |scale: f32| if finite { f16::from_f32(scale) } else { f16::NAN };
        let mut lanes = [[0.0; BLOCK]; 2];
        simd.store(&mut lanes[0], 0, low);
        simd.store(&mut lanes[1], 0, high);
        let (low, high) = (ends(&lanes[0], S::LANES).0, ends(&lanes[1], S::LANES).1);
        let rest = ends(row.get(head_dim / BLOCK), head_dim % BLOCK);
        let (low, high) = (low.min(rest.0), high.max(rest.1));

        let (top, bottom, minimum, scale) = match format {
            ValueFormat::Int4 => {
                let minimum = f16::from_f32(low);
                let scale = scaled((high - minimum.to_f32()) * (1.0 / 15.0));
                (15.0, 0.0, minimum, scale)
            }
            _ => {
                let scale = scaled(high.max(-low).abs() * (1.0 / 127.0));
                (127.0, -127.0, f16::ZERO, scale)
            }
        };
        // Correctly rounded, a quotient is halfway between two levels only where `v` is: a level and
        // a half has few bits. Whatever is divided by infinity is level 0.
        let divisor = if scale > f16::ZERO { scale.to_f32() } else { f32::INFINITY };
        let minimum_all = simd.splat(minimum.to_f32());
        let (divisor, top, bottom) = (simd.splat(divisor), simd.splat(top), simd.splat(bottom));
        let int4 = format == ValueFormat::Int4;
        let bytes = if int4 { head_dim.div_ceil(2) } else { head_dim };
        let (place, scales) = place.split_at_mut(bytes);
        for (block, place) in place.chunks_mut(if int4 { BLOCK / 2 } else { BLOCK }).enumerate() {
            let mut levels = [0; BLOCK];
            for i in 0..BLOCK / S::LANES {
                let v = simd.div(simd.sub(row.load(simd, block, i), minimum_all), divisor);
                simd.store_i8(&mut levels, i, simd.min(top, simd.max(bottom, v)));
            }
            if int4 {
                // Beyond an odd row's end.
                levels[(head_dim - block * BLOCK).min(BLOCK)..].fill(0);
                let pairs = levels.as_chunks::<2>().0;
                for (place, [low, high]) in place.iter_mut().zip(pairs) {
                    *place = *low as u8 | (*high as u8) << 4;
                }
            } else {
                copy(bytemuck::cast_ref(&levels), place);
            }
        }
        scales[..2].copy_from_slice(&scale.to_le_bytes());
        if int4 {
            scales[2..].copy_from_slice(&minimum.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Kernels, Level};
    use super::*;
    use crate::backend::{AttentionShape, CacheFormat};
    use crate::delta::{AttentionPolicy, decode_value, encode_value};
    use crate::sampler::Draws;

    struct Decode<'a>(&'a Quantised, usize, usize, &'a mut [[f32; BLOCK]]);

    impl Kernel for Decode<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            self.0.decode(simd, 1, self.1, self.2, self.3);
        }
    }

    #[test]
    fn values_have_the_bits_that_every_device_gives_them() {
        let exact = CacheFormat::F16;
        let mut draws = Draws::new(11);
        for (format, head_dim) in [ValueFormat::Int8, ValueFormat::Int4]
            .into_iter()
            .flat_map(|format| [2, 31, 64, 80, 128].map(|head_dim| (format, head_dim)))
        {
            let policy = AttentionPolicy { values: format, ..AttentionPolicy::dense() };
            let attention = AttentionShape { heads: 2, kv_heads: 2, head_dim };
            let shape = CacheShape { attention, context: 700, rows: 600, policy, thresholds: None };
            for kernels in Kernels::available() {
                let level = Level::new(kernels).expect("available");
                let mut cache = Quantised::new(&shape);
                let mut want = Vec::new();
                let mut position = 0;
                // Within a piece, over its end, and over a whole one.
                for rows in [1, 254, 3, 300] {
                    for (head, places) in cache.append(position, rows).into_iter().enumerate() {
                        for (n, place) in places.into_iter().enumerate() {
                            let scale = [0.0, 1e-7, 1.0, 3e4][n % 4] * (1 + head) as f32;
                            let shift = [0.5, 0.0, 1.0][n % 3];
                            let row: Vec<f32> = (0..head_dim)
                                .map(|_| scale * (draws.draw() - shift) + 0.0)
                                .collect();
                            // In f16, exact ties between levels are common.
                            let row: Vec<f32> = match n % 2 {
                                0 => row,
                                _ => row.iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
                            };
                            let mut bytes = Vec::new();
                            encode_value(format, exact, &row, &mut bytes);
                            level.run(Quantise { format, row: Blocks::new(&row), place });
                            assert_eq!(place, bytes, "{format:?} {kernels:?} {row:?}");
                            if head == 1 {
                                want.push(bytes);
                            }
                        }
                    }
                    position += rows;
                }
                let blocks = head_dim.div_ceil(BLOCK);
                for (first, count) in [(0, 32), (224, 32), (256, 20), (511, 1)] {
                    let mut out = vec![[0.0; BLOCK]; count * blocks];
                    level.run(Decode(&cache, first, count, &mut out));
                    for (n, out) in (first..).zip(out.chunks_exact(blocks)) {
                        let mut row = vec![0.0; head_dim];
                        assert_eq!(cache.row(1, n), want[n]);
                        decode_value(format, exact, &want[n], &mut row);
                        assert_eq!(out.as_flattened()[..head_dim], row, "{format:?} {kernels:?}");
                    }
                }
            }
        }
    }
}
