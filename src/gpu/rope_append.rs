//! `rope_append`: rotates queries and keys, and appends to the cache. Values that are quantised
//! are written by a kernel of their own.

use super::cache::{Cache, ValueStore};
use super::shader::{
    Abilities, Binding, HALF, Kernel, LEVEL, Program, key_rows, key_write, reduce, value_write,
    wgsl,
};
use super::stream::Stream;
use super::tensor::{Rope, Tensor};
use crate::backend::{CacheFormat, TensorFormat};
use crate::error::Result;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    position: u32,
    first: u32,
    stride: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    cache_dim: u32,
    key_first: u32,
    key_stride: u32,
    value_first: u32,
    value_stride: u32,
    sink: u32,
    recent: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct ValueParams {
    position: u32,
    first: u32,
    stride: u32,
    values: u32,
    value_first: u32,
    value_stride: u32,
    value_scales: u32,
}

pub(super) fn program(exact: CacheFormat, compressed: bool, values: ValueStore) -> Program {
    use Binding::{Read, Write};
    let mut bindings = vec![(1, Write), (2, Read), (3, Write)];
    if values.quantised().is_none() {
        bindings.push((4, Write));
    }
    Program {
        constants: Vec::new(),
        parts: vec![
            HALF,
            key_rows(compressed),
            key_write(exact),
            value_write(values),
            wgsl!("rope_append.wgsl"),
        ],
        bindings,
        f16: false,
    }
}

pub(super) fn values_program(values: ValueStore, head_dim: u32, abilities: Abilities) -> Program {
    let row_words = values.row_words(head_dim as usize) as u32;
    Program {
        constants: vec![
            ("WORKGROUP", 64),
            ("HEAD_DIM", head_dim),
            ("BITS", values.quantised().unwrap_or(8)),
            ("ROW_WORDS", row_words),
        ],
        parts: vec![reduce(abilities), HALF, LEVEL, wgsl!("rope_append_values.wgsl")],
        bindings: vec![(1, Binding::Read), (4, Binding::Write)],
        f16: false,
    }
}

impl Stream {
    pub(super) fn rope_rows(&mut self, qkv: &Tensor, rope: &Rope, cache: &mut Cache) -> Result<()> {
        let shape = cache.shape;
        let position = self.step.position;
        let end = position + qkv.rows;
        let widths = qkv.width == shape.qkv_width() && rope.head_dim == shape.head_dim;
        let inside = end <= cache.context
            && position <= cache.length
            && qkv.rows <= cache.rows
            && (cache.context * shape.head_dim * 4) as u64 <= rope.table.size();
        self.expect("rope_append", widths && qkv.format == TensorFormat::F32 && inside, || {
            let (rows, length) = (qkv.rows, cache.length);
            format!("{rows} rows of {} at {position} of {length} for {shape:?}", qkv.width)
        })?;
        cache.reserve(end)?;
        cache.length = end;

        let cache = &*cache;
        let (values, compressed) = (cache.value_store, cache.compressed.as_ref());
        for part in cache.parts(position..end, 0, usize::MAX - end) {
            let segment = part.tokens;
            let first = (part.keys.start - position) as u32;
            let params = Params {
                position: position as u32,
                first,
                stride: qkv.stride() as u32,
                heads: shape.heads as u32,
                kv_heads: shape.kv_heads as u32,
                head_dim: shape.head_dim as u32,
                cache_dim: cache.padded_dim() as u32,
                key_first: segment.first as u32,
                key_stride: segment.capacity as u32,
                value_first: segment.first as u32,
                value_stride: segment.capacity as u32,
                sink: cache.sink() as u32,
                recent: cache.recent() as u32,
            };
            let keys = match (compressed, &segment.keys) {
                (Some(compressed), _) => &compressed.originals,
                (None, Some(keys)) => keys,
                (None, None) => return Err(self.fault("rope_append", "plain keys have no room")),
            };
            let kernel = Kernel::RopeAppend {
                exact: cache.policy.exact,
                compressed: compressed.is_some(),
                values,
            };
            let quantised = values.quantised().is_some();
            let heads = shape.heads + shape.kv_heads * if quantised { 1 } else { 2 };
            let grid = [(heads * shape.head_dim / 2).div_ceil(64), part.keys.len(), 1];
            let buffers = [&qkv.data, &rope.table, keys, &segment.values];
            let buffers = if quantised { &buffers[..3] } else { &buffers };
            self.recorder.dispatch(kernel, &params, buffers, grid)?;
            if quantised {
                let params = ValueParams {
                    position: position as u32,
                    first,
                    stride: qkv.stride() as u32,
                    values: ((shape.heads + shape.kv_heads) * shape.head_dim) as u32,
                    value_first: segment.first as u32,
                    value_stride: segment.capacity as u32,
                    value_scales: cache.value_scales(segment) as u32,
                };
                let kernel = Kernel::RopeAppendValues { values, head_dim: shape.head_dim as u32 };
                let grid = [shape.kv_heads, part.keys.len(), 1];
                self.recorder.dispatch(kernel, &params, &[&qkv.data, &segment.values], grid)?;
            }
        }
        Ok(())
    }
}
