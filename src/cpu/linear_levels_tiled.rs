//! 8- and 4-bit weights times the activations of many tokens, in a unit for tiles.
//!
//! As in [`super::linear_levels`] weights of [`FIXED_COLS`] columns are brought to a common scale, but in
//! 16 bits, as activations are: the unit multiplies bytes, so that either is two, and a product four.
//! Sums of a part are exact.

use super::Matrix;
use super::fixed::{FIXED_BLOCKS, FixedRows};
use super::linear_levels::common_scale;
use super::simd::{BLOCK, Kernel, LINE, Simd, TILE_COLS, TILE_ROWS, Tile, TileProducts, TileUnit};
use super::tensor::Aligned;
use super::tiled::{PART_TILES, TileGroups, split};
use super::weights::{Levels, Levels4, Levels8, Row};
use crate::backend::{ACTIVATION_STEP, FIXED_COLS, MatrixFormat};

/// Rows of a strip: 32 KiB of tiles, near the processor.
pub(super) const STRIP_ROWS: usize = 2 * TILE_ROWS;

/// The step of weights.
const STEP: f32 = ACTIVATION_STEP;

/// Sums of products of bytes, two of which are added, are floats without rounding.
const _: () = assert!(2 * 128 * 128 * FIXED_COLS <= 1 << 24);

/// One strip.
pub(super) struct TiledProduct<'a> {
    pub(super) unit: TileUnit,
    pub(super) matrix: &'a Matrix,
    /// The strip's first row.
    pub(super) first: usize,
    /// The scales of activations, and what they scale.
    pub(super) scales: FixedRows<'a>,
    pub(super) x: TileGroups<'a>,
    /// `[T]` slices of the strip's rows.
    pub(super) out: Vec<&'a mut [f32]>,
    pub(super) add: bool,
    pub(super) scratch: &'a mut Aligned<f32>,
}

impl Kernel for TiledProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.matrix.format {
            MatrixFormat::Q8 => self.multiply::<S, Levels8>(simd),
            MatrixFormat::Q4 => self.multiply::<S, Levels4>(simd),
            format => panic!("{format:?} weights have no levels"),
        }
    }
}

impl TiledProduct<'_> {
    #[inline(always)]
    fn multiply<S: Simd, W: Levels>(self, simd: S) {
        let Self { unit, matrix, first, scales: x_scales, x, out, add, scratch } = self;
        let (tokens, rows) = (out.len(), out.first().map_or(0, |out| out.len()));
        let (groups, row_groups) = (x.groups(), rows.div_ceil(TILE_ROWS));
        let tile = size_of::<Tile>() / size_of::<f32>();
        scratch.grow(tile * row_groups * (2 * PART_TILES + groups));
        let (tiles, sums) = scratch.split_at_mut(tile * row_groups * 2 * PART_TILES);
        let tiles: &mut [Tile] = bytemuck::cast_slice_mut(tiles);
        // `[row group, group]`, each `[row, token]`.
        let sums: &mut [[[f32; TILE_ROWS]; TILE_ROWS]] =
            bytemuck::cast_slice_mut(&mut sums[..tile * row_groups * groups]);
        sums.fill([[0.0; TILE_ROWS]; TILE_ROWS]);
        let mut scales = [[0.0; TILE_ROWS]; STRIP_ROWS / TILE_ROWS];
        let mut words = [[0; BLOCK]; FIXED_BLOCKS];
        let mut products = TileProducts::ZERO;
        let unit = unit.begin();
        for part in 0..matrix.cols.div_ceil(FIXED_COLS) {
            let start = part * FIXED_COLS;
            let len = FIXED_COLS.min(matrix.cols - start);
            let blocks = len.div_ceil(BLOCK);
            let count = len.div_ceil(TILE_COLS);
            let bytes = |n| matrix.format.bytes_of(n);
            for r in 0..rows {
                let encoded = &matrix.row(first + r)[bytes(start)..][..bytes(len)];
                let row_scales = &matrix.row_scales(first + r)[start / BLOCK..][..blocks];
                let row = Row::<W>::new(encoded, row_scales);
                scales[r / TILE_ROWS][r % TILE_ROWS] =
                    common_scale(simd, &row, W::LARGEST, STEP, &mut words);
                let tiles = &mut tiles[r / TILE_ROWS * 2 * PART_TILES..][..2 * PART_TILES];
                // Beyond the row's end activations are zero, and what is in the tiles does not matter.
                let words = words.as_flattened().as_chunks().0;
                for (tile, words) in words.iter().take(count).enumerate() {
                    let [upper, lower] = split(words);
                    tiles[tile][r % TILE_ROWS] = upper;
                    tiles[PART_TILES + tile][r % TILE_ROWS] = lower;
                }
            }
            let share = rows.div_ceil(groups);
            for group in 0..groups {
                // The next part of some rows: asked for all at once, it would have to be waited for.
                for r in (group * share..rows).take(share) {
                    let next = &matrix.row(first + r)[bytes(start)..];
                    for line in (0..bytes(FIXED_COLS)).step_by(LINE) {
                        simd.prefetch_second(next, bytes(FIXED_COLS) + line);
                    }
                }
                let planes = [0, 1].map(|plane| &x.of(group, part, plane)[..count]);
                let x_scales: [_; TILE_ROWS] = std::array::from_fn(|t| {
                    let token = group * TILE_ROWS + t;
                    if token < tokens { x_scales.scale(token, part) } else { 0.0 }
                });
                for row_group in 0..row_groups {
                    let tiles = &tiles[row_group * 2 * PART_TILES..][..2 * PART_TILES];
                    let weights = [&tiles[..count], &tiles[PART_TILES..][..count]];
                    unit.multiply(weights, planes, &mut products, false);
                    let sums = &mut sums[row_group * groups + group];
                    add_products(&products, &scales[row_group], &x_scales, sums);
                }
            }
        }
        drop(unit);
        let mut out = out;
        for (i, sums) in sums.iter_mut().enumerate() {
            let (row, token) = (i / groups * TILE_ROWS, i % groups * TILE_ROWS);
            simd.transpose(sums);
            for (out, sums) in out.iter_mut().skip(token).zip(sums) {
                for (out, y) in out[row..].iter_mut().zip(sums) {
                    *out = if add { *out + *y } else { *y };
                }
            }
        }
    }
}

/// Adds a part's products of planes of bytes, put together and scaled.
#[inline(always)]
fn add_products(
    products: &TileProducts,
    scales: &[f32; TILE_ROWS],
    x_scales: &[f32; TILE_ROWS],
    sums: &mut [[f32; TILE_ROWS]; TILE_ROWS],
) {
    let [[both_upper, upper_lower], [lower_upper, both_lower]] = &products.0;
    for (row, sums) in sums.iter_mut().enumerate() {
        for (token, sum) in sums.iter_mut().enumerate() {
            let mixed = upper_lower[row][token] + lower_upper[row][token];
            let y = 65536.0 * both_upper[row][token] as f32
                + (256.0 * mixed as f32 + both_lower[row][token] as f32);
            *sum += y * (scales[row] * x_scales[token]);
        }
    }
}
