//! `rope_append`: rotates queries and keys, and appends to the cache.

use super::shader::{Binding, Kernel, Program, cache_write, wgsl};
use super::stream::Stream;
use super::tensor::{Cache, Rope, Tensor};
use crate::backend::{CacheFormat, TensorFormat};
use crate::error::Result;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    position: u32,
    context: u32,
    stride: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    cache_dim: u32,
}

pub(super) fn program(cache: CacheFormat) -> Program {
    use Binding::{Read, Write};
    Program {
        constants: Vec::new(),
        parts: vec![cache_write(cache), wgsl!("rope_append.wgsl")],
        bindings: vec![(1, Write), (2, Read), (3, Write), (4, Write)],
        f16: false,
    }
}

impl Stream {
    pub(super) fn rope_rows(&mut self, qkv: &Tensor, rope: &Rope, cache: &Cache) -> Result<()> {
        let shape = cache.shape;
        let widths = qkv.width == shape.qkv_width() && rope.head_dim == shape.head_dim;
        let inside = self.step.position + qkv.rows <= cache.context
            && (cache.context * shape.head_dim * 4) as u64 <= rope.table.size();
        self.expect("rope_append", widths && qkv.format == TensorFormat::F32 && inside, || {
            let (position, rows) = (self.step.position, qkv.rows);
            format!("{rows} rows of {} at {position} for {shape:?}", qkv.width)
        })?;
        let params = Params {
            position: self.step.position as u32,
            context: cache.context as u32,
            stride: qkv.stride() as u32,
            heads: shape.heads as u32,
            kv_heads: shape.kv_heads as u32,
            head_dim: shape.head_dim as u32,
            cache_dim: shape.head_dim.next_multiple_of(4) as u32,
        };
        let buffers = [&qkv.data, &rope.table, &cache.keys, &cache.values];
        let pairs = shape.qkv_width() / 2;
        let kernel = Kernel::RopeAppend { cache: cache.format };
        self.recorder.dispatch(kernel, &params, &buffers, [pairs.div_ceil(64), qkv.rows, 1])
    }
}
