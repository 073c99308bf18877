//! How products with many tokens are cut.

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

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
}

impl Tile {
    /// Every tile of a format that workgroup memory has room for.
    pub fn all(format: MatrixFormat) -> impl Iterator<Item = Self> {
        let (rows, tokens): (_, &[u32]) = match format {
            MatrixFormat::Ternary => ([1, 2], &[2, 4, 8, 16]),
            _ => ([4, 8], &[4, 8]),
        };
        let blocks = rows.into_iter().flat_map(|rows| tokens.iter().map(move |&n| (rows, n)));
        let all = blocks.flat_map(|(rows, tokens)| {
            [64, 128, 256].map(|workgroup| Self { workgroup, rows, tokens })
        });
        all.filter(move |tile| tile.bytes(format) <= MAX_BYTES)
    }

    /// # Errors
    /// [`Error::Parameter`] where it is none of [`Tile::all`].
    pub(super) fn check(self, format: MatrixFormat) -> Result<()> {
        if Self::all(format).any(|possible| possible == self) {
            return Ok(());
        }
        let Self { workgroup, rows, tokens } = self;
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
        let Self { workgroup, rows, tokens } = self;
        let row_lanes = self.row_lanes(format);
        vec![("WORKGROUP", workgroup), ("ROW_LANES", row_lanes), ("ROWS", rows), ("TOKENS", tokens)]
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
            (MatrixFormat::Ternary, 16..) => Self { tokens: (self.tokens / 4).max(2), ..self },
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
    fn size(self, format: MatrixFormat) -> [usize; 2] {
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

/// `256x4x4`: invocations, rows, tokens.
impl Display for Tile {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}", self.workgroup, self.rows, self.tokens)
    }
}

/// What WebGPU promises of workgroup memory.
const MAX_BYTES: usize = 16 << 10;
