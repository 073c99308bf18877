//! `linear` for float, 8-bit and 4-bit weights; sums are f32.

use super::linear::{FEW_TOKENS, Linear};
use super::shader::{Abilities, Binding, Kernel, Program, reduce, weights, wgsl};
use super::stream::Stream;
use super::tensor::Tensor;
use super::tile::Tile;
use super::tuning::Cut;
use crate::backend::MatrixFormat;
use crate::error::Result;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    rows: u32,
    first: u32,
    chunks: u32,
    weight_chunks: u32,
    out_stride: u32,
    tokens: u32,
}

/// The bindings of kernels that read a float matrix: weights, input, output, and the scales of blocks.
pub(super) fn bindings(format: MatrixFormat) -> Vec<(u32, Binding)> {
    let mut bindings = vec![(1, Binding::Read), (2, Binding::Read), (3, Binding::Write)];
    if format.has_block_scales() {
        bindings.push((4, Binding::Read));
    }
    bindings
}

pub(super) fn program(format: MatrixFormat, add: bool, cut: Cut, abilities: Abilities) -> Program {
    let (weights, f16) = weights(format, abilities);
    let Cut { workgroup, rows } = cut;
    Program {
        constants: vec![("WORKGROUP", workgroup), ("QUADS", rows / 4), ("ACCUMULATE", add.into())],
        parts: vec![reduce(abilities), weights, wgsl!("linear_float.wgsl")],
        bindings: bindings(format),
        f16,
    }
}

pub(super) fn tiled_program(
    format: MatrixFormat,
    add: bool,
    tile: Tile,
    abilities: Abilities,
) -> Program {
    let (weights, f16) = weights(format, abilities);
    if let Some(shares) = tile.shares(format, 1, abilities) {
        return Program {
            constants: shares.constants(tile, add),
            parts: vec![
                weights,
                shares.unit(),
                shares.activations(),
                wgsl!("common/matrix_float.wgsl"),
                wgsl!("linear_matrix.wgsl"),
            ],
            bindings: bindings(format),
            f16: f16 || shares.half,
        };
    }
    let mut constants = tile.constants(format);
    constants.push(("ACCUMULATE", add.into()));
    Program {
        constants,
        parts: vec![weights, wgsl!("linear_float_tiled.wgsl")],
        bindings: bindings(format),
        f16,
    }
}

impl Stream {
    pub(super) fn linear_float(
        &mut self,
        x: &Tensor,
        weight: &Linear,
        out: &Tensor,
        add: bool,
    ) -> Result<()> {
        let weights = weight.format;
        for block in &weight.blocks {
            let params = Params {
                rows: block.rows as u32,
                first: block.first as u32,
                chunks: (x.stride() / 8) as u32,
                weight_chunks: (weight.stride / 8) as u32,
                out_stride: out.stride() as u32,
                tokens: x.rows as u32,
            };
            let (kernel, grid) = if x.rows <= FEW_TOKENS {
                let cut = *self.tuning.cuts.of(weights);
                let groups = block.rows.div_ceil(cut.rows as usize);
                (Kernel::LinearFloat { weights, add, cut }, [groups, x.rows, 1])
            } else {
                let tile = *self.tuning.tiles.of(weights);
                let grid = tile.grid(weights, block.rows, x.rows);
                (Kernel::LinearFloatTiled { weights, add, tile }, grid)
            };
            let mut buffers = vec![&block.weights, &x.data, &out.data];
            buffers.extend(&block.scales);
            self.recorder.work(block.rows * weight.cols * x.rows)?;
            self.recorder.dispatch(kernel, &params, &buffers, grid)?;
        }
        Ok(())
    }
}
