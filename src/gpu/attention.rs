//! `attention`: causal attention by online softmax, in three kernels.
//!
//! Few tokens: `attention` splits the keys into spans, so that one token still fills the GPU, and
//! `attention_merge` joins the spans. Many tokens: `attention_tiled` walks over the keys in
//! several dispatches. Either way the keys of one invocation are bounded whatever the context: no
//! dispatch runs long, and Mesa's llvmpipe before version 23, which silently ends an invocation's
//! loops after 65535 iterations, stays right.

use super::buffer::Buffer;
use super::device::Device;
use super::linear::FEW_TOKENS;
use super::shader::{Abilities, Binding, Kernel, Program, cache_read, reduce, wgsl};
use super::stream::Stream;
use super::tensor::{Cache, Tensor};
use crate::backend::{CacheFormat, StreamShape, TensorFormat};
use crate::error::{Error, Result};

/// Keys that `attention` scores at a time.
const TILE: usize = 64;

/// Up to here one span is faster than several and a merge.
const ONE_SPAN: usize = 2 * TILE;

/// Spans of all tokens of a step together: what the partial results are sized for.
const MAX_PARTIALS: usize = 64;

/// Keys of one dispatch of `attention_tiled`.
const TILED_KEYS: usize = 4096;

/// Queries that a workgroup of `attention_tiled` takes.
const TILED_QUERIES: usize = 32;

/// Largest head: the tiles of `attention` lie in 16 KiB of workgroup memory.
const MAX_HEAD_DIM: usize = 256;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    position: u32,
    context: u32,
    qkv_stride: u32,
    out_stride: u32,
    heads: u32,
    group: u32,
    span: u32,
    spans: u32,
    scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct MergeParams {
    out_stride: u32,
    heads: u32,
    spans: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct TiledParams {
    position: u32,
    context: u32,
    qkv_stride: u32,
    out_stride: u32,
    tokens: u32,
    group: u32,
    start: u32,
    stop: u32,
    vectors: u32,
    scale: f32,
}

fn head_constants(head_dim: u32) -> Vec<(&'static str, u32)> {
    vec![("HEAD_DIM", head_dim), ("DIM4", head_dim.div_ceil(4))]
}

/// The snippet that reads queries and writes results.
fn heads(head_dim: u32) -> &'static str {
    if head_dim.is_multiple_of(4) {
        wgsl!("common/heads_vec4.wgsl")
    } else {
        wgsl!("common/heads_scalar.wgsl")
    }
}

fn bindings() -> Vec<(u32, Binding)> {
    use Binding::{Read, Write};
    vec![(1, Read), (2, Read), (3, Read), (4, Write), (5, Write)]
}

pub(super) fn program(cache: CacheFormat, head_dim: u32, abilities: Abilities) -> Program {
    let mut constants = head_constants(head_dim);
    constants.push(("WORKGROUP", 128));
    Program {
        constants,
        parts: vec![reduce(abilities), cache_read(cache), heads(head_dim), wgsl!("attention.wgsl")],
        bindings: bindings(),
        f16: false,
    }
}

pub(super) fn merge_program(head_dim: u32) -> Program {
    Program {
        constants: head_constants(head_dim),
        parts: vec![heads(head_dim), wgsl!("attention_merge.wgsl")],
        bindings: vec![(4, Binding::Read), (5, Binding::Write)],
        f16: false,
    }
}

pub(super) fn tiled_program(cache: CacheFormat, head_dim: u32) -> Program {
    Program {
        constants: head_constants(head_dim),
        parts: vec![cache_read(cache), heads(head_dim), wgsl!("attention_tiled.wgsl")],
        bindings: bindings(),
        f16: false,
    }
}

/// What attention keeps between its dispatches.
///
/// Partial results take `64 H (D + 4)` floats, 0.7 MB for 20 heads of 128; the softmax's state
/// `2 T H` floats. Neither grows with the context.
pub(super) struct Scratch {
    /// `[T, span, H, D padded to 4, and 4]` f32.
    partials: Buffer,
    /// `[G, T H / G]` of (maximum, sum), f32; for contexts that take several dispatches.
    states: Buffer,
}

impl Scratch {
    pub(super) fn new(device: &Device, shape: &StreamShape) -> Result<Self> {
        let (heads, head_dim) = (shape.attention.heads, shape.attention.head_dim);
        if head_dim > MAX_HEAD_DIM {
            return Err(Error::DeviceLimit {
                device: device.info.name.clone(),
                what: "a head of attention".to_owned(),
                needed: head_dim as u64,
                limit_name: "the largest head of the GPU kernels",
                limit: MAX_HEAD_DIM as u64,
            });
        }
        let partial = (head_dim.next_multiple_of(4) + 4) * 4;
        let partials = MAX_PARTIALS * heads * partial;
        let states = if shape.context > TILED_KEYS { shape.rows * heads * 8 } else { 0 };
        Ok(Self {
            partials: device.storage("partial results of attention", partials as u64)?,
            states: device.storage("states of attention", states as u64)?,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.partials.size() + self.states.size()
    }
}

impl Stream {
    pub(super) fn attention_rows(
        &mut self,
        qkv: &Tensor,
        cache: &Cache,
        out: &mut Tensor,
    ) -> Result<()> {
        let shape = cache.shape;
        let same = shape == self.shape.attention && cache.context <= self.shape.context;
        let widths = qkv.width == shape.qkv_width() && out.width == shape.width();
        let floats = qkv.format == TensorFormat::F32 && out.format == TensorFormat::F32;
        let inside = qkv.rows <= out.capacity.min(self.shape.rows)
            && self.step.position + qkv.rows <= cache.context;
        self.expect("attention", same && widths && floats && inside, || {
            format!("{} rows of width {} for {shape:?}", qkv.rows, qkv.width)
        })?;
        out.rows = qkv.rows;
        if qkv.rows <= FEW_TOKENS {
            self.attention_few(qkv, cache, out)
        } else {
            self.attention_many(qkv, cache, out)
        }
    }

    fn attention_few(&mut self, qkv: &Tensor, cache: &Cache, out: &Tensor) -> Result<()> {
        let shape = cache.shape;
        let head_dim = shape.head_dim as u32;
        let keys = self.step.position + qkv.rows;
        let max_spans = if keys <= ONE_SPAN { 1 } else { MAX_PARTIALS / qkv.rows.max(1) };
        let span = keys.div_ceil(max_spans).next_multiple_of(TILE);
        let spans = keys.div_ceil(span);
        let group = shape.heads / shape.kv_heads;
        let params = Params {
            position: self.step.position as u32,
            context: cache.context as u32,
            qkv_stride: qkv.stride() as u32,
            out_stride: out.stride() as u32,
            heads: shape.heads as u32,
            group: group as u32,
            span: span as u32,
            spans: spans as u32,
            scale: scale(shape.head_dim),
        };
        let partials = &self.attention.partials;
        let buffers = [&qkv.data, &cache.keys, &cache.values, partials, &out.data];
        let kernel = Kernel::Attention { cache: cache.format, head_dim };
        let grid = [spans, shape.kv_heads * group.div_ceil(4), qkv.rows];
        self.recorder.dispatch(kernel, &params, &buffers, grid)?;
        if spans == 1 {
            return Ok(());
        }
        let params = MergeParams {
            out_stride: out.stride() as u32,
            heads: shape.heads as u32,
            spans: spans as u32,
        };
        let kernel = Kernel::AttentionMerge { head_dim };
        let grid = [shape.heads, qkv.rows, 1];
        self.recorder.dispatch(kernel, &params, &[partials, &out.data], grid)
    }

    fn attention_many(&mut self, qkv: &Tensor, cache: &Cache, out: &Tensor) -> Result<()> {
        let shape = cache.shape;
        let group = shape.heads / shape.kv_heads;
        let keys = self.step.position + qkv.rows;
        for start in (0..keys).step_by(TILED_KEYS) {
            let params = TiledParams {
                position: self.step.position as u32,
                context: cache.context as u32,
                qkv_stride: qkv.stride() as u32,
                out_stride: out.stride() as u32,
                tokens: qkv.rows as u32,
                group: group as u32,
                start: start as u32,
                stop: (start + TILED_KEYS).min(keys) as u32,
                vectors: shape.head_dim.div_ceil(4).min(8) as u32,
                scale: scale(shape.head_dim),
            };
            let states = &self.attention.states;
            let buffers = [&qkv.data, &cache.keys, &cache.values, states, &out.data];
            let head_dim = shape.head_dim as u32;
            let kernel = Kernel::AttentionTiled { cache: cache.format, head_dim };
            let tile_keys = (params.stop - params.start) as usize;
            self.recorder.work(2 * tile_keys * qkv.rows * shape.width())?;
            let grid = [(qkv.rows * group).div_ceil(TILED_QUERIES), shape.kv_heads, 1];
            self.recorder.dispatch(kernel, &params, &buffers, grid)?;
        }
        Ok(())
    }
}

/// `1 / sqrt(D)`.
fn scale(head_dim: usize) -> f32 {
    (1.0 / (head_dim as f64).sqrt()) as f32
}
