//! Weights times float activations: float weights, and those of 8 and 4 bits where many tokens pass
//! by them and [`super::linear_levels`] would not be faster.
//!
//! A few tokens are bound by memory: each weight is decoded where it is used, in registers. For
//! more, a strip of rows is decoded once into a buffer that fits the second-level cache, and all
//! tokens pass by it.

use std::marker::PhantomData;

use super::reading::{Reading, ask_ahead, ask_near, crowds, side_by_side};
use super::simd::{BLOCK, Kernel, LINE, Simd};
use super::strips::Strip;
use super::tensor::{Aligned, Tensor};
use super::weights::{BFloat16, Float16, Float32, Levels4, Levels8, Row, Weight};
use super::{Machine, Matrix, Scratch};
use crate::backend::MatrixFormat;

/// Rows of a strip that is decoded.
const DECODED_ROWS: usize = 32;

/// Columns that are decoded at once: a tile of tokens of these keeps its place in the nearest
/// cache while the decoded rows pass by, though widths that are powers of two put all rows into
/// the same few sets of it.
const DECODED_COLS: usize = 512;

/// How far ahead activations are asked for where they do not fit the nearest cache, in bytes.
const X_AHEAD: usize = 1024;

/// Tokens from which decoding ahead pays.
const DECODED_TOKENS: usize = 8;

/// `out = x W^T` or `out += x W^T`; see [`crate::backend::Operations::linear`].
pub(super) fn linear(
    machine: &Machine,
    scratch: &Scratch,
    x: &Tensor,
    parts: &[Matrix],
    out: &mut Tensor,
    add: bool,
) {
    let many = (x.rows() >= DECODED_TOKENS).then_some(DECODED_ROWS);
    let (strips, small) = machine.product_strips(x, parts, out, many);
    machine.each_of(small, strips, |worker, Strip { piece, first, columns }| {
        let product = Product {
            matrix: &parts[piece],
            first,
            x: x.floats(),
            out: columns,
            add,
            reading: machine.reading,
            scratch: &mut scratch.of(worker),
        };
        let level = machine.level;
        match parts[piece].format {
            MatrixFormat::F32 => level.run(Typed::<Float32>(product, PhantomData)),
            MatrixFormat::F16 => level.run(Typed::<Float16>(product, PhantomData)),
            MatrixFormat::BF16 => level.run(Typed::<BFloat16>(product, PhantomData)),
            MatrixFormat::Q8 => level.run(Typed::<Levels8>(product, PhantomData)),
            MatrixFormat::Q4 => level.run(Typed::<Levels4>(product, PhantomData)),
            MatrixFormat::Ternary => panic!("ternary weights multiply Int8 tensors"),
        }
    });
}

/// One strip.
struct Product<'a> {
    matrix: &'a Matrix,
    /// The strip's first row.
    first: usize,
    /// `[T, cols]`.
    x: &'a [f32],
    /// `[T]` slices of the strip's rows.
    out: Vec<&'a mut [f32]>,
    add: bool,
    reading: Reading,
    scratch: &'a mut Aligned<f32>,
}

/// One strip of weights `W`.
struct Typed<'a, W>(Product<'a>, PhantomData<W>);

impl<W: Weight> Kernel for Typed<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Product { matrix, first, x, mut out, add, reading, scratch } = self.0;
        let (cols, tokens) = (matrix.cols, out.len());
        let rows = out.first().map_or(0, |out| out.len());
        if tokens < DECODED_TOKENS {
            let row = |r: usize| Row::<W>::new(matrix.row(first + r), matrix.row_scales(first + r));
            let x = |t: usize| &x[t * cols..][..cols];
            let mut emit = |t: usize, r: usize, y: f32| {
                let out = &mut out[t][r];
                *out = if add { *out + y } else { y };
            };
            let mut token = 0;
            while token < tokens {
                let tile = (tokens - token).min(S::TILE);
                match (tile, reading.rows::<S>()) {
                    (4, _) => few::<S, W, 1, 4>(simd, rows, token, &row, &x, &mut emit),
                    (3, _) => few::<S, W, 1, 3>(simd, rows, token, &row, &x, &mut emit),
                    (2, _) => few::<S, W, 1, 2>(simd, rows, token, &row, &x, &mut emit),
                    (_, 4) => few::<S, W, 4, 1>(simd, rows, token, &row, &x, &mut emit),
                    (_, 2) => few::<S, W, 2, 1>(simd, rows, token, &row, &x, &mut emit),
                    _ => few::<S, W, 1, 1>(simd, rows, token, &row, &x, &mut emit),
                }
                token += tile.min(4);
            }
            return;
        }

        let stride = cols.min(DECODED_COLS).next_multiple_of(BLOCK);
        scratch.grow(rows * (stride + tokens));
        let (decoded, sums) = scratch[..rows * (stride + tokens)].split_at_mut(rows * stride);
        sums.fill(0.0);
        for start in (0..cols).step_by(DECODED_COLS) {
            let len = DECODED_COLS.min(cols - start);
            for (r, decoded) in decoded.chunks_exact_mut(stride).enumerate() {
                let (scales, bytes) = (matrix.row_scales(first + r), |n| matrix.format.bytes_of(n));
                let encoded = &matrix.row(first + r)[bytes(start)..][..bytes(len)];
                // What is needed next, while all tokens pass by what is decoded here.
                for line in (0..encoded.len()).step_by(64) {
                    simd.prefetch(encoded, encoded.len() + line);
                }
                let scales = &scales[(start / BLOCK).min(scales.len())..];
                let row = Row::<W>::new(encoded, scales);
                row.decode(simd, decoded.as_chunks_mut().0);
            }
            // The buffer holds native floats, which `Float32` reads on all little-endian machines.
            let row = |r: usize| {
                let row = &decoded[r * stride..][..len];
                Row::<Float32>::new(bytemuck::cast_slice(row), &[])
            };
            let x = |t: usize| &x[t * cols + start..][..len];
            multiply(simd, rows, tokens, row, x, |t, r, y| sums[t * rows + r] += y);
        }
        for (out, sums) in out.into_iter().zip(sums.chunks_exact(rows)) {
            for (out, y) in out.iter_mut().zip(sums) {
                *out = if add { *out + y } else { *y };
            }
        }
    }
}

#[cfg(target_endian = "big")]
compile_error!("the CPU backend computes on little-endian files as they are");

/// Gives `emit` the products of all `rows` with `T` tokens: token, row, sum. `R` rows are read at once.
#[inline(always)]
fn few<'a, S: Simd, W: Weight + 'a, const R: usize, const T: usize>(
    simd: S,
    rows: usize,
    token: usize,
    row: &impl Fn(usize) -> Row<'a, W>,
    x: &impl Fn(usize) -> &'a [f32],
    emit: &mut impl FnMut(usize, usize, f32),
) {
    let x: [_; T] = std::array::from_fn(|t| x(token + t));
    let whole = rows / R * R;
    for group in 0..whole / R {
        let at: [_; R] = std::array::from_fn(|i| side_by_side::<R>(whole, group, i));
        let group: [_; R] = std::array::from_fn(|i| row(at[i]));
        let sums = row_sums::<S, W, R, T>(simd, &group, x);
        for i in 0..R {
            for t in 0..T {
                emit(token + t, at[i], sums[i][t]);
            }
        }
    }
    for at in whole..rows {
        let [sums] = row_sums::<S, W, 1, T>(simd, &[row(at)], x);
        for t in 0..T {
            emit(token + t, at, sums[t]);
        }
    }
}

/// The products of `R` rows with `T` tokens.
#[inline(always)]
fn row_sums<S: Simd, W: Weight, const R: usize, const T: usize>(
    simd: S,
    rows: &[Row<'_, W>; R],
    x: [&[f32]; T],
) -> [[f32; T]; R] {
    let crowded = R == 1 && crowds(T * size_of_val(x[0]));
    let x: [_; T] = std::array::from_fn(|t| x[t].as_chunks::<BLOCK>());
    // Slices of equal length, and known to be so: the loop below checks no index.
    let blocks = rows[0].whole().len();
    let cut: [_; R] = std::array::from_fn(|r| rows[r].whole()[..blocks].as_chunks::<2>());
    let pairs = blocks / 2;
    let whole: [_; R] = std::array::from_fn(|r| &cut[r].0[..pairs]);
    let whole_x: [_; T] = std::array::from_fn(|t| &x[t].0.as_chunks::<2>().0[..pairs]);
    // Four sums a token hide the latency of adding to one.
    let mut sums = [[[simd.splat(0.0); 4]; T]; R];
    for pair in 0..pairs {
        for r in 0..R {
            let raw = &whole[r][pair];
            if R > 1 {
                ask_near(simd, raw);
            } else if crowded {
                ask_ahead(simd, raw);
                // Twice the bytes of weights of 16 bits: they are worth asking for as well.
                for x in whole_x {
                    let pair: &[u8] = bytemuck::cast_slice(&x[pair]);
                    (0..pair.len()).step_by(LINE).for_each(|at| simd.prefetch(pair, X_AHEAD + at));
                }
            }
            for half in 0..2 {
                let x = std::array::from_fn(|t| &whole_x[t][pair][half]);
                add_block::<S, W, T>(simd, &raw[half], x, half, &mut sums[r]);
            }
        }
    }
    for r in 0..R {
        if let [raw] = cut[r].1 {
            let x = std::array::from_fn(|t| &x[t].0[blocks - 1]);
            add_block::<S, W, T>(simd, raw, x, 0, &mut sums[r]);
        }
        if !rows[r].is_whole() {
            let rest: [_; T] = std::array::from_fn(|t| {
                let mut block = [0.0; BLOCK];
                block[..x[t].1.len()].copy_from_slice(x[t].1);
                block
            });
            add_block::<S, W, T>(simd, &rows[r].rest(), rest.each_ref(), 1, &mut sums[r]);
        }
    }
    let mut totals = [[0.0; T]; R];
    for r in 0..R {
        for t in 0..T {
            totals[r][t] = simd.sum4(sums[r][t]).iter().sum();
        }
    }
    totals
}

/// Adds the products of one block of a row; `half` is 0 and 1 in turn.
#[inline(always)]
fn add_block<S: Simd, W: Weight, const T: usize>(
    simd: S,
    raw: &W::Raw,
    x: [&[f32; BLOCK]; T],
    half: usize,
    sums: &mut [[S::Floats; 4]; T],
) {
    let vectors = BLOCK / S::LANES;
    for i in 0..vectors {
        let w = W::load(simd, raw, 0, i);
        for t in 0..T {
            let sum = &mut sums[t][(half * vectors + i) % 4];
            *sum = simd.fma(w, simd.load(x[t], i), *sum);
        }
    }
}

/// Gives `emit` the product of each of `rows` with each of `tokens`: token, row, sum.
#[inline(always)]
fn multiply<'a, S: Simd, W: Weight + 'a>(
    simd: S,
    rows: usize,
    tokens: usize,
    row: impl Fn(usize) -> Row<'a, W>,
    x: impl Fn(usize) -> &'a [f32],
    mut emit: impl FnMut(usize, usize, f32),
) {
    let mut token = 0;
    // A tile of tokens stays in the nearest cache while the rows pass by.
    while token < tokens {
        let tile = if tokens - token >= S::TILE { S::TILE } else { 1 };
        let mut first = 0;
        while first < rows {
            let height = if rows - first >= 4 { 4 } else { 1 };
            match (height, tile) {
                (4, 4) => tile_of::<S, W, 4, 4>(simd, first, token, &row, &x, &mut emit),
                (4, 2) => tile_of::<S, W, 4, 2>(simd, first, token, &row, &x, &mut emit),
                (4, _) => tile_of::<S, W, 4, 1>(simd, first, token, &row, &x, &mut emit),
                (_, 4) => tile_of::<S, W, 1, 4>(simd, first, token, &row, &x, &mut emit),
                (_, 2) => tile_of::<S, W, 1, 2>(simd, first, token, &row, &x, &mut emit),
                _ => tile_of::<S, W, 1, 1>(simd, first, token, &row, &x, &mut emit),
            }
            first += height;
        }
        token += tile;
    }
}

/// The sums of `R` rows (1 or 4) and `T` tokens.
#[inline(always)]
fn tile_of<'a, S: Simd, W: Weight + 'a, const R: usize, const T: usize>(
    simd: S,
    first: usize,
    token: usize,
    row: &impl Fn(usize) -> Row<'a, W>,
    x: &impl Fn(usize) -> &'a [f32],
    emit: &mut impl FnMut(usize, usize, f32),
) {
    let w: [Row<'a, W>; R] = std::array::from_fn(|r| row(first + r));
    let x: [_; T] = std::array::from_fn(|t| x(token + t).as_chunks::<BLOCK>());
    // Slices of equal length, and known to be so: the loop below checks no index.
    let blocks = w[0].whole().len();
    let whole_w: [_; R] = std::array::from_fn(|r| &w[r].whole()[..blocks]);
    let whole_x: [_; T] = std::array::from_fn(|t| &x[t].0[..blocks]);
    let mut sums = [[simd.splat(0.0); 4]; T];
    for block in 0..blocks {
        let w: [_; R] = std::array::from_fn(|r| (&whole_w[r][block], w[r].scale(block)));
        let x: [_; T] = std::array::from_fn(|t| &whole_x[t][block]);
        multiply_block::<S, W, R, T>(simd, w, x, &mut sums);
    }
    if !w[0].is_whole() {
        let rest: [_; T] = std::array::from_fn(|t| {
            let mut block = [0.0; BLOCK];
            block[..x[t].1.len()].copy_from_slice(x[t].1);
            block
        });
        let raw: [_; R] = std::array::from_fn(|r| w[r].rest());
        let w: [_; R] = std::array::from_fn(|r| (&raw[r], w[r].scale(blocks)));
        multiply_block::<S, W, R, T>(simd, w, rest.each_ref(), &mut sums);
    }
    for (t, &sums) in sums.iter().enumerate() {
        for (r, &sum) in simd.sum4(sums).iter().take(R).enumerate() {
            emit(token + t, first + r, sum);
        }
    }
}

/// Adds the products of one block.
#[inline(always)]
fn multiply_block<S: Simd, W: Weight, const R: usize, const T: usize>(
    simd: S,
    w: [(&W::Raw, u16); R],
    x: [&[f32; BLOCK]; T],
    sums: &mut [[S::Floats; 4]; T],
) {
    for i in 0..BLOCK / S::LANES {
        let mut weights = [simd.splat(0.0); R];
        for r in 0..R {
            weights[r] = W::load(simd, w[r].0, w[r].1, i);
        }
        for t in 0..T {
            let x = simd.load(x[t], i);
            for r in 0..R {
                sums[t][r] = simd.fma(weights[r], x, sums[t][r]);
            }
        }
    }
}
