//! `attention`: causal attention by online softmax, in four kernels.
//!
//! Few tokens: `attention` splits the keys into spans, so that one token still fills the GPU, and
//! `attention_merge` joins the spans; compressed pages are read as they are. Many tokens:
//! `attention_tiled` walks over the keys in several dispatches; what compressed pages stand for,
//! `attention_expand` writes to scratch memory before each, since many queries share it. Either way the
//! keys of one invocation are bounded whatever the context: no dispatch runs long, and Mesa's
//! llvmpipe before version 23, which silently ends an invocation's loops after 65535 iterations,
//! stays right.

use super::buffer::Buffer;
use super::cache::{Cache, PageKeys, PageKind, Part, ValueStore};
use super::device::Device;
use super::linear::FEW_TOKENS;
use super::shader::{
    Abilities, Binding, Kernel, Program, key_read, key_rows, page_constants, reduce, value_read,
    wgsl,
};
use super::stream::Stream;
use super::tensor::Tensor;
use crate::backend::{CacheFormat, StreamShape, TensorFormat};
use crate::delta::{ExactRule, Window};
use crate::error::{Error, Result};

/// Plain keys that `attention` scores at a time; of compressed ones a page.
const TILE: usize = 64;

/// Up to here one span is faster than several and a merge.
const ONE_SPAN: usize = 128;

/// Spans of all tokens of a step together: what the partial results are sized for.
const MAX_PARTIALS: usize = 128;

/// Spans of a step that do for any GPU.
const USUAL_PARTIALS: usize = 64;

/// Keys of one dispatch of `attention_tiled`.
const TILED_KEYS: usize = 4096;

/// The same where keys are compressed: keys that are expanded at a time.
const EXPANDED_KEYS: usize = 2048;

/// Queries that a workgroup of `attention_tiled` takes.
const TILED_QUERIES: usize = 32;

/// Largest head: the tiles of `attention` lie in 16 KiB of workgroup memory.
const MAX_HEAD_DIM: usize = 256;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    position: u32,
    qkv_stride: u32,
    out_stride: u32,
    heads: u32,
    group: u32,
    scale: f32,
    start: u32,
    stop: u32,
    span: u32,
    first_span: u32,
    spans: u32,
    key_first: u32,
    key_stride: u32,
    value_first: u32,
    value_stride: u32,
    value_scales: u32,
    sink: u32,
    recent: u32,
    window_kind: u32,
    window: u32,
    page_first: u32,
    kv_heads: u32,
    deltas: u32,
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
struct ExpandParams {
    page: u32,
    page_first: u32,
    kv_heads: u32,
    deltas: u32,
    first: u32,
    stride: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct TiledParams {
    position: u32,
    qkv_stride: u32,
    out_stride: u32,
    tokens: u32,
    group: u32,
    start: u32,
    stop: u32,
    resume: u32,
    last: u32,
    vectors: u32,
    scale: f32,
    key_first: u32,
    key_stride: u32,
    value_first: u32,
    value_stride: u32,
    value_scales: u32,
    sink: u32,
    recent: u32,
    window_kind: u32,
    window: u32,
    expanded_first: u32,
    expanded_stride: u32,
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

fn bindings(compressed: bool) -> Vec<(u32, Binding)> {
    use Binding::{Read, Write};
    let mut bindings = vec![(1, Read), (2, Read), (3, Read), (4, Write), (5, Write)];
    if compressed {
        bindings.push((6, Read));
    }
    bindings
}

pub(super) fn program(
    exact: CacheFormat,
    pages: Option<PageKind>,
    values: ValueStore,
    head_dim: u32,
    abilities: Abilities,
) -> Program {
    let mut parts = vec![reduce(abilities), heads(head_dim), key_read(exact), value_read(values)];
    let mut constants;
    match pages {
        None => {
            constants = head_constants(head_dim);
            constants.push(("TILE", TILE as u32));
            parts.extend([key_rows(false), wgsl!("common/scores_plain.wgsl")]);
        }
        Some(pages) => {
            constants = page_constants(pages, head_dim);
            constants.push(("TILE", pages.page));
            parts.extend([
                key_rows(true),
                wgsl!("common/exact_rule.wgsl"),
                wgsl!("common/page.wgsl"),
                wgsl!("common/scores_paged.wgsl"),
                match pages.keys {
                    PageKeys::Int8 => wgsl!("common/scores_int8.wgsl"),
                    PageKeys::Channel(_) => wgsl!("common/scores_channel.wgsl"),
                    PageKeys::Delta(..) => wgsl!("common/scores_delta.wgsl"),
                },
            ]);
        }
    }
    constants.push(("WORKGROUP", 128));
    parts.push(wgsl!("attention.wgsl"));
    Program { constants, parts, bindings: bindings(pages.is_some()), f16: false }
}

pub(super) fn merge_program(head_dim: u32) -> Program {
    Program {
        constants: head_constants(head_dim),
        parts: vec![heads(head_dim), wgsl!("attention_merge.wgsl")],
        bindings: vec![(4, Binding::Read), (5, Binding::Write)],
        f16: false,
    }
}

pub(super) fn expand_program(pages: PageKind, head_dim: u32) -> Program {
    let mut constants = page_constants(pages, head_dim);
    constants.push(("WORKGROUP", 128));
    let expand = match pages.keys {
        PageKeys::Int8 => wgsl!("common/expand_int8.wgsl"),
        PageKeys::Channel(_) => wgsl!("common/expand_channel.wgsl"),
        PageKeys::Delta(..) => wgsl!("common/expand_delta.wgsl"),
    };
    Program {
        constants,
        parts: vec![wgsl!("common/page.wgsl"), expand, wgsl!("attention_expand.wgsl")],
        bindings: vec![(5, Binding::Write), (6, Binding::Read)],
        f16: false,
    }
}

pub(super) fn tiled_program(
    exact: CacheFormat,
    page: Option<u32>,
    values: ValueStore,
    head_dim: u32,
) -> Program {
    let mut constants = head_constants(head_dim);
    let mut parts = vec![heads(head_dim), key_read(exact), value_read(values)];
    parts.push(key_rows(page.is_some()));
    match page {
        None => parts.push(wgsl!("common/passes_plain.wgsl")),
        Some(page) => {
            constants.push(("PAGE", page));
            parts.push(wgsl!("common/exact_rule.wgsl"));
            parts.push(wgsl!("common/passes_hybrid.wgsl"));
        }
    }
    parts.push(wgsl!("attention_tiled.wgsl"));
    Program { constants, parts, bindings: bindings(page.is_some()), f16: false }
}

/// What attention keeps between its dispatches.
///
/// Partial results take `128 H (D + 4)` floats, 1.4 MB for 20 heads of 128; the softmax's state
/// `2 T H` floats; expanded keys, where keys are compressed, `2048 G D` floats. None grows with the
/// context.
pub(super) struct Scratch {
    /// `[T, span, H, D padded to 4, and 4]` f32.
    partials: Buffer,
    /// `[G, T H / G]` of (maximum, sum), f32.
    states: Buffer,
    /// `[G, EXPANDED_KEYS, D padded to 4]` f32, made when it is needed first.
    expanded: Option<Buffer>,
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
        let partials = (MAX_PARTIALS * heads * partial) as u64;
        let states = (shape.rows * heads * 8) as u64;
        Ok(Self {
            partials: device.storage("partial results of attention", partials)?,
            states: device.storage("states of attention", states)?,
            expanded: None,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        let expanded = self.expanded.as_ref().map_or(0, Buffer::size);
        self.partials.size() + self.states.size() + expanded
    }
}

/// A window as kernels take it: its kind and its size.
fn window(rule: &ExactRule) -> (u32, u32) {
    match rule.window {
        Window::Everything => (0, 1),
        Window::Block(block) => (1, block as u32),
        Window::Sliding(window) => (2, window as u32),
        Window::Pages(window) => (3, window as u32),
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
            && self.step.position + qkv.rows <= cache.length;
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
        let rule = cache.policy.rule(self.step.phase);
        let keys = self.step.position + qkv.rows;
        let compressed = cache.compressed.as_ref();
        let tile = compressed.map_or(TILE, |compressed| compressed.layout.tokens);
        let parts = cache.parts(0..keys, rule.start(keys - 1), usize::MAX - keys);
        let Some((span, spans)) = cut(&parts, tile, qkv.rows, keys) else {
            return self.attention_many(qkv, cache, out);
        };
        let group = shape.heads / shape.kv_heads;
        let (window_kind, window) = window(&rule);
        let kernel = Kernel::Attention {
            exact: cache.policy.exact,
            pages: compressed.map(|compressed| compressed.kind),
            values: cache.value_store,
            head_dim,
        };
        let mut first_span = 0;
        for part in &parts {
            let params = Params {
                position: self.step.position as u32,
                qkv_stride: qkv.stride() as u32,
                out_stride: out.stride() as u32,
                heads: shape.heads as u32,
                group: group as u32,
                scale: scale(shape.head_dim),
                start: part.keys.start as u32,
                stop: part.keys.end as u32,
                span: span as u32,
                first_span: first_span as u32,
                spans: spans as u32,
                key_first: part.tokens.first as u32,
                key_stride: part.tokens.capacity as u32,
                value_first: part.tokens.first as u32,
                value_stride: part.tokens.capacity as u32,
                value_scales: cache.value_scales(part.tokens) as u32,
                sink: cache.sink() as u32,
                recent: cache.recent() as u32,
                window_kind,
                window,
                page_first: part.pages.map_or(0, |pages| pages.first) as u32,
                kv_heads: shape.kv_heads as u32,
                deltas: part.pages.map_or(0, |pages| pages.deltas) as u32,
            };
            let partials = &self.attention.partials;
            let keys = original_keys(cache, part);
            // Where no key is approximate, no page is read.
            let pages = part.pages.map_or(keys, |pages| &pages.buffer);
            let buffers = [&qkv.data, keys, &part.tokens.values, partials, &out.data, pages];
            let buffers = if compressed.is_some() { &buffers } else { &buffers[..5] };
            let spans = part.keys.len().div_ceil(span);
            let grid = [spans, shape.kv_heads * group.div_ceil(4), qkv.rows];
            self.recorder.dispatch(kernel, &params, buffers, grid)?;
            first_span += spans;
        }
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
        self.recorder.dispatch(kernel, &params, &[&self.attention.partials, &out.data], grid)
    }

    fn attention_many(&mut self, qkv: &Tensor, cache: &Cache, out: &Tensor) -> Result<()> {
        let shape = cache.shape;
        let group = shape.heads / shape.kv_heads;
        let rule = cache.policy.rule(self.step.phase);
        let keys = self.step.position + qkv.rows;
        let compressed = cache.compressed.as_ref();
        if compressed.is_some() && self.attention.expanded.is_none() {
            let bytes = 4 * shape.kv_heads * EXPANDED_KEYS * cache.padded_dim();
            let expanded = self.device.storage("expanded keys", bytes as u64)?;
            self.attention.expanded = Some(expanded);
        }
        let most = if compressed.is_some() { EXPANDED_KEYS } else { TILED_KEYS };
        let (window_kind, window) = window(&rule);
        let kernel = Kernel::AttentionTiled {
            exact: cache.policy.exact,
            page: compressed.map(|compressed| compressed.kind.page),
            values: cache.value_store,
            head_dim: shape.head_dim as u32,
        };
        let approximate = rule.start(keys - 1);
        for part in cache.parts(0..keys, approximate, most) {
            self.expand(cache, &part, approximate)?;
            let params = TiledParams {
                position: self.step.position as u32,
                qkv_stride: qkv.stride() as u32,
                out_stride: out.stride() as u32,
                tokens: qkv.rows as u32,
                group: group as u32,
                start: part.keys.start as u32,
                stop: part.keys.end as u32,
                resume: (part.keys.start > 0).into(),
                last: (part.keys.end == keys).into(),
                vectors: shape.head_dim.div_ceil(4).min(8) as u32,
                scale: scale(shape.head_dim),
                key_first: part.tokens.first as u32,
                key_stride: part.tokens.capacity as u32,
                value_first: part.tokens.first as u32,
                value_stride: part.tokens.capacity as u32,
                value_scales: cache.value_scales(part.tokens) as u32,
                sink: cache.sink() as u32,
                recent: cache.recent() as u32,
                window_kind,
                window,
                expanded_first: part.keys.start as u32,
                expanded_stride: EXPANDED_KEYS as u32,
            };
            let keys = original_keys(cache, &part);
            let (states, expanded) = (&self.attention.states, self.attention.expanded.as_ref());
            let mut buffers = vec![&qkv.data, keys, &part.tokens.values, states, &out.data];
            if compressed.is_some() {
                buffers.extend(expanded);
            }
            self.recorder.work(2 * part.keys.len() * qkv.rows * shape.width())?;
            let grid = [(qkv.rows * group).div_ceil(TILED_QUERIES), shape.kv_heads, 1];
            self.recorder.dispatch(kernel, &params, &buffers, grid)?;
        }
        Ok(())
    }

    /// Expands the pages of a part that have keys beyond the sink and before position
    /// `approximate`.
    fn expand(&mut self, cache: &Cache, part: &Part<'_>, approximate: usize) -> Result<()> {
        let (Some(compressed), Some(segment), Some(expanded)) =
            (&cache.compressed, part.pages, &self.attention.expanded)
        else {
            return Ok(());
        };
        let page = compressed.layout.tokens;
        let end = part.keys.end.min(approximate).div_ceil(page);
        let first = (part.keys.start / page).max(cache.sink() / page);
        if first >= end {
            return Ok(());
        }
        let params = ExpandParams {
            page: first as u32,
            page_first: segment.first as u32,
            kv_heads: cache.shape.kv_heads as u32,
            deltas: segment.deltas as u32,
            first: part.keys.start as u32,
            stride: EXPANDED_KEYS as u32,
        };
        let head_dim = cache.shape.head_dim as u32;
        let kernel = Kernel::AttentionExpand { pages: compressed.kind, head_dim };
        let grid = [end - first, cache.shape.kv_heads, 1];
        self.recorder.dispatch(kernel, &params, &[expanded, &segment.buffer], grid)
    }
}

/// Where the original keys of a part lie.
fn original_keys<'a>(cache: &'a Cache, part: &Part<'a>) -> &'a Buffer {
    match (&cache.compressed, &part.tokens.keys) {
        (Some(compressed), _) => &compressed.originals,
        (None, Some(keys)) => keys,
        // A segment has plain keys unless keys are compressed.
        (None, None) => &part.tokens.values,
    }
}

/// Keys of a span, a multiple of the tile, and how many spans all parts have together; nothing where
/// partial results have no room for them.
fn cut(parts: &[Part<'_>], tile: usize, rows: usize, keys: usize) -> Option<(usize, usize)> {
    let spans = |span: usize| parts.iter().map(|part| part.keys.len().div_ceil(span)).sum();
    if keys <= ONE_SPAN && parts.len() == 1 {
        return Some((ONE_SPAN, 1));
    }
    let most = MAX_PARTIALS / rows.max(1);
    if parts.len() > most {
        return None;
    }
    let mut span = keys.div_ceil(USUAL_PARTIALS / rows.max(1)).next_multiple_of(tile);
    // Every part may have a last span that is not full.
    while spans(span) > most {
        span += tile;
    }
    Some((span, spans(span)))
}

/// `1 / sqrt(D)`.
fn scale(head_dim: usize) -> f32 {
    (1.0 / (head_dim as f64).sqrt()) as f32
}
