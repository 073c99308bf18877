//! `embed`: rows of the token table.

use super::linear::Linear;
use super::linear_float::bindings;
use super::shader::{Abilities, Kernel, Program, weights, wgsl};
use super::stream::Stream;
use super::tensor::Tensor;
use crate::backend::{MatrixFormat, TensorFormat};
use crate::error::Result;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    rows: u32,
    chunks: u32,
    weight_chunks: u32,
}

pub(super) fn program(table: MatrixFormat, abilities: Abilities) -> Program {
    let (weights, f16) = weights(table, abilities);
    let parts = vec![weights, wgsl!("embed.wgsl")];
    Program { constants: Vec::new(), parts, bindings: bindings(table), f16 }
}

impl Stream {
    pub(super) fn embed_tokens(&mut self, table: &Linear, out: &mut Tensor) -> Result<()> {
        let fits = out.format == TensorFormat::F32
            && out.width == table.cols
            && self.step.tokens <= out.capacity;
        self.expect("embed", fits && table.format != MatrixFormat::Ternary, || {
            format!("a {} table of width {}", table.format.name(), table.cols)
        })?;
        out.rows = self.step.tokens;
        let chunks = out.stride() / 8;
        for block in &table.blocks {
            let params = Params {
                first: block.first as u32,
                rows: block.rows as u32,
                chunks: chunks as u32,
                weight_chunks: (table.stride / 8) as u32,
            };
            let mut buffers = vec![&block.weights, &self.tokens, &out.data];
            buffers.extend(&block.scales);
            let kernel = Kernel::Embed { table: table.format };
            let grid = [chunks.div_ceil(64), out.rows, 1];
            self.recorder.dispatch(kernel, &params, &buffers, grid)?;
        }
        Ok(())
    }
}
