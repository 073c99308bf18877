//! Matrix units of GPUs, and how they share out a tile.
//!
//! A matrix unit multiplies two small matrices and adds them to a third, for all invocations of a subgroup
//! together: tensor cores, simdgroup matrices, "cooperative matrices" in Vulkan. wgpu offers them as an
//! experimental feature, so a device is opened with them only where its tuning makes use of them, and
//! while [`tune`](super::tune) finds out whether to.

use serde::{Deserialize, Serialize};

use super::shader::wgsl;
use super::tile::Tile;
use crate::backend::MatrixFormat;

/// The matrices that a device multiplies at once. Sums are always f32: no unit that adds in f16 is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MatrixUnit {
    /// Rows and columns of those of f16, where it multiplies f16: 8 or 16.
    pub f16: Option<u32>,
    /// Those of f32: 8.
    pub f32: Option<u32>,
    /// Invocations of the largest subgroup that runs kernels: each subgroup has matrices of its own.
    pub subgroup: u32,
}

/// Bytes of workgroup memory that tiles may take: twice what WebGPU promises. What has a matrix unit
/// has so much.
const MAX_BYTES: u32 = 32 << 10;

/// f32 counts integers exactly to here.
const EXACT: usize = 1 << 24;

/// Columns of ternary matrices whose sums are exact, with an `i8` in each.
pub(super) const MAX_TERNARY_COLS: usize = EXACT / 128;

impl MatrixUnit {
    /// That of an adapter, where it has one that is of use.
    pub(super) fn of(adapter: &wgpu::Adapter) -> Option<Self> {
        use wgpu::CooperativeScalarType::{F16, F32};
        let features = adapter.features();
        let needed = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SUBGROUP;
        let memory = adapter.limits().max_compute_workgroup_storage_size;
        if !features.contains(needed) || memory < MAX_BYTES {
            return None;
        }
        let all = adapter.cooperative_matrix_properties();
        let has = |size: u32, inputs| {
            all.iter().any(|unit| {
                [unit.m_size, unit.n_size, unit.k_size] == [size; 3]
                    && (unit.ab_type, unit.cr_type) == (inputs, F32)
            })
        };
        let half = features.contains(wgpu::Features::SHADER_F16);
        let unit = Self {
            f16: [16, 8].into_iter().find(|&size| half && has(size, F16)),
            f32: Some(8).filter(|&size| has(size, F32)),
            // Where wgpu does not know it, it says 64 of Metal; what has matrices there has 32.
            subgroup: match adapter.get_info().backend {
                wgpu::Backend::Metal => 32,
                _ => adapter.get_info().subgroup_max_size,
            },
        };
        (unit.f16.or(unit.f32).is_some()).then_some(unit)
    }

    /// What is left of it where shaders do not compute with f16.
    pub(super) fn without_f16(self) -> Option<Self> {
        self.f32.map(|_| Self { f16: None, ..self })
    }

    /// How it makes a tile of matrices in a format, with so many rows in a storage row; nothing where it
    /// cannot.
    pub(super) fn shares(self, format: MatrixFormat, fields: usize, tile: Tile) -> Option<Shares> {
        // Exact numbers of the unit: trits and int8 are f16; so are f16 weights, but activations take two
        // of them each. Other weights would have to be taken apart, too, and each product be made of
        // three: units are not so much faster than f32.
        let (size, half, parts) = match (format, self) {
            (MatrixFormat::Ternary, Self { f16: Some(size), .. }) => (size, true, 1),
            (_, Self { f32: Some(size), .. }) => (size, false, 1),
            (MatrixFormat::F16, Self { f16: Some(size), .. }) => (size, true, 2),
            _ => return None,
        };
        let [rows, tokens] = tile.size(format);
        let (rows, tokens) = ((rows * fields) as u32, tokens as u32);
        // In a field of a ternary tile, too, there must be whole matrices.
        let whole = (rows / fields as u32).is_multiple_of(size) && tokens.is_multiple_of(size);
        if !whole || self.subgroup == 0 || !tile.workgroup.is_multiple_of(self.subgroup) {
            return None;
        }
        let blocks = [rows / size, tokens / size];
        let subgroups = tile.workgroup / self.subgroup;
        let divisors = |n: u32| (1..=n).filter(move |&d| n.is_multiple_of(d));
        let patches = divisors(blocks[0]).flat_map(|r| divisors(blocks[1]).map(move |t| [r, t]));
        // As many subgroups as possible are to have work; of a square patch the fewest operands are read.
        let patch = patches
            .filter(|[r, t]| blocks[0] / r * (blocks[1] / t) <= subgroups)
            .min_by_key(|[r, t]| (r * t, r + t))?;
        let down = blocks[0] / patch[0];
        let patches = down * (blocks[1] / patch[1]);
        let element = if half { 2 } else { 4 };
        let bytes = |columns: u32| {
            let operands = (rows + parts * tokens) * (columns * element + 16);
            operands + parts * patches * size * size * 4 + (parts - 1) * tokens * 4
        };
        // The more at once, the fewer barriers.
        let columns = [32, 16].into_iter().find(|&columns| bytes(columns) <= MAX_BYTES)?;
        Some(Shares { size, half, parts, rows, tokens, columns, patch, patches, down })
    }
}

/// How the subgroups of a workgroup share out a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shares {
    /// Rows and columns of a matrix.
    size: u32,
    /// Whether it is of f16.
    pub(super) half: bool,
    /// Numbers of the unit that an activation takes.
    parts: u32,
    /// Of the tile: rows of the output, tokens.
    rows: u32,
    tokens: u32,
    /// Columns that lie in workgroup memory.
    columns: u32,
    /// Matrices of a subgroup's part of the result: over rows, over tokens.
    patch: [u32; 2],
    /// Such parts of a tile, and how many of them lie one below the other.
    patches: u32,
    down: u32,
}

impl Shares {
    /// What `linear_matrix.wgsl` is linked with.
    pub(super) fn constants(self, tile: Tile, add: bool) -> Vec<(&'static str, u32)> {
        vec![
            ("WORKGROUP", tile.workgroup),
            ("TILE_ROWS", self.rows),
            ("TILE_TOKENS", self.tokens),
            ("COLUMNS", self.columns),
            ("PATCH_ROWS", self.patch[0]),
            ("PATCH_TOKENS", self.patch[1]),
            ("PATCHES", self.patches),
            ("PATCHES_DOWN", self.down),
            ("ACCUMULATE", add.into()),
        ]
    }

    /// The snippet of the unit's matrices.
    pub(super) fn unit(self) -> &'static str {
        match (self.half, self.size) {
            (true, 16) => wgsl!("common/unit_f16_16.wgsl"),
            (true, _) => wgsl!("common/unit_f16_8.wgsl"),
            (false, _) => wgsl!("common/unit_f32_8.wgsl"),
        }
    }

    /// The snippet of how float activations become the unit's numbers.
    pub(super) fn activations(self) -> &'static str {
        match self.parts {
            1 => wgsl!("common/matrix_whole.wgsl"),
            _ => wgsl!("common/matrix_split.wgsl"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Tuning;

    /// As real GPUs and llvmpipe have them.
    pub(crate) const UNITS: [MatrixUnit; 4] = [
        MatrixUnit { f16: Some(16), f32: None, subgroup: 32 },
        MatrixUnit { f16: Some(16), f32: None, subgroup: 64 },
        MatrixUnit { f16: Some(8), f32: None, subgroup: 8 },
        MatrixUnit { f16: Some(8), f32: Some(8), subgroup: 32 },
    ];

    #[test]
    fn every_matrix_of_a_tile_is_some_subgroups() {
        for unit in UNITS {
            let mut made = 0;
            for format in Tuning::FORMATS {
                let ternary = format == MatrixFormat::Ternary;
                for fields in if ternary { [4, 5] } else { [1, 1] } {
                    for tile in Tile::all(format) {
                        let Some(shares) = unit.shares(format, fields, tile) else {
                            continue;
                        };
                        made += 1;
                        let Shares { size, rows, tokens, patch, patches, down, .. } = shares;
                        let [tile_rows, tile_tokens] = tile.size(format);
                        assert_eq!(
                            [rows, tokens],
                            [tile_rows * fields, tile_tokens].map(|n| n as u32)
                        );
                        let subgroups = tile.workgroup / unit.subgroup;
                        assert!(patches <= subgroups, "{tile}: {shares:?}");
                        assert_eq!(down * patch[0] * size, rows, "{tile}: {shares:?}");
                        assert_eq!(patches / down * patch[1] * size, tokens, "{tile}: {shares:?}");
                    }
                }
            }
            assert!(made > 0, "{unit:?}");
        }
    }

    /// Four subgroups or eight have as much to do each where tiles are as by default.
    #[test]
    fn no_subgroup_is_idle_by_default() {
        use crate::backend::DeviceKind;
        let tiles = Tuning::default_of(DeviceKind::DiscreteGpu).tiles;
        for unit in &UNITS[..2] {
            for (format, fields) in [(MatrixFormat::Ternary, 4), (MatrixFormat::F16, 1)] {
                let tile = *tiles.of(format);
                let shares = unit.shares(format, fields, tile).expect("a tile of the unit");
                assert_eq!(shares.patches, tile.workgroup / unit.subgroup, "{shares:?}");
            }
        }
    }

    #[test]
    fn what_a_unit_has_no_numbers_for_it_does_not_make() {
        let tile = Tile { workgroup: 256, rows: 4, tokens: 4, matrix_unit: true };
        let half = MatrixUnit { f16: Some(16), f32: None, subgroup: 32 };
        for format in [MatrixFormat::F32, MatrixFormat::BF16, MatrixFormat::Q8, MatrixFormat::Q4] {
            assert_eq!(half.shares(format, 1, tile), None);
            let apple = UNITS[3].shares(format, 1, tile).expect("floats are floats");
            assert!(!apple.half && apple.parts == 1);
        }
        assert_eq!(half.without_f16(), None);
        assert_eq!(UNITS[3].without_f16().and_then(|unit| unit.f16), None);
        // Four tokens are no matrix, and no subgroup is half in a workgroup.
        let few = Tile { workgroup: 64, rows: 1, tokens: 2, matrix_unit: true };
        assert_eq!(half.shares(MatrixFormat::Ternary, 4, few), None);
        let wide = MatrixUnit { subgroup: 128, ..half };
        let small = Tile { workgroup: 64, rows: 4, tokens: 4, matrix_unit: true };
        assert_eq!(wide.shares(MatrixFormat::F16, 1, small), None);
    }
}
