//! Products of many tokens in a processor's unit for tiles: activations as it takes them.

use super::Machine;
use super::fixed::FixedRows;
use super::simd::{TILE_COLS, TILE_ROWS, Tile};
use super::tensor::{Aligned, Int8};
use crate::backend::FIXED_COLS;

/// Tiles of a part of [`FIXED_COLS`].
pub(super) const PART_TILES: usize = FIXED_COLS / TILE_COLS;

/// Activations of 8 or 16 bits as tiles of [`TILE_ROWS`] tokens; a session keeps their memory.
///
/// Those of 16 bits are two planes of bytes, both signed: `256 * upper + lower`, see [`split`].
pub(super) struct TokenTiles {
    /// `[groups, parts, planes, PART_TILES]` tiles; zero beyond the last token and the last column.
    bytes: Aligned<i8>,
}

/// What [`TokenTiles`] holds of a product's input.
#[derive(Clone, Copy)]
pub(super) struct TileGroups<'a> {
    tiles: &'a [Tile],
    parts: usize,
    planes: usize,
}

impl TokenTiles {
    pub(super) fn new() -> Self {
        Self { bytes: Aligned::zeros(0) }
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.bytes()
    }

    /// The `tokens` rows of `x`, in an even number of groups.
    pub(super) fn of_bytes(
        &mut self,
        machine: &Machine,
        x: &Int8,
        tokens: usize,
        cols: usize,
    ) -> TileGroups<'_> {
        self.fill::<1>(
            machine,
            tokens,
            tokens.next_multiple_of(2 * TILE_ROWS),
            cols,
            |token, at| {
                let row = &x.values[token * cols..][..cols];
                let mut bytes = [0; TILE_COLS];
                let len = TILE_COLS.min(cols - at);
                bytes[..len].copy_from_slice(&row[at..][..len]);
                [bytes]
            },
        )
    }

    /// The `tokens` rows of `x`, each of two planes.
    pub(super) fn of_words(
        &mut self,
        machine: &Machine,
        x: FixedRows<'_>,
        tokens: usize,
        cols: usize,
    ) -> TileGroups<'_> {
        self.fill::<2>(machine, tokens, tokens.next_multiple_of(TILE_ROWS), cols, |token, at| {
            let levels = x.row(token).0.as_flattened();
            split(levels[at..].first_chunk().unwrap_or(&[0; TILE_COLS]))
        })
    }

    /// Fills the tiles with what `planes` gives of 64 columns, from the second argument on, of a token.
    fn fill<const PLANES: usize>(
        &mut self,
        machine: &Machine,
        tokens: usize,
        padded: usize,
        cols: usize,
        planes: impl Fn(usize, usize) -> [[i8; TILE_COLS]; PLANES] + Sync,
    ) -> TileGroups<'_> {
        let parts = cols.div_ceil(FIXED_COLS);
        let group = parts * PLANES * PART_TILES;
        let groups = padded / TILE_ROWS;
        self.bytes.grow(groups * group * size_of::<Tile>());
        let tiles: &mut [Tile] = bytemuck::cast_slice_mut(&mut self.bytes);
        let tiles = &mut tiles[..groups * group];
        let work = tiles.chunks_exact_mut(group.max(1)).enumerate().collect();
        machine.each_of(tokens * cols < 64 * 1024, work, |_worker, (group, tiles)| {
            tiles.fill([[0; TILE_COLS]; TILE_ROWS]);
            let first = group * TILE_ROWS;
            for (i, token) in (first..tokens.min(first + TILE_ROWS)).enumerate() {
                for at in (0..cols).step_by(TILE_COLS) {
                    let (part, tile) = (at / FIXED_COLS, at % FIXED_COLS / TILE_COLS);
                    for (plane, bytes) in planes(token, at).iter().enumerate() {
                        let tile = &mut tiles[(part * PLANES + plane) * PART_TILES + tile];
                        for (row, four) in tile.iter_mut().zip(bytes.as_chunks::<4>().0) {
                            row[4 * i..][..4].copy_from_slice(four);
                        }
                    }
                }
            }
        });
        TileGroups { tiles, parts, planes: PLANES }
    }
}

impl<'a> TileGroups<'a> {
    /// Groups of [`TILE_ROWS`] tokens, the last of which may be less than full, or empty.
    pub(super) fn groups(&self) -> usize {
        self.tiles.len() / (self.parts * self.planes * PART_TILES).max(1)
    }

    /// The tiles of a group's part.
    #[inline(always)]
    pub(super) fn of(&self, group: usize, part: usize, plane: usize) -> &'a [Tile] {
        let at = (group * self.parts + part) * self.planes + plane;
        &self.tiles[at * PART_TILES..][..PART_TILES]
    }
}

/// Words in `-128 * 257..=127 * 257` as `256 * upper + lower`.
#[inline(always)]
pub(super) fn split(words: &[i16; TILE_COLS]) -> [[i8; TILE_COLS]; 2] {
    let mut planes = [[0; TILE_COLS]; 2];
    for (i, &word) in words.iter().enumerate() {
        let lower = word as i8;
        planes[0][i] = (word.wrapping_sub(i16::from(lower)) >> 8) as i8;
        planes[1][i] = lower;
    }
    planes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::ACTIVATION_STEP;

    #[test]
    fn words_are_split_without_loss() {
        let largest = (1.0 / ACTIVATION_STEP) as i16;
        let words: Vec<i16> = (-largest..=largest).collect();
        for words in words.windows(TILE_COLS).step_by(TILE_COLS - 1) {
            let words = words.first_chunk().expect("64 words");
            let [upper, lower] = split(words);
            for ((word, upper), lower) in words.iter().zip(upper).zip(lower) {
                assert_eq!(256 * i32::from(upper) + i32::from(lower), i32::from(*word));
            }
        }
    }
}
