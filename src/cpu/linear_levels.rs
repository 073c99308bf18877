//! 8- and 4-bit weights times activations, in fixed point.
//!
//! Activations become integers of 16 bits (see [`super::fixed`]), whose products take half the
//! instructions of floats, or less.
//!
//! - A few tokens should be bound by memory: weights are used as they are, a block's sum is exact
//!   and then meets its scale.
//! - With many tokens that would be one scaling for each two products of vectors. So the weights of
//!   [`FIXED_COLS`] columns of a row, which have scales of their own, are brought to a common one
//!   first, in 12 bits: with those, the sums of vectors still fit 32 bits. A strip of rows is brought
//!   there once, and all tokens pass by it. See [`super::linear_levels_tiled`] for processors with a unit
//!   for that.
//!
//! What either costs in accuracy is in [`crate::backend::Backend::fixed_point`].

use std::marker::PhantomData;

use half::f16;

use super::fixed::{FIXED_BLOCKS, FIXED_GROUP, Fixed, FixedRows};
use super::linear_levels_tiled::{self, TiledProduct};
use super::reading::{Reading, ask_ahead, ask_near, crowds, side_by_side};
use super::simd::{BLOCK, Kernel, Simd};
use super::strips::Strip;
use super::tensor::{Aligned, Tensor};
use super::tiled::TokenTiles;
use super::weights::{Levels, Levels4, Levels8, Row};
use super::{Machine, Matrix, Scratch};
use crate::backend::{ACTIVATION_STEP, FIXED_COLS, FIXED_TOKENS, MatrixFormat, WEIGHT_STEP};

/// Rows of a strip that many tokens pass by: 32 KiB of words, near the processor.
const STRIP_ROWS: usize = 32;

/// As many blocks as a vector has lanes bring this many products to each lane: their sum fits.
const _: () =
    assert!(BLOCK as f64 <= i32::MAX as f64 * WEIGHT_STEP as f64 * ACTIVATION_STEP as f64);

/// Whether a step of `tokens` is multiplied here.
pub(super) fn takes(machine: &Machine, format: MatrixFormat, tokens: usize) -> bool {
    let levels = matches!(format, MatrixFormat::Q8 | MatrixFormat::Q4);
    levels && (tokens < FIXED_TOKENS || machine.level.has_fast_words())
}

/// `out = x W^T` or `out += x W^T`; see [`crate::backend::Operations::linear`].
pub(super) fn linear(
    machine: &Machine,
    (scratch, fixed, tiles): (&Scratch, &mut Fixed, &mut TokenTiles),
    x: &Tensor,
    parts: &[Matrix],
    out: &mut Tensor,
    add: bool,
) {
    let many = x.rows() >= FIXED_TOKENS;
    if let (true, Some(unit)) = (many, machine.level.tiles()) {
        let (tokens, cols) = (x.rows(), x.width());
        let (strips, small) =
            machine.product_strips(x, parts, out, Some(linear_levels_tiled::STRIP_ROWS));
        let scales = fixed.round(machine, x, false);
        let x = tiles.of_words(machine, scales, tokens, cols);
        machine.each_of(small, strips, |worker, Strip { piece, first, columns: out }| {
            let (matrix, scratch) = (&parts[piece], &mut *scratch.of(worker));
            machine.level.run(TiledProduct { unit, matrix, first, scales, x, out, add, scratch });
        });
        return;
    }
    let many = many.then_some(STRIP_ROWS);
    let (strips, small) = machine.product_strips(x, parts, out, many);
    let apart = many.is_none() && parts.iter().any(|part| part.format == MatrixFormat::Q4);
    let x = fixed.round(machine, x, apart && Levels4::APART);
    machine.each_of(small, strips, |worker, Strip { piece, first, columns }| {
        let matrix = &parts[piece];
        let scratch = &mut scratch.of(worker);
        let reading = machine.reading;
        let product = Product { matrix, first, x, out: columns, add, reading, scratch };
        match matrix.format {
            MatrixFormat::Q8 => machine.level.run(Typed::<Levels8>(product, PhantomData)),
            MatrixFormat::Q4 => machine.level.run(Typed::<Levels4>(product, PhantomData)),
            format => panic!("{format:?} weights have no levels"),
        }
    });
}

/// One strip.
struct Product<'a> {
    matrix: &'a Matrix,
    /// The strip's first row.
    first: usize,
    x: FixedRows<'a>,
    /// `[T]` slices of the strip's rows.
    out: Vec<&'a mut [f32]>,
    add: bool,
    reading: Reading,
    scratch: &'a mut Aligned<f32>,
}

/// One strip of weights `W`.
struct Typed<'a, W>(Product<'a>, PhantomData<W>);

impl<W: Levels> Kernel for Typed<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut product = self.0;
        let tokens = product.out.len();
        if tokens >= FIXED_TOKENS {
            return product.many::<S, W>(simd);
        }
        let mut token = 0;
        while token < tokens {
            let tile = (tokens - token).min(S::TILE).min(4);
            match (tile, product.reading.rows::<S>()) {
                (4, _) => product.few::<S, W, 1, 4>(simd, token),
                (3, _) => product.few::<S, W, 1, 3>(simd, token),
                (2, _) => product.few::<S, W, 1, 2>(simd, token),
                (_, 4) => product.few::<S, W, 4, 1>(simd, token),
                (_, 2) => product.few::<S, W, 2, 1>(simd, token),
                _ => product.few::<S, W, 1, 1>(simd, token),
            }
            token += tile;
        }
    }
}

impl Product<'_> {
    /// All rows times `T` tokens, `R` rows at once, which is 1, 2 or 4.
    #[inline(always)]
    fn few<S: Simd, W: Levels, const R: usize, const T: usize>(&mut self, simd: S, token: usize) {
        let rows = self.out.first().map_or(0, |out| out.len());
        let whole = rows / 4 * 4;
        for four in 0..whole / 4 {
            let rows =
                std::array::from_fn(|i| side_by_side::<R>(whole, four * (4 / R) + i / R, i % R));
            self.four::<S, W, R, T>(simd, token, rows, 4);
        }
        if whole < rows {
            let last = std::array::from_fn(|i| (whole + i).min(rows - 1));
            self.four::<S, W, 1, T>(simd, token, last, rows - whole);
        }
    }

    /// The first `count` of four rows, a multiple of `R`.
    #[inline(always)]
    fn four<S: Simd, W: Levels, const R: usize, const T: usize>(
        &mut self,
        simd: S,
        token: usize,
        rows: [usize; 4],
        count: usize,
    ) {
        let crowded = R == 1 && crowds(T * self.matrix.cols * size_of::<i16>());
        let x: [_; T] = std::array::from_fn(|t| self.x.row(token + t));
        let mut totals = [[simd.splat(0.0); 4]; T];
        for first in (0..count).step_by(R) {
            let weights: [_; R] = std::array::from_fn(|r| {
                let row = self.first + rows[first + r];
                Row::<W>::new(self.matrix.row(row), self.matrix.row_scales(row))
            });
            let sums = row_sums::<S, W, R, T>(simd, &weights, x, crowded);
            for r in 0..R {
                for t in 0..T {
                    let [a, b, c, d] = sums[r][t];
                    totals[t][first + r] = simd.add(simd.add(a, b), simd.add(c, d));
                }
            }
        }
        for t in 0..T {
            let out = &mut self.out[token + t];
            for (row, y) in rows.into_iter().zip(simd.sum4(totals[t])).take(count) {
                out[row] = if self.add { out[row] + y } else { y };
            }
        }
    }

    /// All rows times all tokens.
    #[inline(always)]
    fn many<S: Simd, W: Levels>(self, simd: S) {
        let Self { matrix, first, x, out, add, scratch, .. } = self;
        let (tokens, rows) = (out.len(), out.first().map_or(0, |out| out.len()));
        // Rows that make up the last four are zero.
        let height = rows.next_multiple_of(4);
        let words = height * FIXED_COLS * size_of::<i16>() / size_of::<f32>();
        scratch.grow(words + tokens * height);
        let (words, sums) = scratch[..words + tokens * height].split_at_mut(words);
        let words: &mut [i16] = bytemuck::cast_slice_mut(words);
        words.fill(0);
        sums.fill(0.0);
        let mut scales = [0.0; STRIP_ROWS];
        for part in 0..matrix.cols.div_ceil(FIXED_COLS) {
            let start = part * FIXED_COLS;
            let len = FIXED_COLS.min(matrix.cols - start);
            let blocks = len.div_ceil(BLOCK);
            let bytes = |n| matrix.format.bytes_of(n);
            for (r, words) in words.chunks_exact_mut(FIXED_COLS).take(rows).enumerate() {
                let encoded = &matrix.row(first + r)[bytes(start)..][..bytes(len)];
                // What is needed next, while all tokens pass by what is brought here.
                for line in (0..encoded.len()).step_by(64) {
                    simd.prefetch(encoded, encoded.len() + line);
                }
                let row_scales = &matrix.row_scales(first + r)[start / BLOCK..][..blocks];
                let row = Row::<W>::new(encoded, row_scales);
                scales[r] =
                    common_scale(simd, &row, W::LARGEST, WEIGHT_STEP, words.as_chunks_mut().0);
            }
            let words = words.as_chunks::<BLOCK>().0;
            let mut token = 0;
            while token < tokens {
                let tile = if tokens - token >= S::TILE { S::TILE } else { 1 };
                for r in (0..height).step_by(4) {
                    let w = std::array::from_fn(|i| &words[(r + i) * FIXED_BLOCKS..][..blocks]);
                    let mut emit = |t: usize, y: [f32; 4]| {
                        let x_scale = x.scale(token + t, part);
                        let sums = &mut sums[(token + t) * height + r..][..4];
                        for i in 0..4 {
                            sums[i] += y[i] * (scales[r + i] * x_scale);
                        }
                    };
                    let x = |t: usize| &x.blocks(token + t, part)[..blocks];
                    match tile {
                        4 => tile_of::<S, 4>(simd, w, std::array::from_fn(x), &mut emit),
                        2 => tile_of::<S, 2>(simd, w, std::array::from_fn(x), &mut emit),
                        _ => tile_of::<S, 1>(simd, w, std::array::from_fn(x), &mut emit),
                    }
                }
                token += tile;
            }
        }
        for (out, sums) in out.into_iter().zip(sums.chunks_exact(height)) {
            for (out, y) in out.iter_mut().zip(sums) {
                *out = if add { *out + y } else { *y };
            }
        }
    }
}

/// `R` rows times `T` tokens, whose blocks and scales are `x`: four vectors for each to be added up.
#[inline(always)]
fn row_sums<S: Simd, W: Levels, const R: usize, const T: usize>(
    simd: S,
    weights: &[Row<'_, W>; R],
    x: [(&[[i16; BLOCK]], &[f32]); T],
    crowded: bool,
) -> [[[S::Floats; 4]; T]; R] {
    // Four sums a token hide the latency of adding to one.
    let mut sums = [[[simd.splat(0.0); 4]; T]; R];
    let cut: [_; R] = std::array::from_fn(|r| weights[r].whole().as_chunks::<FIXED_BLOCKS>());
    // Slices of equal length, and known to be so: the loop below checks no index.
    let parts = cut[0].0.len();
    let whole: [_; R] = std::array::from_fn(|r| &cut[r].0[..parts]);
    let scales: [_; R] =
        std::array::from_fn(|r| &weights[r].scales().as_chunks::<FIXED_BLOCKS>().0[..parts]);
    let whole_x: [_; T] = std::array::from_fn(|t| {
        let (x, scales) = x[t];
        (&x.as_chunks::<FIXED_BLOCKS>().0[..parts], &scales[..parts])
    });
    for part in 0..parts {
        let raw = std::array::from_fn(|r| whole[r][part].as_chunks().0);
        let scales = std::array::from_fn(|r| &scales[r][part]);
        let x = std::array::from_fn(|t| (&whole_x[t].0[part][..], whole_x[t].1[part]));
        add_part::<S, W, R, T>(simd, raw, scales, x, crowded, &mut sums);
    }
    if !(cut[0].1.is_empty() && weights[0].is_whole()) {
        let blocks = cut[0].1.len() + usize::from(!weights[0].is_whole());
        let last: [_; R] = std::array::from_fn(|r| padded(&weights[r], cut[r].1));
        let raw = std::array::from_fn(|r| &last[r].0.as_chunks().0[..blocks.div_ceil(FIXED_GROUP)]);
        let scales = std::array::from_fn(|r| &last[r].1);
        let x = std::array::from_fn(|t| (&x[t].0[parts * FIXED_BLOCKS..], x[t].1[parts]));
        add_part::<S, W, R, T>(simd, raw, scales, x, crowded, &mut sums);
    }
    sums
}

/// Adds the products of a part of each row.
///
/// Nothing that calls intrinsics stands in a closure here: the compiler does not always inline those of
/// arrays.
#[inline(always)]
fn add_part<S: Simd, W: Levels, const R: usize, const T: usize>(
    simd: S,
    raw: [&[[W::Raw; FIXED_GROUP]]; R],
    scales: [&[f16; FIXED_BLOCKS]; R],
    x: [(&[[i16; BLOCK]], f32); T],
    crowded: bool,
    sums: &mut [[[S::Floats; 4]; T]; R],
) {
    let x_scales = std::array::from_fn(|t| x[t].1);
    let mut products = [[[0.0; BLOCK]; T]; R];
    for r in 0..R {
        products[r] = scale_products(simd, scales[r], x_scales);
    }
    // Slices of equal length, as above.
    let groups = raw[0].len();
    let raw: [_; R] = std::array::from_fn(|r| &raw[r][..groups]);
    let scales: [[_; T]; R] = std::array::from_fn(|r| {
        std::array::from_fn(|t| &products[r][t].as_chunks::<FIXED_GROUP>().0[..groups])
    });
    let x: [_; T] = std::array::from_fn(|t| &x[t].0.as_chunks::<FIXED_GROUP>().0[..groups]);
    for i in 0..groups {
        let x = std::array::from_fn(|t| &x[t][i]);
        for r in 0..R {
            let raw = &raw[r][i];
            if R > 1 {
                ask_near(simd, raw);
            } else if crowded {
                ask_ahead(simd, raw);
            }
            let scales = std::array::from_fn(|t| &scales[r][t][i]);
            W::add(simd, raw, x, scales, &mut sums[r]);
        }
    }
}

/// The last part of a row, which is not whole: its blocks, of which `whole` are, and their scales.
fn padded<W: Levels>(
    weights: &Row<'_, W>,
    whole: &[W::Raw],
) -> ([W::Raw; FIXED_BLOCKS], [f16; FIXED_BLOCKS]) {
    let mut raw = [W::pad(&[]); FIXED_BLOCKS];
    raw[..whole.len()].copy_from_slice(whole);
    if !weights.is_whole() {
        raw[whole.len()] = weights.rest();
    }
    let mut scales = [f16::ZERO; FIXED_BLOCKS];
    let last = &weights.scales()[weights.whole().len() - whole.len()..];
    scales[..last.len()].copy_from_slice(last);
    (raw, scales)
}

/// The products of the scales of a part's blocks with those of each token.
#[inline(always)]
fn scale_products<S: Simd, const T: usize>(
    simd: S,
    weights: &[f16; FIXED_BLOCKS],
    tokens: [f32; T],
) -> [[f32; BLOCK]; T] {
    let mut bits = [0u8; 2 * BLOCK];
    bits[..2 * FIXED_BLOCKS].copy_from_slice(bytemuck::cast_slice(weights));
    let mut products = [[0.0; BLOCK]; T];
    for i in 0..FIXED_BLOCKS / S::LANES {
        let weights = simd.load_f16(&bits, i);
        for t in 0..T {
            simd.store(&mut products[t], i, simd.mul(weights, simd.splat(tokens[t])));
        }
    }
    products
}

/// Writes weights of a part as words of one scale, the largest as `1 / step`, and gives the scale: NaN
/// where one is not finite.
#[inline(always)]
pub(super) fn common_scale<S: Simd, W: Levels>(
    simd: S,
    row: &Row<'_, W>,
    largest_level: f32,
    step: f32,
    words: &mut [[i16; BLOCK]],
) -> f32 {
    // Magnitudes are in the order of their bits, NaN beyond all.
    let magnitudes = row.scales().iter().map(|scale| scale.to_bits() & 0x7fff);
    let largest = largest_level * f16::from_bits(magnitudes.max().unwrap_or(0)).to_f32();
    if largest == 0.0 {
        words.fill([0; BLOCK]);
        return 0.0;
    }
    let scale = largest * step;
    let rest = row.rest();
    let blocks = row.whole().iter().chain((!row.is_whole()).then_some(&rest));
    for (block, (raw, words)) in blocks.zip(words).enumerate() {
        let per_level = simd.mul(simd.splat_f16(row.scale(block)), simd.splat(1.0 / scale));
        for i in 0..BLOCK / S::LANES {
            simd.store_i16(words, i, simd.mul(W::level(simd, raw, i), per_level));
        }
    }
    // Infinity times zero is NaN, so that it does not become a number of levels.
    scale + 0.0 * largest
}

/// Gives `emit` the sums of four rows for each of `T` tokens.
#[inline(always)]
fn tile_of<S: Simd, const T: usize>(
    simd: S,
    w: [&[[i16; BLOCK]]; 4],
    x: [&[[i16; BLOCK]]; T],
    emit: &mut impl FnMut(usize, [f32; 4]),
) {
    let blocks = w[0].len();
    // Slices of equal length, and known to be so: the loop below checks no index.
    let w = w.map(|w| &w[..blocks]);
    let x = x.map(|x| &x[..blocks]);
    let mut totals = [[simd.splat(0.0); 4]; T];
    for start in (0..blocks).step_by(S::LANES) {
        let mut sums = [[simd.no_ints(); 4]; T];
        for block in start..blocks.min(start + S::LANES) {
            let x: [_; T] = std::array::from_fn(|t| simd.words(&x[t][block]));
            for r in 0..4 {
                let w = simd.words(&w[r][block]);
                for t in 0..T {
                    sums[t][r] = simd.dot_words(sums[t][r], w, x[t]);
                }
            }
        }
        for t in 0..T {
            for r in 0..4 {
                totals[t][r] = simd.add(totals[t][r], simd.floats(sums[t][r]));
            }
        }
    }
    for t in 0..T {
        emit(t, simd.sum4(totals[t]));
    }
}
