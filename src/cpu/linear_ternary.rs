//! Ternary weights times 8-bit activations, with exact sums.
//!
//! The packed layout of [`crate::checkpoint::MatrixSource`] suits vectors as it is: 64 bytes of a
//! packed row are 64 columns of four output rows, so that a load, four masks and four dot products
//! with the same 64 activations make 256 products. The matrix is used where it lies in the file.
//!
//! Processors with a unit for tiles multiply many tokens in [`super::linear_ternary_tiled`].
//!
//! A field holds weight + 1, so that the sum of the activations is subtracted in the end.

use std::array::from_ref;

use super::linear_ternary_tiled::{self, TiledProduct};
use super::reading::{Reading, ask_near, side_by_side};
use super::simd::{Kernel, Simd, TERNARY_BLOCK};
use super::strips::{Strip, cut};
use super::tensor::Tensor;
use super::tiled::TokenTiles;
use super::{Machine, Matrix, Scratch};

/// Bytes of packed weights in a strip: they stay in the cache while tokens pass by.
const STRIP_BYTES: usize = 48 * 1024;

/// `out = x W^T` or `out += x W^T`; see [`crate::backend::Operations::linear`].
pub(super) fn linear(
    machine: &Machine,
    (scratch, tiles): (&Scratch, &mut TokenTiles),
    x: &Tensor,
    parts: &[Matrix],
    out: &mut Tensor,
    add: bool,
) {
    let (tokens, cols) = (x.rows(), x.width());
    let x = x.int8();
    // The four fields of each matrix.
    let mut pieces = Vec::with_capacity(4 * parts.len());
    for part in parts {
        assert_eq!(part.cols, cols, "input width");
        let quarter = part.rows.div_ceil(4);
        pieces.extend((0..4).map(|field| part.rows.saturating_sub(field * quarter).min(quarter)));
    }
    let packed_rows: usize = pieces.iter().step_by(4).sum();
    let small = packed_rows * cols * tokens < 8 * 1024;
    let x_scales = &x.scales[..tokens];
    if let (true, Some(unit)) = (tokens >= linear_ternary_tiled::TOKENS, machine.level.tiles()) {
        let strip = linear_ternary_tiled::STRIP_ROWS;
        let strips = cut(out.floats_mut(), tokens, &pieces, 4, |_| strip);
        let x = tiles.of_bytes(machine, x, tokens, cols);
        machine.each_of(small, strips, |worker, Strip { piece, first, columns: out }| {
            let (part, scratch) = (&parts[piece / 4], &mut *scratch.of(worker));
            let packed = &part.values[first * cols..][..out[0].len() * cols];
            let scale = part.scale;
            let product =
                TiledProduct { unit, packed, cols, scale, x, x_scales, out, add, scratch };
            machine.level.run(product);
        });
        return;
    }
    let height = machine.strip_height(packed_rows, cols, tokens, STRIP_BYTES);
    let strips = cut(out.floats_mut(), tokens, &pieces, 4, |_| height);
    machine.each_of(small, strips, |_worker, Strip { piece, first, columns }| {
        let part = &parts[piece / 4];
        let rows = columns[0].len();
        machine.level.run(Product {
            packed: &part.values[first * cols..][..rows * cols],
            cols,
            scale: part.scale,
            x: &x.values[..tokens * cols],
            x_scales,
            x_sums: &x.sums[..tokens],
            out: columns,
            add,
            reading: machine.reading,
        });
    });
}

/// One strip.
struct Product<'a> {
    /// `[rows, cols]`, four output rows in a byte.
    packed: &'a [u8],
    cols: usize,
    scale: f32,
    /// `[T, cols]`.
    x: &'a [i8],
    /// `[T]`.
    x_scales: &'a [f32],
    /// `[T]`.
    x_sums: &'a [i32],
    /// `[T, 4]` slices of `rows`; those of the last fields may be shorter.
    out: Vec<&'a mut [f32]>,
    add: bool,
    reading: Reading,
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let (tokens, rows) = (self.x_scales.len(), self.packed.len() / self.cols);
        let mut token = 0;
        // A tile of tokens stays in the nearest cache while the strip's rows pass by.
        while S::TILE >= 4 && tokens - token >= 4 {
            for row in 0..rows {
                self.tile::<S, 1, 4>(simd, [row], token);
            }
            token += 4;
        }
        while tokens - token >= 2 {
            for row in 0..rows {
                self.tile::<S, 1, 2>(simd, [row], token);
            }
            token += 2;
        }
        if token < tokens {
            match self.reading.rows::<S>() {
                4 => self.one_token::<S, 4>(simd, token),
                2 => self.one_token::<S, 2>(simd, token),
                _ => self.one_token::<S, 1>(simd, token),
            }
        }
    }
}

impl Product<'_> {
    /// All packed rows times one token, `R` of them at once.
    #[inline(always)]
    fn one_token<S: Simd, const R: usize>(&mut self, simd: S, token: usize) {
        let rows = self.packed.len() / self.cols;
        let whole = rows / R * R;
        for group in 0..whole / R {
            let group = std::array::from_fn(|r| side_by_side::<R>(whole, group, r));
            self.tile::<S, R, 1>(simd, group, token);
        }
        for row in whole..rows {
            self.tile::<S, 1, 1>(simd, [row], token);
        }
    }

    /// `R` packed rows times `T` tokens.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const T: usize>(
        &mut self,
        simd: S,
        rows: [usize; R],
        token: usize,
    ) {
        let cols = self.cols;
        let packed = rows.map(|row| self.packed[row * cols..][..cols].as_chunks::<TERNARY_BLOCK>());
        let x: [_; T] = std::array::from_fn(|t| {
            self.x[(token + t) * cols..][..cols].as_chunks::<TERNARY_BLOCK>()
        });
        let blocks = cols / TERNARY_BLOCK;
        // Slices of equal length, and known to be so: the loop below checks no index.
        let whole_packed = packed.map(|packed| &packed.0[..blocks]);
        let whole_x: [_; T] = std::array::from_fn(|t| &x[t].0[..blocks]);
        let mut totals = [[[0i32; 4]; T]; R];
        let mut start = 0;
        while start < blocks {
            let end = blocks.min(start + S::DOT_BLOCKS.min(blocks));
            let mut sums = [[[simd.no_sums(); 4]; T]; R];
            for block in start..end {
                let x: [_; T] = std::array::from_fn(|t| &whole_x[t][block]);
                for r in 0..R {
                    let packed = &whole_packed[r][block];
                    if R > 1 {
                        ask_near(simd, from_ref(packed));
                    }
                    multiply(simd, packed, x, &mut sums[r]);
                }
            }
            for r in 0..R {
                add_totals(simd, &sums[r], &mut totals[r]);
            }
            start = end;
        }
        if !cols.is_multiple_of(TERNARY_BLOCK) {
            // Activations of zero beyond the end: what the weights are there does not matter.
            let x: [_; T] = std::array::from_fn(|t| padded(x[t].1));
            for r in 0..R {
                let mut sums = [[simd.no_sums(); 4]; T];
                multiply(simd, &padded(packed[r].1), x.each_ref(), &mut sums);
                add_totals(simd, &sums, &mut totals[r]);
            }
        }
        for (row, totals) in rows.into_iter().zip(totals) {
            for (t, totals) in totals.into_iter().enumerate() {
                let token = token + t;
                let scale = self.x_scales[token] * self.scale;
                for (field, total) in totals.into_iter().enumerate() {
                    if let Some(out) = self.out[4 * token + field].get_mut(row) {
                        let y = (total - self.x_sums[token]) as f32 * scale;
                        *out = if self.add { *out + y } else { y };
                    }
                }
            }
        }
    }
}

/// Adds the products of one block.
#[inline(always)]
fn multiply<S: Simd, const T: usize>(
    simd: S,
    packed: &[u8; TERNARY_BLOCK],
    x: [&[i8; TERNARY_BLOCK]; T],
    sums: &mut [[S::Sums; 4]; T],
) {
    for i in 0..TERNARY_BLOCK / S::BYTES {
        let fields = simd.fields(packed, i);
        for t in 0..T {
            let x = simd.bytes(x[t], i);
            for field in 0..4 {
                sums[t][field] = simd.dot(sums[t][field], fields[field], x);
            }
        }
    }
}

#[inline(always)]
fn add_totals<S: Simd, const T: usize>(
    simd: S,
    sums: &[[S::Sums; 4]; T],
    totals: &mut [[i32; 4]; T],
) {
    for t in 0..T {
        let four = simd.total4(sums[t]);
        for field in 0..4 {
            totals[t][field] += four[field] >> S::FIELD_SHIFTS[field];
        }
    }
}

/// A block that ends in zeros.
fn padded<N: Copy + Default>(rest: &[N]) -> [N; TERNARY_BLOCK] {
    let mut block = [N::default(); TERNARY_BLOCK];
    block[..rest.len()].copy_from_slice(rest);
    block
}
