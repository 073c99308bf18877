//! How products with many tokens are cut.

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

use super::matrix_unit::{MatrixUnit, Shares};
use super::packing::Packing;
use super::shader::Abilities;
use crate::backend::MatrixFormat;
use crate::error::{Error, Result};

/// How a workgroup of a product with many tokens is cut: an invocation keeps a block of the result in
/// registers, and the workgroup's blocks make a tile, whose operands go through workgroup memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tile {
    /// Invocations: 64, 128 or 256.
    pub workgroup: u32,
    /// Storage rows of an invocation's block: 1 or 2 of ternary matrices, 4 or 8 of others.
    pub rows: u32,
    /// Its tokens: 2, 4, 8 or 16 with ternary matrices, 4 or 8 with others.
    pub tokens: u32,
    /// Whether the device's [matrix unit](super::MatrixUnit) makes the tile, where it has one that can: then
    /// its subgroups keep the blocks. Without one the tile is made as any other.
    #[serde(default, skip_serializing_if = "is_false")]
    pub matrix_unit: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn is_false(value: &bool) -> bool {
    !value
}

impl Tile {
    /// Every tile of a format that workgroup memory has room for, none of them by a matrix unit.
    pub fn all(format: MatrixFormat) -> impl Iterator<Item = Self> {
        let (rows, tokens): (_, &[u32]) = match format {
            MatrixFormat::Ternary => ([1, 2], &[2, 4, 8, 16]),
            _ => ([4, 8], &[4, 8]),
        };
        let blocks = rows.into_iter().flat_map(|rows| tokens.iter().map(move |&n| (rows, n)));
        let all = blocks.flat_map(|(rows, tokens)| {
            let matrix_unit = false;
            [64, 128, 256].map(|workgroup| Self { workgroup, rows, tokens, matrix_unit })
        });
        all.filter(move |tile| tile.bytes(format) <= MAX_BYTES)
    }

    /// Those of them that a matrix unit makes, by the unit.
    pub fn all_by(unit: MatrixUnit, format: MatrixFormat) -> impl Iterator<Item = Self> {
        // Ternary tiles of the packing that takes more room.
        let fields = if format == MatrixFormat::Ternary { Packing::Five.fields() } else { 1 };
        let made = move |tile: &Self| unit.shares(format, fields, *tile).is_some();
        Self::all(format).filter(made).map(|tile| Self { matrix_unit: true, ..tile })
    }

    /// # Errors
    /// [`Error::Parameter`] where it is none of [`Tile::all`], by a matrix unit or not.
    pub(super) fn check(self, format: MatrixFormat) -> Result<()> {
        let plain = Self { matrix_unit: false, ..self };
        if Self::all(format).any(|possible| possible == plain) {
            return Ok(());
        }
        let Self { workgroup, rows, tokens, .. } = self;
        let all = Self::all(format).map(|tile| tile.to_string()).collect::<Vec<_>>();
        Err(Error::Parameter {
            name: "tuning",
            value: format!(
                "{}: a tile of workgroup {workgroup}, rows {rows}, tokens {tokens}",
                format.name()
            ),
            allowed: format!("tiles are {}", all.join(", ")),
        })
    }

    /// What the tiled kernels are linked with.
    pub(super) fn constants(self, format: MatrixFormat) -> Vec<(&'static str, u32)> {
        let Self { workgroup, rows, tokens, .. } = self;
        let row_lanes = self.row_lanes(format);
        vec![("WORKGROUP", workgroup), ("ROW_LANES", row_lanes), ("ROWS", rows), ("TOKENS", tokens)]
    }

    /// How a device with these abilities makes the tile by its matrix unit, where it is to and can; with
    /// so many rows in a storage row.
    pub(super) fn shares(
        self,
        format: MatrixFormat,
        fields: usize,
        abilities: Abilities,
    ) -> Option<Shares> {
        let unit = abilities.matrix_unit.filter(|_| self.matrix_unit)?;
        unit.shares(format, fields, self)
    }

    /// The workgroups of a product.
    pub(super) fn grid(self, format: MatrixFormat, rows: usize, tokens: usize) -> [usize; 3] {
        let tile = self.size(format);
        [rows.div_ceil(tile[0]), tokens.div_ceil(tile[1]), 1]
    }

    /// For tensors with so few tokens that most of a tile would be computed for nothing: the same with
    /// fewer, where that is worth a kernel. Of floats it is not: an invocation takes eight at most.
    pub(super) fn of_fewer_tokens(self, format: MatrixFormat) -> Self {
        match (format, self.size(format)[1]) {
            (MatrixFormat::Ternary, 16..) => {
                // By a matrix unit only what was measured so.
                Self { tokens: (self.tokens / 4).max(2), matrix_unit: false, ..self }
            }
            _ => self,
        }
    }

    /// That of the two which suits so many tokens better.
    pub(super) fn for_tokens(self, format: MatrixFormat, tokens: usize) -> Self {
        if 2 * tokens <= self.size(format)[1] { self.of_fewer_tokens(format) } else { self }
    }

    /// Invocations side by side over the rows of a tile.
    fn row_lanes(self, format: MatrixFormat) -> u32 {
        match format {
            MatrixFormat::Ternary => 32,
            _ if self.workgroup == 64 => 8,
            _ => 16,
        }
    }

    /// Storage rows and tokens of a tile.
    pub(super) fn size(self, format: MatrixFormat) -> [usize; 2] {
        let lanes = self.row_lanes(format);
        [(lanes * self.rows) as usize, (self.workgroup / lanes * self.tokens) as usize]
    }

    /// Of workgroup memory: 64 columns of a byte for ternary matrices, of others 16 floats and a
    /// vector of padding.
    fn bytes(self, format: MatrixFormat) -> usize {
        let [rows, tokens] = self.size(format);
        (rows + tokens) * if format == MatrixFormat::Ternary { 64 } else { 80 }
    }
}

/// `256x4x4`: invocations, rows, tokens; `256x4x4m` by a matrix unit.
impl Display for Tile {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let by = if self.matrix_unit { "m" } else { "" };
        write!(f, "{}x{}x{}{by}", self.workgroup, self.rows, self.tokens)
    }
}

/// What WebGPU promises of workgroup memory.
const MAX_BYTES: usize = 16 << 10;
