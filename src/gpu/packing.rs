//! How ternary weights lie on a device.
//!
//! Whatever shares a byte are rows that are far apart, so that neighbouring bytes are neighbouring columns
//! of all of them: one load of activations meets all rows of the bytes. See `shaders/common/ternary.wgsl`.

use std::fmt::{self, Display, Formatter};
use std::ops::Range;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::backend::MatrixFormat;
use crate::checkpoint::MatrixSource;

/// How many output rows of a ternary matrix share a byte on the device.
///
/// Sums are integers: both give the same results to the bit.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// Two bits each: as checkpoints have them, so that files are copied as they are.
    #[default]
    Four,
    /// A digit each of a number in base 3: a fifth less to be read, and about twice the work.
    Five,
}

impl Packing {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Four, Self::Five];

    /// Output rows of a byte.
    pub fn fields(self) -> usize {
        match self {
            Self::Four => 4,
            Self::Five => 5,
        }
    }

    /// Storage rows of a matrix, which is ternary or is not packed at all.
    pub(super) fn rows_of(self, matrix: &MatrixSource) -> usize {
        match matrix.format() {
            MatrixFormat::Ternary => matrix.rows().div_ceil(self.fields()),
            _ => matrix.storage_rows(),
        }
    }

    /// Whether a matrix lies on the device in another way than [`MatrixSource::encode`] gives it.
    pub(super) fn changes(self, matrix: &MatrixSource) -> bool {
        self == Self::Five && matrix.format() == MatrixFormat::Ternary
    }
}

/// `four`, `five`.
impl Display for Packing {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Four => "four",
            Self::Five => "five",
        })
    }
}

/// Appends storage rows `range` of a ternary matrix `[rows, cols]` to `out`, packed by
/// [`Packing::Five`], each padded with zeros to `stride` bytes.
///
/// With `fifth = ceil(rows / 5)`, byte `[r, c]` stands for the weights of rows `r + k fifth`, column `c`.
/// Plus one they are the digits 0 to 4 of a number `v` in base 3, the first the most significant, and
/// 1 where there is no such row. The byte is `ceil(v 256 / 243)`: the number as a fixed-point
/// fraction, whose digits come out by multiplications with 3.
///
/// # Errors
/// A message where the matrix holds something else than trits, for which there is no digit.
pub(super) fn five(
    matrix: &MatrixSource,
    range: Range<usize>,
    stride: usize,
    out: &mut Vec<u8>,
) -> Result<(), &'static str> {
    let (first, cols) = (out.len(), matrix.cols());
    let fifth = Packing::Five.rows_of(matrix);
    out.resize(first + range.len() * stride, 0);
    let rows = out[first..].par_chunks_exact_mut(stride).zip(range);
    let pack = |codes: &mut Vec<u8>, (bytes, row): (&mut [u8], usize)| {
        let (bytes, mut seen) = (&mut bytes[..cols], 0);
        for field in 0..5 {
            match row + field * fifth {
                source if source < matrix.rows() => matrix.codes(source, codes),
                _ => codes.fill(1),
            }
            for (number, code) in bytes.iter_mut().zip(&*codes) {
                // Only 3, which is refused, can overflow.
                *number = number.wrapping_mul(3).wrapping_add(*code);
                seen |= code & (code >> 1);
            }
        }
        for number in bytes {
            *number = (256 * u16::from(*number)).div_ceil(243) as u8;
        }
        seen == 0
    };
    match rows.map_init(|| vec![0; cols], pack).reduce(|| true, |a, b| a && b) {
        true => Ok(()),
        false => Err("its bytes are not four trits each"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::FloatType;

    /// Weights that tell all rows and columns apart.
    fn trit(row: usize, col: usize) -> i8 {
        ((row * row + 5 * row * col + col * col * col / 7) % 3) as i8 - 1
    }

    /// `[rows, cols]` in two bits, and as master weights.
    fn matrices(rows: usize, cols: usize) -> [MatrixSource; 2] {
        let quarter = rows.div_ceil(4);
        let code = |row, col| if row < rows { trit(row, col) + 1 } else { 1 } as u8;
        let byte = |i: usize| {
            let fields =
                (0..4).map(|field| code(i / cols + field * quarter, i % cols) << (2 * field));
            fields.sum::<u8>()
        };
        let packed: Vec<u8> = (0..quarter * cols).map(byte).collect();
        let master =
            (0..rows * cols).flat_map(|i| f32::from(trit(i / cols, i % cols)).to_le_bytes());
        let master = master.collect::<Vec<_>>().into();
        [
            MatrixSource::packed("two bits", rows, cols, packed.into(), 1.0),
            MatrixSource::master("master", rows, cols, FloatType::F32, master),
        ]
    }

    /// The digits by division, without any of the shader's means.
    fn unpacked(byte: u8) -> [i8; 5] {
        let number = usize::from(byte) * 243 / 256;
        [81, 27, 9, 3, 1].map(|place| (number / place % 3) as i8 - 1)
    }

    #[test]
    fn five_trits_come_back_from_a_byte() {
        let shapes: [(usize, usize); 7] =
            [(1, 1), (4, 3), (5, 16), (6, 31), (23, 300), (64, 7), (101, 257)];
        for (rows, cols) in shapes {
            let fifth = rows.div_ceil(5);
            let stride = cols.next_multiple_of(16);
            for matrix in matrices(rows, cols) {
                // In two pieces, as matrices go to the device; what is there already stays.
                let mut packed = vec![7; 3];
                for range in [0..fifth / 2, fifth / 2..fifth] {
                    five(&matrix, range, stride, &mut packed).expect("trits");
                }
                assert_eq!(packed[..3], [7; 3]);
                assert_eq!(packed.len(), 3 + fifth * stride);
                for (row, bytes) in packed[3..].chunks_exact(stride).enumerate() {
                    for (col, &byte) in bytes.iter().enumerate() {
                        if col >= cols {
                            assert_eq!(byte, 0, "padding");
                            continue;
                        }
                        for (field, found) in unpacked(byte).into_iter().enumerate() {
                            let source = row + field * fifth;
                            let right = if source < rows { trit(source, col) } else { 0 };
                            assert_eq!(found, right, "{rows} x {cols}: row {source}, column {col}");
                        }
                    }
                }
            }
        }
    }

    /// What the shader relies on: multiplied by 3 again and again, the upper byte is the number of the
    /// digits so far, in 16 bits, for every number there is.
    #[test]
    fn digits_come_out_by_multiplication() {
        for number in 0u32..243 {
            let byte = (256 * number).div_ceil(243);
            for digits in 1..=5 {
                let lane = byte * 3u32.pow(digits);
                assert!(lane < 1 << 16);
                assert_eq!(lane >> 8, number / 3u32.pow(5 - digits), "{number}, {digits} digits");
            }
            // And from the third digit on alone.
            let rest = (byte * 9) & 0xff;
            for digits in 1..=3 {
                let right = number % 27 / 3u32.pow(3 - digits);
                assert_eq!((rest * 3u32.pow(digits)) >> 8, right, "{number}, {digits} digits");
            }
        }
    }

    #[test]
    fn what_is_no_trit_has_no_digit() {
        for at in [0, 5, 11] {
            for field in 0..4 {
                let mut bytes = vec![0b01_01_01_01; 12];
                bytes[at] |= 3 << (2 * field);
                let matrix = MatrixSource::packed("odd", 12, 4, bytes.into(), 1.0);
                let error = five(&matrix, 0..3, 16, &mut Vec::new()).expect_err("no trit");
                assert!(error.contains("trits"), "{error}");
            }
        }
    }
}
