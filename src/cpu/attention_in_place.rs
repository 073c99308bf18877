//! Keys and values for a few queries: multiplied where they lie.
//!
//! Nothing is written back decoded. What a format multiplies levels by is moved to where there is
//! less of it: the scale of a token's key to its score, scales of channels to the query, once a page
//! (see [`PageScores`]), and the scale of a value to its weight.

use std::ops::Range;

use super::attention::{Block, KEYS, Products, Task};
use super::attention_tiles::{Scores, TILE, add_values, products, raw};
use super::cache::{Cache, Compressed, Keys, Store, Values};
use super::page_scores::PageScores;
use super::reading::NEAR;
use super::simd::{BLOCK, Simd, together};
use super::weights::{Apart4, Float16, Float32, Signed8};
use crate::backend::AttentionShape;
use crate::delta::ValueFormat;

/// Queries of a task up to which this is faster: more are worth decoding a block first.
const QUERIES: usize = 8;

/// Keys and values of a task.
pub(super) struct InPlace<'a> {
    task: Task<'a>,
    /// Where the window of all queries begins.
    window: usize,
    pages: Option<(&'a Compressed, PageScores<'a>)>,
}

impl<'a> InPlace<'a> {
    /// Whether it can do the task, and do it well: heads of whole blocks, few queries, and all of
    /// them with the same window.
    pub(super) fn suits(task: &Task<'_>) -> bool {
        task.queries() <= QUERIES
            && task.plan.shape.head_dim.is_multiple_of(BLOCK)
            && task.windows().is_empty()
    }

    /// Blocks of memory that it needs.
    pub(super) fn memory(task: &Task<'_>) -> usize {
        PageScores::memory(task.padded() / TILE, task.plan.blocks())
    }

    pub(super) fn new(task: Task<'a>, memory: &'a mut [Block]) -> Self {
        let tiles = task.padded() / TILE;
        let pages = match &task.cache.keys {
            Keys::Plain(_) => None,
            Keys::Compressed(keys) => {
                let (pages, ask) = (&keys.pages[task.kv_head], task.plan.reading.asks());
                Some((keys, PageScores::new(&keys.layout, pages, ask, tiles, memory)))
            }
        };
        Self { task, window: task.windows().start, pages }
    }
}

impl Products for InPlace<'_> {
    #[inline(always)]
    fn scores<S: Simd>(
        &mut self,
        simd: S,
        positions: Range<usize>,
        query: &[Block],
        scores: &mut [Block],
    ) {
        let Self { task, window, pages } = self;
        let ask = task.plan.reading.asks().then_some(NEAR);
        let Cache { shape: AttentionShape { head_dim, .. }, context, policy, keys, .. } =
            task.cache;
        let blocks = head_dim / BLOCK;
        let Range { start, end } = positions;
        let found: &mut [Scores] = scores.as_chunks_mut().0;
        match (keys, pages) {
            (Keys::Plain(store), _) => {
                let row = task.kv_head * context + start;
                plain(simd, store, (row * head_dim, ask), query, blocks, 0..end - start, found);
            }
            (Keys::Compressed(_), Some((keys, pages))) => {
                let cut = |at: usize| at.clamp(start, end);
                let (far, near) = (cut(policy.sink), cut(*window));
                if far < near {
                    pages.scores(simd, far..near, query, far - start, found);
                }
                for exact in [start..far, near..end] {
                    let mut n = exact.start;
                    while n < exact.end {
                        let (store, row, neighbours) = keys.original(task.kv_head, n);
                        let count = neighbours.min(exact.end - n);
                        let places = n - start..n - start + count;
                        plain(simd, store, (row * head_dim, ask), query, blocks, places, found);
                        n += count;
                    }
                }
            }
            (Keys::Compressed(_), None) => {}
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
        let Task { plan, cache, kv_head, .. } = self.task;
        let ask = plan.reading.asks();
        let (start, count) = (positions.start, positions.len());
        let head_dim = cache.shape.head_dim;
        // The next block of keys: of this one a few columns pass by in no time.
        let next = |stride: usize| ask.then_some(KEYS * stride);
        let row = kv_head * cache.context + start;
        let rows = row * head_dim..(row + count) * head_dim;
        match &cache.values {
            Values::Plain(Store::F32(all)) => {
                let rows = (bytemuck::cast_slice(&all[rows]), 4 * head_dim);
                add_values::<S, Float32>(simd, weights, rows, sums, next(4 * head_dim));
            }
            Values::Plain(Store::F16(all)) => {
                let rows = (bytemuck::cast_slice(&all[rows]), 2 * head_dim);
                add_values::<S, Float16>(simd, weights, rows, sums, next(2 * head_dim));
            }
            Values::Quantised(all) => {
                all.scale_weights(simd, kv_head, start, count, weights, sums);
                let rows = all.rows(kv_head, start, count);
                let ask = all.distance(kv_head, start, start + KEYS).filter(|_| ask);
                if all.format == ValueFormat::Int8 {
                    add_values::<S, Signed8>(simd, weights, rows, sums, ask);
                } else {
                    add_values::<S, Apart4>(simd, weights, rows, sums, ask);
                }
            }
        }
    }

    #[inline(always)]
    fn finish<S: Simd>(&self, _simd: S, sums: &mut [Block]) {
        if self.task.cache.policy.values == ValueFormat::Int4 {
            sums.iter_mut().for_each(|block| *block = together::<S>(block));
        }
    }
}

/// Products of all queries with rows of a store from element `at` on into `places` of each tile's scores;
/// what lies so many bytes beyond is asked for ahead if `ask`.
#[inline(always)]
fn plain<S: Simd>(
    simd: S,
    store: &Store,
    (at, ask): (usize, Option<usize>),
    query: &[Block],
    blocks: usize,
    places: Range<usize>,
    found: &mut [Scores],
) {
    let rows = at..at + places.len() * blocks * BLOCK;
    for (query, found) in query.chunks_exact(TILE * blocks).zip(found) {
        let (rows, places) = (rows.clone(), places.clone());
        match store {
            Store::F32(all) => {
                products::<S, Float32>(simd, query, raw(&all[rows]), found, places, ask);
            }
            Store::F16(all) => {
                products::<S, Float16>(simd, query, raw(&all[rows]), found, places, ask);
            }
        }
    }
}
