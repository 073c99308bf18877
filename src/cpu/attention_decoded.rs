//! Keys and values for many queries: decoded a block at a time, before all pass by.
//!
//! Which keys a query sees exactly depends on the query only where a window begins: keys there are
//! scored as originals and as what their pages stand for, and each query takes its own.

use std::ops::Range;

use super::attention::{Block, KEYS, Products, Task};
use super::attention_tiles::{Scores, TILE, add_values, products, raw};
use super::cache::{Cache, Keys, Store, Values};
use super::pages::Reader;
use super::simd::{BLOCK, Simd};
use super::weights::{Float16, Float32, Row};

/// Keys and values of a task.
pub(super) struct Decoded<'a> {
    task: Task<'a>,
    windows: Range<usize>,
    reader: Option<Reader<'a>>,
    /// What the reader keeps.
    state: &'a mut [Block],
    /// `[KEYS, blocks]`.
    keys: &'a mut [Block],
    /// Those that some queries see approximately, in the same rows.
    approximate: &'a mut [Block],
    /// `[KEYS, blocks]`.
    values: &'a mut [Block],
}

impl<'a> Decoded<'a> {
    /// Blocks of memory that it needs.
    pub(super) fn memory(task: &Task<'_>) -> usize {
        let blocks = task.plan.blocks();
        3 * KEYS * blocks + Reader::state(blocks)
    }

    pub(super) fn new(task: Task<'a>, memory: &'a mut [Block]) -> Self {
        let blocks = task.plan.blocks();
        let (keys, rest) = memory.split_at_mut(KEYS * blocks);
        let (approximate, rest) = rest.split_at_mut(KEYS * blocks);
        let (values, rest) = rest.split_at_mut(KEYS * blocks);
        let state = &mut rest[..Reader::state(blocks)];
        state.fill([0.0; BLOCK]);
        let reader = match &task.cache.keys {
            Keys::Plain(_) => None,
            Keys::Compressed(keys) => Some(Reader::new(&keys.layout, &keys.pages[task.kv_head])),
        };
        Self { task, windows: task.windows(), reader, state, keys, approximate, values }
    }

    /// Decodes the keys at `positions`: as they are where any query of the task sees them so.
    ///
    /// Those of them that other queries see approximately are decoded into the same rows of
    /// `approximate`; the range of these rows is given back.
    #[inline(always)]
    fn decode_keys<S: Simd>(&mut self, simd: S, positions: Range<usize>) -> Range<usize> {
        let Self { task, windows, reader, state, keys: out, approximate, .. } = self;
        let Task { cache, kv_head, .. } = *task;
        let head_dim = cache.shape.head_dim;
        let blocks = head_dim.div_ceil(BLOCK);
        let Range { start, end } = positions;
        let (keys, reader) = match (&cache.keys, reader) {
            (Keys::Compressed(keys), Some(reader)) => (keys, reader),
            (Keys::Plain(store), _) => {
                let row = kv_head * cache.context + start;
                decode(simd, store, row, end - start, head_dim, out);
                return 0..0;
            }
            _ => return 0..0,
        };
        let cut = |at: usize| at.clamp(start, end);
        let (far, near) = (cut(cache.policy.sink), cut(windows.start));
        for exact in [start..far, near..end] {
            let mut n = exact.start;
            while n < exact.end {
                let (store, row, neighbours) = keys.original(kv_head, n);
                let count = neighbours.min(exact.end - n);
                decode(simd, store, row, count, head_dim, &mut out[(n - start) * blocks..]);
                n += count;
            }
        }
        if far < near {
            reader.read(simd, far, near - far, state, &mut out[(far - start) * blocks..]);
        }
        let both = near..cut(windows.end);
        if !both.is_empty() {
            let out = &mut approximate[(near - start) * blocks..];
            reader.read(simd, near, both.len(), state, out);
        }
        both.start - start..both.end - start
    }
}

impl Products for Decoded<'_> {
    #[inline(always)]
    fn scores<S: Simd>(
        &mut self,
        simd: S,
        positions: Range<usize>,
        query: &[Block],
        scores: &mut [Block],
    ) {
        let Task { plan, first, .. } = self.task;
        let (start, count) = (positions.start, positions.len());
        let blocks = plan.blocks();
        let both = self.decode_keys(simd, positions);
        let (keys, approximate) =
            (&self.keys[..count * blocks], &self.approximate[..count * blocks]);
        let tiles = query.chunks_exact(TILE * blocks).zip(scores.as_chunks_mut().0);
        for (tile, (query, out)) in tiles.enumerate() {
            products::<S, Float32>(simd, query, raw(keys), out, 0..count, None);
            if both.is_empty() {
                continue;
            }
            let mut scores: Scores = [[0.0; KEYS]; TILE];
            products::<S, Float32>(simd, query, raw(approximate), &mut scores, 0..count, None);
            for (q, (out, scores)) in out.iter_mut().zip(&scores).enumerate() {
                let token = plan.position + first + (tile * TILE + q) / plan.group();
                let end = both.end.min(plan.rule.start(token).saturating_sub(start));
                let far = both.start..end.max(both.start);
                out[far.clone()].copy_from_slice(&scores[far]);
            }
        }
    }

    #[inline(always)]
    fn add_values<S: Simd>(
        &mut self,
        simd: S,
        positions: Range<usize>,
        weights: &mut [Block],
        sums: &mut [Block],
    ) {
        let Task { cache, kv_head, .. } = self.task;
        let Cache { shape, context, .. } = *cache;
        let blocks = shape.head_dim.div_ceil(BLOCK);
        let (start, count) = (positions.start, positions.len());
        let values = &mut self.values[..count * blocks];
        match &cache.values {
            Values::Plain(store) => {
                decode(simd, store, kv_head * context + start, count, shape.head_dim, values);
            }
            Values::Quantised(all) => all.decode(simd, kv_head, start, count, values),
        }
        let rows = (bytemuck::cast_slice(values), blocks * size_of::<Block>());
        add_values::<S, Float32>(simd, weights, rows, sums, None);
    }

    #[inline(always)]
    fn finish<S: Simd>(&self, _simd: S, _sums: &mut [Block]) {}
}

/// Decodes `count` rows `[D]` from `first` on to `[count, blocks]`; what is beyond a row's end
/// becomes zero.
#[inline(always)]
fn decode<S: Simd>(
    simd: S,
    store: &Store,
    first: usize,
    count: usize,
    head_dim: usize,
    out: &mut [Block],
) {
    let out = out.chunks_exact_mut(head_dim.div_ceil(BLOCK));
    let rows = first * head_dim..(first + count) * head_dim;
    match store {
        Store::F32(all) => {
            for (row, out) in all[rows].chunks_exact(head_dim).zip(out) {
                Row::<Float32>::new(bytemuck::cast_slice(row), &[]).decode(simd, out);
            }
        }
        Store::F16(all) => {
            for (row, out) in all[rows].chunks_exact(head_dim).zip(out) {
                Row::<Float16>::new(bytemuck::cast_slice(row), &[]).decode(simd, out);
            }
        }
    }
}
