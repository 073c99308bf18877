//! Ternary weights times the activations of many tokens, in a unit for tiles; exact as in
//! [`super::linear_ternary`].
//!
//! A strip is sixteen packed rows, 64 output rows. Its weights are spread to a byte each, [`COLS`] columns
//! at a time, 16 KiB near the processor, and all tokens pass by them.

use super::simd::{Kernel, LINE, Simd, TILE_COLS, TILE_ROWS, Tile, TileProducts, TileUnit};
use super::tensor::Aligned;
use super::tiled::TileGroups;
use crate::backend::FIXED_COLS;

/// Packed rows of a strip.
pub(super) const STRIP_ROWS: usize = TILE_ROWS;

/// Columns that are spread at once.
const COLS: usize = FIXED_COLS / 2;

/// Tiles of a field of those.
const TILES: usize = COLS / TILE_COLS;

/// Tokens from which the unit is used: it takes [`TILE_ROWS`] twice at once, so that fewer would be padded
/// with as many zeros or more, which is by count still faster than vectors at half of it.
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
    fn run<S: Simd>(self, simd: S) {
        let Self { unit, packed, cols, scale, x, x_scales, out, add, scratch } = self;
        let rows = packed.len() / cols.max(1);
        let groups = x.groups();
        let (tile, four) = (size_of::<Tile>(), size_of::<TileProducts>());
        let floats = |bytes: usize| bytes / size_of::<f32>();
        scratch.grow(floats(4 * TILES * tile + groups * four));
        let (tiles, sums) = scratch.split_at_mut(floats(4 * TILES * tile));
        let tiles: &mut [Tile] = bytemuck::cast_slice_mut(tiles);
        // `[group pair, field pair]`, each `[field, group]`.
        let sums: &mut [TileProducts] =
            bytemuck::cast_slice_mut(&mut sums[..floats(groups * four)]);
        let unit = unit.begin();
        for start in (0..cols).step_by(COLS) {
            let len = COLS.min(cols - start);
            for row in 0..rows {
                spread(row, &packed[row * cols + start..][..len], tiles);
            }
            let count = len.div_ceil(TILE_COLS);
            let fields: [&[Tile]; 4] = std::array::from_fn(|f| &tiles[f * TILES..][..count]);
            let (part, first) = (start / FIXED_COLS, start % FIXED_COLS / TILE_COLS);
            let share = rows.div_ceil(groups);
            for (i, sums) in sums.iter_mut().enumerate() {
                // The next columns of some rows: asked for all at once, they would have to be waited for.
                for row in (i * share..rows).take(share) {
                    for line in (0..COLS).step_by(LINE) {
                        simd.prefetch_second(packed, row * cols + start + COLS + line);
                    }
                }
                let (group, field) = (i / 2 * 2, i % 2 * 2);
                let x = [group, group + 1].map(|group| &x.of(group, part, 0)[first..][..count]);
                unit.multiply([fields[field], fields[field + 1]], x, sums, start > 0);
            }
        }
        drop(unit);
        let mut out = out;
        for (i, TileProducts(sums)) in sums.iter().enumerate() {
            for (j, sums) in sums.as_flattened().iter().enumerate() {
                let (group, field) = (i / 2 * 2 + j % 2, i % 2 * 2 + j / 2);
                let mut y = sums.map(|row| row.map(|sum| sum as f32));
                simd.transpose(&mut y);
                let tokens = out.iter_mut().skip(4 * TILE_ROWS * group + field).step_by(4);
                for ((out, y), x_scale) in
                    tokens.zip(y).zip(x_scales.iter().skip(TILE_ROWS * group))
                {
                    let scale = x_scale * scale;
                    for (out, y) in out.iter_mut().zip(y) {
                        let y = y * scale;
                        *out = if add { *out + y } else { y };
                    }
                }
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
            let weights = &mut tiles[field * TILES + tile][row];
            for (weight, byte) in weights.iter_mut().zip(block) {
                // A field holds weight + 1.
                *weight = (byte >> (2 * field) & 0b11) as i8 - 1;
            }
        }
    }
}
