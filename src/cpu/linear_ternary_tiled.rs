//! Ternary weights times the activations of many tokens, in a unit for tiles; exact as in
//! [`super::linear_ternary`].
//!
//! A strip is sixteen packed rows, 64 output rows. Its weights are spread to a byte each, a part of
//! [`FIXED_COLS`] at a time, 32 KiB near the processor, and all tokens pass by it.

use super::simd::{Kernel, Simd, TILE_COLS, TILE_ROWS, Tile, TileProducts, TileSums, TileUnit};
use super::tensor::Aligned;
use super::tiled::{PART_TILES, TileGroups};
use crate::backend::FIXED_COLS;

/// Packed rows of a strip.
pub(super) const STRIP_ROWS: usize = TILE_ROWS;

/// Tokens from which the unit is faster than vectors: it takes [`TILE_ROWS`] twice at once.
pub(super) const TOKENS: usize = 16;

/// One strip.
pub(super) struct TiledProduct<'a> {
    pub(super) unit: TileUnit,
    /// `[rows, cols]`, four output rows in a byte.
    pub(super) packed: &'a [u8],
    pub(super) cols: usize,
    pub(super) scale: f32,
    /// An even number of groups.
    pub(super) x: TileGroups<'a>,
    /// `[T]`.
    pub(super) x_scales: &'a [f32],
    /// `[T, 4]` slices of `rows`; those of the last fields may be shorter.
    pub(super) out: Vec<&'a mut [f32]>,
    pub(super) add: bool,
    pub(super) scratch: &'a mut Aligned<f32>,
}

impl Kernel for TiledProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let Self { unit, packed, cols, scale, x, x_scales, out, add, scratch } = self;
        let rows = packed.len() / cols.max(1);
        let groups = x.groups();
        let tile = size_of::<Tile>() / size_of::<f32>();
        scratch.grow(tile * (4 * PART_TILES + 4 * groups));
        let (tiles, sums) = scratch.split_at_mut(tile * 4 * PART_TILES);
        let tiles: &mut [Tile] = bytemuck::cast_slice_mut(tiles);
        // `[group, field]`, each `[row, token]`.
        let sums: &mut [TileSums] = bytemuck::cast_slice_mut(&mut sums[..tile * 4 * groups]);
        let sums = sums.as_chunks_mut::<4>().0;
        sums.fill([[[0; TILE_ROWS]; TILE_ROWS]; 4]);
        let mut products = TileProducts::ZERO;
        let tiles_of_unit = unit.begin();
        for part in 0..cols.div_ceil(FIXED_COLS) {
            let start = part * FIXED_COLS;
            let len = FIXED_COLS.min(cols - start);
            let count = len.div_ceil(TILE_COLS);
            for row in 0..rows {
                spread(row, &packed[row * cols + start..][..len], tiles);
            }
            let fields: [&[Tile]; 4] = std::array::from_fn(|f| &tiles[f * PART_TILES..][..count]);
            for group in (0..groups).step_by(2) {
                let x = [x.of(group, part, 0, count), x.of(group + 1, part, 0, count)];
                for pair in [0, 2] {
                    tiles_of_unit.multiply([fields[pair], fields[pair + 1]], x, &mut products);
                    for field in 0..2 {
                        for i in 0..2 {
                            add_sums(&mut sums[group + i][pair + field], &products.0[field][i]);
                        }
                    }
                }
            }
        }
        drop(tiles_of_unit);
        for (i, out) in out.into_iter().enumerate() {
            let (token, field) = (i / 4, i % 4);
            let scale = x_scales[token] * scale;
            let sums = &sums[token / TILE_ROWS][field];
            for (out, sums) in out.iter_mut().zip(sums) {
                let y = sums[token % TILE_ROWS] as f32 * scale;
                *out = if add { *out + y } else { y };
            }
        }
    }
}

/// Spreads a part of a packed row: its four fields are the rows `row` of as many groups of tiles.
/// Beyond its end activations are zero, and what is in the tiles does not matter.
#[inline(always)]
fn spread(row: usize, packed: &[u8], tiles: &mut [Tile]) {
    for (tile, packed) in packed.chunks(TILE_COLS).enumerate() {
        let mut block = [0; TILE_COLS];
        block[..packed.len()].copy_from_slice(packed);
        for field in 0..4 {
            let weights = &mut tiles[field * PART_TILES + tile][row];
            for (weight, byte) in weights.iter_mut().zip(block) {
                // A field holds weight + 1.
                *weight = (byte >> (2 * field) & 0b11) as i8 - 1;
            }
        }
    }
}

#[inline(always)]
fn add_sums(sums: &mut TileSums, products: &TileSums) {
    for (sums, products) in sums.iter_mut().zip(products) {
        for (sum, product) in sums.iter_mut().zip(products) {
            *sum += product;
        }
    }
}
