//! `linear` for ternary weights and int8 activations, in exact integers.

use super::linear::{FEW_TOKENS, Linear};
use super::matrix_unit::MAX_TERNARY_COLS;
use super::packing::Packing;
use super::shader::{Abilities, Binding, Kernel, Program, dot, reduce, wgsl};
use super::stream::Stream;
use super::tensor::Tensor;
use super::tile::Tile;
use super::tuning::Cut;
use crate::backend::MatrixFormat;
use crate::error::Result;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    packed_rows: u32,
    count16: u32,
    out_stride: u32,
    tokens: u32,
}

fn bindings() -> Vec<(u32, Binding)> {
    use Binding::{Read, Uniform, Write};
    vec![(1, Read), (2, Uniform), (3, Read), (4, Read), (5, Write)]
}

/// The snippet of sums over what is packed like this.
fn packed(packing: Packing) -> &'static str {
    match packing {
        Packing::Four => wgsl!("common/ternary_four.wgsl"),
        Packing::Five => wgsl!("common/ternary_five.wgsl"),
    }
}

/// The snippet of their sums over a workgroup.
fn reduce_packed(packing: Packing) -> &'static str {
    match packing {
        Packing::Four => wgsl!("common/ternary_four_sums.wgsl"),
        Packing::Five => wgsl!("common/ternary_five_sums.wgsl"),
    }
}

/// The snippet of what is packed like this, weight by weight.
fn digits(packing: Packing) -> &'static str {
    match packing {
        Packing::Four => wgsl!("common/ternary_four_digits.wgsl"),
        Packing::Five => wgsl!("common/ternary_five_digits.wgsl"),
    }
}

pub(super) fn program(packing: Packing, add: bool, cut: Cut, abilities: Abilities) -> Program {
    let Cut { workgroup, rows } = cut;
    Program {
        constants: vec![("WORKGROUP", workgroup), ("ROWS", rows), ("ACCUMULATE", add.into())],
        parts: vec![
            reduce(abilities),
            dot(abilities),
            wgsl!("common/ternary.wgsl"),
            packed(packing),
            reduce_packed(packing),
            wgsl!("linear_ternary.wgsl"),
        ],
        bindings: bindings(),
        f16: false,
    }
}

pub(super) fn tiled_program(
    packing: Packing,
    add: bool,
    tile: Tile,
    abilities: Abilities,
) -> Program {
    if let Some(shares) = tile.shares(MatrixFormat::Ternary, packing.fields(), abilities) {
        return Program {
            constants: shares.constants(tile, add),
            parts: vec![
                dot(abilities),
                wgsl!("common/ternary.wgsl"),
                packed(packing),
                digits(packing),
                shares.unit(),
                wgsl!("common/matrix_ternary.wgsl"),
                wgsl!("linear_matrix.wgsl"),
            ],
            bindings: bindings(),
            f16: shares.half,
        };
    }
    let mut constants = tile.constants(MatrixFormat::Ternary);
    constants.push(("ACCUMULATE", add.into()));
    Program {
        constants,
        parts: vec![
            dot(abilities),
            wgsl!("common/ternary.wgsl"),
            packed(packing),
            wgsl!("linear_ternary_tiled.wgsl"),
        ],
        bindings: bindings(),
        f16: false,
    }
}

impl Stream {
    pub(super) fn linear_ternary(
        &mut self,
        x: &Tensor,
        weight: &Linear,
        out: &Tensor,
        add: bool,
    ) -> Result<()> {
        let Some(scales) = &x.scales else {
            return Err(self.fault("linear", "int8 activations without scales"));
        };
        let packing = weight.packing;
        for block in &weight.blocks {
            let Some(segments) = &block.segments else {
                return Err(self.fault("linear", "ternary weights without segments"));
            };
            let params = Params {
                packed_rows: block.rows as u32,
                count16: (weight.stride / 16) as u32,
                out_stride: out.stride() as u32,
                tokens: x.rows as u32,
            };
            let (kernel, grid) = if x.rows <= FEW_TOKENS {
                let cut = self.tuning.cuts.ternary;
                let groups = block.rows.div_ceil(cut.rows as usize);
                (Kernel::LinearTernary { packing, add, cut }, [groups, x.rows, 1])
            } else {
                let format = MatrixFormat::Ternary;
                let mut tile = self.tuning.tiles.ternary.for_tokens(format, x.rows);
                // A matrix unit adds in f32, and results are to be those of integers.
                tile.matrix_unit &= weight.cols <= MAX_TERNARY_COLS;
                let grid = tile.grid(format, block.rows, x.rows);
                (Kernel::LinearTernaryTiled { packing, add, tile }, grid)
            };
            let buffers = [&block.weights, segments, &x.data, scales, &out.data];
            self.recorder.work(packing.fields() * block.rows * weight.cols * x.rows)?;
            self.recorder.dispatch(kernel, &params, &buffers, grid)?;
        }
        Ok(())
    }
}
