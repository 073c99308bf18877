//! Causal attention by online softmax.
//!
//! A task is one KV head, a few tokens, and a segment of the sequence: all query heads of the
//! group times the tokens pass by each block of keys and values, which is read and decoded once.
//! Where heads and tokens are too few to keep all threads busy, as in decoding, the sequence is cut
//! into segments, the results of which are merged in the end; see Flash-Decoding
//! (<https://crfm.stanford.edu/2023/10/12/flashdecoding.html>), after FlashAttention
//! (<https://arxiv.org/abs/2205.14135>).
//!
//! Where keys are compressed, a block holds original keys and such that pages stand for, side by
//! side. Which of the two a query sees depends on the query only where a window begins: keys
//! there are scored as both, and each query takes its own.

use std::ops::Range;

use super::cache::{Cache, Compressed, Keys, Store, Values};
use super::pages::Reader;
use super::rows::Blocks;
use super::simd::{BLOCK, Kernel, Simd};
use super::tensor::{Aligned, Tensor};
use super::weights::{Float16, Float32, Row, Weight};
use super::{Machine, Scratch};
use crate::backend::AttentionShape;
use crate::delta::{ExactRule, Phase};

/// Keys that are looked at together: their scores are a block.
const KEYS: usize = BLOCK;

/// Query rows of a task, about: tokens times query heads of a group.
const QUERIES: usize = 32;

/// Query rows of a task up to which keys and values are multiplied where they lie: more are worth
/// decoding a block first.
const DIRECT: usize = 8;

/// Keys of the shortest segment that is worth a task.
const SEGMENT: usize = 256;

type Block = [f32; BLOCK];

/// How the work is cut.
struct Plan {
    shape: AttentionShape,
    /// Which keys a query sees exactly.
    rule: ExactRule,
    /// Position of the first token.
    position: usize,
    /// Tokens of the step.
    rows: usize,
    /// Tokens of a task.
    tokens: usize,
    /// Segments of the sequence, and the keys of each.
    segments: usize,
    segment: usize,
}

impl Plan {
    fn new(cache: &Cache, phase: Phase, position: usize, rows: usize, threads: usize) -> Self {
        let shape = cache.shape;
        let tokens = (QUERIES / (shape.heads / shape.kv_heads)).clamp(1, rows.max(1));
        let tasks = shape.kv_heads * rows.div_ceil(tokens);
        let keys = position + rows;
        let wanted = if threads > 1 { (4 * threads).div_ceil(tasks.max(1)) } else { 1 };
        let segments = wanted.min(keys.div_ceil(SEGMENT)).max(1);
        // Whole pages: no two tasks of a query decode the same.
        let unit = match cache.keys {
            Keys::Plain(_) => KEYS,
            Keys::Compressed(_) => KEYS.max(cache.policy.page),
        };
        let segment = keys.div_ceil(segments).next_multiple_of(unit);
        let segments = keys.div_ceil(segment).max(1);
        let rule = cache.policy.rule(phase);
        Self { shape, rule, position, rows, tokens, segments, segment }
    }

    /// Query heads that share a KV head.
    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// Blocks of a head.
    fn blocks(&self) -> usize {
        self.shape.head_dim.div_ceil(BLOCK)
    }

    /// Blocks of the result of one query: its largest score and its sum in the first, then the
    /// weighted sum of the values.
    fn result(&self) -> usize {
        1 + self.blocks()
    }
}

/// See [`crate::backend::Operations::attention`].
pub(super) fn attention(
    machine: &Machine,
    scratch: &Scratch,
    partial: &mut Aligned<f32>,
    (position, phase): (usize, Phase),
    qkv: &Tensor,
    cache: &Cache,
    out: &mut Tensor,
) {
    let shape = cache.shape;
    let plan = Plan::new(cache, phase, position, qkv.rows(), machine.threads.count());
    assert_eq!(qkv.width(), shape.qkv_width(), "qkv width");
    assert!(position + plan.rows <= cache.context, "context");
    out.set_rows(plan.rows);

    // Results are [token block][KV head][segment][token][query head of the group].
    let per_task = plan.tokens * plan.group() * plan.result();
    let tasks = plan.rows.div_ceil(plan.tokens) * shape.kv_heads * plan.segments;
    partial.grow(tasks * per_task * BLOCK);
    let results = &mut partial.as_chunks_mut::<BLOCK>().0[..tasks * per_task];
    let small = (position + plan.rows) * plan.rows * shape.width() < 16 * 1024;
    // The last tokens see the most keys: begin with them.
    let items: Vec<_> = results.chunks_exact_mut(per_task).enumerate().rev().collect();
    machine.each_of(small, items, |worker, (task, results)| {
        let (task, segment) = (task / plan.segments, task % plan.segments);
        let (tokens, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        let first = tokens * plan.tokens;
        machine.level.run(Attend {
            plan: &plan,
            qkv,
            cache,
            kv_head,
            first,
            tokens: plan.tokens.min(plan.rows - first),
            segment,
            scratch: &mut scratch.of(worker),
            results,
        });
    });

    let results = &*results;
    let width = out.width();
    let items: Vec<_> = out.floats_mut().chunks_exact_mut(width).enumerate().collect();
    machine.each_of(small, items, |_worker, (token, out)| {
        for (head, out) in out.chunks_exact_mut(shape.head_dim).enumerate() {
            let (kv_head, in_group) = (head / plan.group(), head % plan.group());
            let task = (token / plan.tokens * shape.kv_heads + kv_head) * plan.segments;
            let query = token % plan.tokens * plan.group() + in_group;
            let parts = (0..plan.segments)
                .map(|segment| &results[(task + segment) * per_task + query * plan.result()..]);
            merge(parts, out);
        }
    });
}

/// Adds up the segments of one query and divides by the sum of the weights, `[D]`.
fn merge<'a>(parts: impl Iterator<Item = &'a [Block]> + Clone, out: &mut [f32]) {
    let max = parts.clone().map(|part| part[0][0]).fold(f32::NEG_INFINITY, f32::max);
    out.fill(0.0);
    let mut total = 0.0;
    for part in parts {
        let [part_max, sum, ..] = part[0];
        // A segment that lies ahead of the token has no weight.
        if sum != 0.0 {
            let weight = (part_max - max).exp();
            total += weight * sum;
            for (out, v) in out.iter_mut().zip(part[1..].as_flattened()) {
                *out += weight * v;
            }
        }
    }
    for out in out {
        *out /= total;
    }
}

/// One task.
struct Attend<'a> {
    plan: &'a Plan,
    qkv: &'a Tensor,
    cache: &'a Cache,
    kv_head: usize,
    /// The first token, and how many there are.
    first: usize,
    tokens: usize,
    segment: usize,
    scratch: &'a mut Aligned<f32>,
    /// [`Plan::result`] blocks for each token and head of the group.
    results: &'a mut [Block],
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { plan, qkv, cache, kv_head, first, tokens, segment, scratch, results } = self;
        let (blocks, group) = (plan.blocks(), plan.group());
        let head_dim = plan.shape.head_dim;
        let queries = tokens * group;
        // Tiles have four queries.
        let padded = queries.next_multiple_of(4);

        let state = Reader::state(blocks);
        scratch.grow((2 * padded * blocks + 3 * KEYS * blocks + state + 2 * padded) * BLOCK);
        let (query, rest) = scratch.as_chunks_mut::<BLOCK>().0.split_at_mut(padded * blocks);
        let (sums, rest) = rest.split_at_mut(padded * blocks);
        let (keys, rest) = rest.split_at_mut(KEYS * blocks);
        let (values, rest) = rest.split_at_mut(KEYS * blocks);
        let (weights, rest) = rest.split_at_mut(padded);
        let (approximate, rest) = rest.split_at_mut(KEYS * blocks);
        let (other_weights, rest) = rest.split_at_mut(padded);
        let mut source = KeySource::new(plan, cache, kv_head, first..first + tokens);
        let state = &mut rest[..state];
        state.fill([0.0; BLOCK]);
        query.fill([0.0; BLOCK]);
        sums.fill([0.0; BLOCK]);
        for result in results.chunks_exact_mut(plan.result()) {
            result[0][..2].copy_from_slice(&[f32::NEG_INFINITY, 0.0]);
        }

        // Queries times 1 / sqrt(D), [tokens, group].
        let scale = simd.splat(1.0 / (head_dim as f32).sqrt());
        for (i, query) in query.chunks_exact_mut(blocks).take(queries).enumerate() {
            let head = kv_head * group + i % group;
            let row = Blocks::new(&qkv.row(first + i / group)[head * head_dim..][..head_dim]);
            for (block, query) in query.iter_mut().enumerate() {
                for i in 0..BLOCK / S::LANES {
                    simd.store(query, i, simd.mul(simd.load(row.get(block), i), scale));
                }
            }
        }

        let end = ((segment + 1) * plan.segment).min(plan.position + first + tokens);
        for start in (segment * plan.segment..end).step_by(KEYS) {
            let count = KEYS.min(end - start);
            let direct = queries <= DIRECT && count == KEYS && head_dim.is_multiple_of(BLOCK);
            let row = kv_head * cache.context + start;
            let rows = row * head_dim..(row + KEYS) * head_dim;
            match &cache.keys {
                Keys::Plain(Store::F16(all)) if direct => {
                    scores_of::<S, Float16>(simd, query, raw(&all[rows.clone()]), blocks, weights);
                }
                Keys::Plain(Store::F32(all)) if direct => {
                    scores_of::<S, Float32>(simd, query, raw(&all[rows.clone()]), blocks, weights);
                }
                _ => {
                    let both = source.read(simd, start..start + count, state, keys, approximate);
                    // What is not there has weight zero, and must not be NaN.
                    keys[count * blocks..].fill([0.0; BLOCK]);
                    scores_of::<S, Float32>(simd, query, raw(keys), blocks, weights);
                    if !both.is_empty() {
                        let approximate = raw(approximate);
                        scores_of::<S, Float32>(simd, query, approximate, blocks, other_weights);
                        let pairs = weights.iter_mut().zip(&*other_weights).enumerate();
                        for (i, (weights, other)) in pairs {
                            let window = plan.rule.start(plan.position + first + i / group);
                            let end = both.end.min(window.saturating_sub(start));
                            let far = both.start..end.max(both.start);
                            weights[far.clone()].copy_from_slice(&other[far]);
                        }
                    }
                }
            }
            for i in 0..queries {
                // The token sees the keys up to its own position.
                let seen = (plan.position + first + i / group + 1).saturating_sub(start).min(count);
                let result = &mut results[i * plan.result()];
                let rescale = soften(simd, &mut weights[i], seen, result);
                if rescale == 1.0 {
                    continue;
                }
                for sums in &mut sums[i * blocks..][..blocks] {
                    for i in 0..BLOCK / S::LANES {
                        let scaled = simd.mul(simd.load(sums, i), simd.splat(rescale));
                        simd.store(sums, i, scaled);
                    }
                }
            }
            match &cache.values {
                Values::Plain(Store::F16(all)) if direct => {
                    add_values_of::<S, Float16>(simd, weights, raw(&all[rows]), blocks, sums);
                }
                Values::Plain(Store::F32(all)) if direct => {
                    add_values_of::<S, Float32>(simd, weights, raw(&all[rows]), blocks, sums);
                }
                all => {
                    match all {
                        Values::Plain(store) => {
                            decode(simd, store, row, count, head_dim, values);
                        }
                        Values::Quantised(all) => all.decode(simd, kv_head, start, count, values),
                    }
                    let values = raw(&values[..count * blocks]);
                    add_values_of::<S, Float32>(simd, weights, values, blocks, sums);
                }
            }
        }
        for (result, sums) in
            results.chunks_exact_mut(plan.result()).zip(sums.chunks_exact(blocks)).take(queries)
        {
            result[1..].copy_from_slice(sums);
        }
    }
}

/// Where the keys of a task come from.
struct KeySource<'a> {
    cache: &'a Cache,
    kv_head: usize,
    /// Where the windows of the task's first and last token begin, behind the sink.
    windows: Range<usize>,
    pages: Option<(&'a Compressed, Reader<'a>)>,
}

impl<'a> KeySource<'a> {
    fn new(plan: &Plan, cache: &'a Cache, kv_head: usize, tokens: Range<usize>) -> Self {
        let start = |token: usize| plan.rule.start(plan.position + token).max(plan.rule.sink);
        let windows = start(tokens.start)..start(tokens.end - 1);
        let pages = match &cache.keys {
            Keys::Plain(_) => None,
            Keys::Compressed(keys) => Some((keys, Reader::new(&keys.layout, &keys.pages[kv_head]))),
        };
        Self { cache, kv_head, windows, pages }
    }

    /// Decodes the keys at `positions` into `out` `[positions, blocks]`: as they are where any
    /// query of the task sees them so.
    ///
    /// Those of them that other queries see approximately are decoded into the same rows of
    /// `approximate`; the range of these rows is given back.
    #[inline(always)]
    fn read<S: Simd>(
        &mut self,
        simd: S,
        positions: Range<usize>,
        state: &mut [Block],
        out: &mut [Block],
        approximate: &mut [Block],
    ) -> Range<usize> {
        let Self { cache, kv_head, windows, pages } = self;
        let head_dim = cache.shape.head_dim;
        let blocks = head_dim.div_ceil(BLOCK);
        let Range { start, end } = positions;
        let Some((keys, reader)) = pages else {
            if let Keys::Plain(store) = &cache.keys {
                let row = *kv_head * cache.context + start;
                decode(simd, store, row, end - start, head_dim, out);
            }
            return 0..0;
        };
        let cut = |at: usize| at.clamp(start, end);
        let (far, near) = (cut(cache.policy.sink), cut(windows.start));
        for exact in [start..far, near..end] {
            let mut n = exact.start;
            while n < exact.end {
                let (store, row, neighbours) = keys.original(*kv_head, n);
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

/// Rows as blocks of encoded columns.
#[inline(always)]
fn raw<T: bytemuck::Pod, const BYTES: usize>(rows: &[T]) -> &[[u8; BYTES]] {
    bytemuck::cast_slice::<T, u8>(rows).as_chunks().0
}

/// Scores of all queries with all keys, in tiles that suit the registers.
#[inline(always)]
fn scores_of<S: Simd, W: Weight>(
    simd: S,
    query: &[Block],
    keys: &[W::Raw],
    blocks: usize,
    weights: &mut [Block],
) {
    if S::TILE >= 4 {
        scores::<S, W, 4>(simd, query, keys, blocks, weights);
    } else {
        scores::<S, W, 2>(simd, query, keys, blocks, weights);
    }
}

/// Scores of all queries `[padded, blocks]` with all keys `[KEYS, blocks]`, `Q` times four at once.
#[inline(always)]
fn scores<S: Simd, W: Weight, const Q: usize>(
    simd: S,
    query: &[Block],
    keys: &[W::Raw],
    blocks: usize,
    scores: &mut [Block],
) {
    for (query, scores) in query.chunks_exact(Q * blocks).zip(scores.chunks_exact_mut(Q)) {
        let query: [_; Q] = std::array::from_fn(|q| &query[q * blocks..][..blocks]);
        for (group, keys) in keys.chunks_exact(4 * blocks).enumerate() {
            let keys: [_; 4] = std::array::from_fn(|k| &keys[k * blocks..][..blocks]);
            let mut sums = [[simd.splat(0.0); 4]; Q];
            for block in 0..blocks {
                for i in 0..BLOCK / S::LANES {
                    let mut k = [simd.splat(0.0); 4];
                    for j in 0..4 {
                        k[j] = W::load(simd, &keys[j][block], 0, i);
                    }
                    for q in 0..Q {
                        let query = simd.load(&query[q][block], i);
                        for j in 0..4 {
                            sums[q][j] = simd.fma(query, k[j], sums[q][j]);
                        }
                    }
                }
            }
            for q in 0..Q {
                scores[q][4 * group..][..4].copy_from_slice(&simd.sum4(sums[q]));
            }
        }
    }
}

/// Turns the scores of one query into weights, `exp(score - largest so far)`, zero beyond the
/// first `seen`; keeps the largest and the sum in `result`, and returns what earlier sums are to
/// be multiplied by.
#[inline(always)]
fn soften<S: Simd>(simd: S, scores: &mut Block, seen: usize, result: &mut Block) -> f32 {
    scores[seen..].fill(f32::NEG_INFINITY);
    let [old, sum, ..] = *result;
    let mut max = simd.splat(old);
    for i in 0..BLOCK / S::LANES {
        max = simd.max(max, simd.load(scores, i));
    }
    let max = simd.max_lane(max);
    if max == f32::NEG_INFINITY {
        // Nothing is seen yet.
        scores.fill(0.0);
        return 1.0;
    }
    for i in 0..BLOCK / S::LANES {
        let score = simd.load(scores, i);
        simd.store(scores, i, simd.exp(simd.sub(score, simd.splat(max))));
    }
    scores[seen..].fill(0.0);
    let mut added = simd.splat(0.0);
    for i in 0..BLOCK / S::LANES {
        added = simd.add(added, simd.load(scores, i));
    }
    let rescale = if max == old { 1.0 } else { (old - max).exp() };
    result[0] = max;
    result[1] = sum * rescale + simd.sum(added);
    rescale
}

/// Adds weights `[padded, KEYS]` times values `[count, blocks]` to sums `[padded, blocks]`.
#[inline(always)]
fn add_values_of<S: Simd, W: Weight>(
    simd: S,
    weights: &[Block],
    values: &[W::Raw],
    blocks: usize,
    sums: &mut [Block],
) {
    if S::LANES < 16 {
        add_values::<S, W, 2, 1>(simd, weights, values, blocks, sums);
    } else if blocks.is_multiple_of(2) {
        add_values::<S, W, 4, 2>(simd, weights, values, blocks, sums);
    } else {
        add_values::<S, W, 4, 1>(simd, weights, values, blocks, sums);
    }
}

/// The same, for `Q` queries and `B` blocks at once.
#[inline(always)]
fn add_values<S: Simd, W: Weight, const Q: usize, const B: usize>(
    simd: S,
    weights: &[Block],
    values: &[W::Raw],
    blocks: usize,
    sums: &mut [Block],
) {
    for (weights, sums) in weights.chunks_exact(Q).zip(sums.chunks_exact_mut(Q * blocks)) {
        let weights: [_; Q] = std::array::from_fn(|q| &weights[q]);
        for first in (0..blocks).step_by(B) {
            let mut added = [[[simd.splat(0.0); 8]; B]; Q];
            for q in 0..Q {
                for b in 0..B {
                    for i in 0..BLOCK / S::LANES {
                        added[q][b][i] = simd.load(&sums[q * blocks + first + b], i);
                    }
                }
            }
            for (key, values) in values.chunks_exact(blocks).take(KEYS).enumerate() {
                let values = &values[first..][..B];
                for b in 0..B {
                    for i in 0..BLOCK / S::LANES {
                        let v = W::load(simd, &values[b], 0, i);
                        for q in 0..Q {
                            let weight = simd.splat(weights[q][key]);
                            added[q][b][i] = simd.fma(weight, v, added[q][b][i]);
                        }
                    }
                }
            }
            for q in 0..Q {
                for b in 0..B {
                    for i in 0..BLOCK / S::LANES {
                        simd.store(&mut sums[q * blocks + first + b], i, added[q][b][i]);
                    }
                }
            }
        }
    }
}
