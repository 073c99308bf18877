//! Rows of the embedding table as floats.

use super::simd::{BLOCK, Kernel, Simd};
use super::tensor::Tensor;
use super::weights::{BFloat16, Float16, Float32, Levels4, Levels8, Row, Weight};
use super::{Machine, Matrix};
use crate::backend::MatrixFormat;

/// See [`crate::backend::Operations::embed`].
pub(super) fn embed(machine: &Machine, tokens: &[u32], table: &Matrix, out: &mut Tensor) {
    assert_eq!(out.width(), table.cols, "hidden width");
    out.set_rows(tokens.len());
    for (&token, out) in tokens.iter().zip(out.floats_mut().chunks_exact_mut(table.cols)) {
        let (row, scales) = (table.row(token as usize), table.row_scales(token as usize));
        let level = machine.level;
        match table.format {
            MatrixFormat::F32 => level.run(Decode(Row::<Float32>::new(row, scales), out)),
            MatrixFormat::F16 => level.run(Decode(Row::<Float16>::new(row, scales), out)),
            MatrixFormat::BF16 => level.run(Decode(Row::<BFloat16>::new(row, scales), out)),
            MatrixFormat::Q8 => level.run(Decode(Row::<Levels8>::new(row, scales), out)),
            MatrixFormat::Q4 => level.run(Decode(Row::<Levels4>::new(row, scales), out)),
            MatrixFormat::Ternary => panic!("an embedding table is not ternary"),
        }
    }
}

/// Decodes a row into floats `[cols]`.
struct Decode<'a, W: Weight>(Row<'a, W>, &'a mut [f32]);

impl<W: Weight> Kernel for Decode<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(row, out) = self;
        let (whole, rest) = out.as_chunks_mut::<BLOCK>();
        row.decode(simd, whole);
        if !row.is_whole() {
            let (raw, scale) = (row.rest(), row.scale(whole.len()));
            let mut block = [0.0; BLOCK];
            for i in 0..BLOCK / S::LANES {
                simd.store(&mut block, i, W::load(simd, &raw, scale, i));
            }
            rest.copy_from_slice(&block[..rest.len()]);
        }
    }
}
