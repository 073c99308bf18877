//! Causal attention by online softmax.
//!
//! A task is one KV head, a few tokens, and a segment of the sequence: all query heads of the
//! group times the tokens pass by each block of keys and values. Many queries pass by a block that
//! is decoded first ([`Decoded`]); for a few, as in decoding, that would take longer than the
//! products themselves, and they multiply what is there as it lies ([`InPlace`]).
//!
//! Where heads and tokens are too few to keep all threads busy, as in decoding, the sequence is cut
//! into segments, the results of which are merged in the end; see Flash-Decoding
//! (<https://crfm.stanford.edu/2023/10/12/flashdecoding.html>), after FlashAttention
//! (<https://arxiv.org/abs/2205.14135>).
//!
//! Where keys are compressed, a block holds original keys and such that pages stand for, side by
//! side.

use std::ops::Range;

use super::attention_decoded::Decoded;
use super::attention_in_place::InPlace;
use super::cache::{Cache, Keys};
use super::reading::Reading;
use super::rows::Blocks;
use super::simd::{BLOCK, Kernel, Simd};
use super::tensor::{Aligned, Tensor};
use super::{Machine, Scratch};
use crate::backend::AttentionShape;
use crate::delta::{ExactRule, Phase};

/// Keys that are looked at together: their scores are a block.
pub(super) const KEYS: usize = BLOCK;

/// Query rows of a task, about: tokens times query heads of a group.
const QUERIES: usize = 32;

/// Keys of the shortest segment that is worth a task.
const SEGMENT: usize = 256;

pub(super) type Block = [f32; BLOCK];

/// How the work is cut.
pub(super) struct Plan {
    pub(super) shape: AttentionShape,
    /// Which keys a query sees exactly.
    pub(super) rule: ExactRule,
    /// Position of the first token.
    pub(super) position: usize,
    /// Tokens of the step.
    rows: usize,
    /// Tokens of a task.
    tokens: usize,
    /// Segments of the sequence, and the keys of each.
    segments: usize,
    segment: usize,
    pub(super) reading: Reading,
}

impl Plan {
    fn new(cache: &Cache, phase: Phase, position: usize, rows: usize, machine: &Machine) -> Self {
        let (threads, reading) = (machine.threads.count(), machine.reading);
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
        Self { shape, rule, position, rows, tokens, segments, segment, reading }
    }

    /// Query heads that share a KV head.
    pub(super) fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// Blocks of a head.
    pub(super) fn blocks(&self) -> usize {
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
    let plan = Plan::new(cache, phase, position, qkv.rows(), machine);
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
        let tokens = plan.tokens.min(plan.rows - first);
        machine.level.run(Attend {
            task: Task { plan: &plan, cache, kv_head, first, tokens },
            qkv,
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

/// What a task is about, but for the segment.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    pub(super) plan: &'a Plan,
    pub(super) cache: &'a Cache,
    pub(super) kv_head: usize,
    /// The first token, and how many there are.
    pub(super) first: usize,
    pub(super) tokens: usize,
}

impl Task<'_> {
    /// Where the windows of its first and last token begin, behind the sink: what lies between the
    /// two, some of its queries see exactly and others do not.
    pub(super) fn windows(&self) -> Range<usize> {
        let Self { plan, first, tokens, .. } = *self;
        let start = |n: usize| plan.rule.start(plan.position + n).max(plan.rule.sink);
        start(first)..start(first + tokens - 1)
    }

    /// How many queries it has.
    pub(super) fn queries(&self) -> usize {
        self.tokens * self.plan.group()
    }

    /// The same with those of zeros that fill up the last four: kernels take four at once.
    pub(super) fn padded(&self) -> usize {
        self.queries().next_multiple_of(4)
    }
}

/// How the queries of a task meet keys and values. Methods are `#[inline(always)]`.
pub(super) trait Products {
    /// Writes the products of all queries `[padded, blocks]` with the keys at `positions`, at most
    /// [`KEYS`] from a multiple of that on, into the first of `scores` `[padded]`.
    fn scores<S: Simd>(
        &mut self,
        simd: S,
        positions: Range<usize>,
        query: &[Block],
        scores: &mut [Block],
    );

    /// Adds `weights` `[padded]` times the values at `positions` to `sums` `[padded, blocks + 1]`;
    /// what goes to all elements alike may go to the last block, each lane of it. The weights are
    /// not needed any more.
    fn add_values<S: Simd>(
        &mut self,
        simd: S,
        positions: Range<usize>,
        weights: &mut [Block],
        sums: &mut [Block],
    );

    /// Brings `sums` into the order of the elements, once all values have passed by.
    fn finish<S: Simd>(&self, simd: S, sums: &mut [Block]);
}

/// One task and segment.
struct Attend<'a> {
    task: Task<'a>,
    qkv: &'a Tensor,
    segment: usize,
    scratch: &'a mut Aligned<f32>,
    /// [`Plan::result`] blocks for each token and head of the group.
    results: &'a mut [Block],
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { task, qkv, segment, scratch, results } = self;
        let (padded, blocks) = (task.padded(), task.plan.blocks());
        let in_place = InPlace::suits(&task);
        let own = if in_place { InPlace::memory(&task) } else { Decoded::memory(&task) };
        scratch.grow((padded * (2 * blocks + 2) + own) * BLOCK);
        let (query, rest) = scratch.as_chunks_mut::<BLOCK>().0.split_at_mut(padded * blocks);
        let (sums, rest) = rest.split_at_mut(padded * (blocks + 1));
        let (weights, rest) = rest.split_at_mut(padded);
        load_queries(simd, &task, qkv, query);
        if in_place {
            let products = InPlace::new(task, rest);
            pass_by(simd, &task, segment, products, query, weights, sums, results);
        } else {
            let products = Decoded::new(task, rest);
            pass_by(simd, &task, segment, products, query, weights, sums, results);
        }
    }
}

/// Queries times `1 / sqrt(D)`, `[tokens, group, blocks]`.
#[inline(always)]
fn load_queries<S: Simd>(simd: S, task: &Task<'_>, qkv: &Tensor, query: &mut [Block]) {
    let (group, head_dim) = (task.plan.group(), task.plan.shape.head_dim);
    let blocks = task.plan.blocks();
    query.fill([0.0; BLOCK]);
    let scale = simd.splat(1.0 / (head_dim as f32).sqrt());
    for (i, query) in query.chunks_exact_mut(blocks).take(task.queries()).enumerate() {
        let head = task.kv_head * group + i % group;
        let row = Blocks::new(&qkv.row(task.first + i / group)[head * head_dim..][..head_dim]);
        for (block, query) in query.iter_mut().enumerate() {
            for i in 0..BLOCK / S::LANES {
                simd.store(query, i, simd.mul(simd.load(row.get(block), i), scale));
            }
        }
    }
}

/// Lets all keys and values of a segment pass by, a block at a time.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the parts of one buffer")]
fn pass_by<S: Simd>(
    simd: S,
    task: &Task<'_>,
    segment: usize,
    mut products: impl Products,
    query: &[Block],
    weights: &mut [Block],
    sums: &mut [Block],
    results: &mut [Block],
) {
    let (plan, group) = (task.plan, task.plan.group());
    let width = plan.blocks() + 1;
    sums.fill([0.0; BLOCK]);
    for result in results.chunks_exact_mut(plan.result()) {
        result[0][..2].copy_from_slice(&[f32::NEG_INFINITY, 0.0]);
    }
    let end = ((segment + 1) * plan.segment).min(plan.position + task.first + task.tokens);
    for start in (segment * plan.segment..end).step_by(KEYS) {
        let positions = start..end.min(start + KEYS);
        products.scores(simd, positions.clone(), query, weights);
        let queries = weights.iter_mut().zip(sums.chunks_exact_mut(width));
        let queries = queries.zip(results.chunks_exact_mut(plan.result()));
        for (i, ((weights, sums), result)) in queries.take(task.queries()).enumerate() {
            // The token sees the keys up to its own position.
            let seen = plan.position + task.first + i / group + 1;
            let seen = seen.saturating_sub(start).min(positions.len());
            let rescale = soften(simd, weights, seen, &mut result[0]);
            if rescale == 1.0 {
                continue;
            }
            for sums in sums {
                for i in 0..BLOCK / S::LANES {
                    let scaled = simd.mul(simd.load(sums, i), simd.splat(rescale));
                    simd.store(sums, i, scaled);
                }
            }
        }
        products.add_values(simd, positions, weights, sums);
    }
    products.finish(simd, sums);
    let queries = results.chunks_exact_mut(plan.result()).zip(sums.chunks_exact(width));
    for (result, sums) in queries.take(task.queries()) {
        let (sums, to_all) = sums.split_at(width - 1);
        let to_all: f32 = to_all.as_flattened().iter().sum();
        result[1..].copy_from_slice(sums);
        result[1..].as_flattened_mut().iter_mut().for_each(|sum| *sum += to_all);
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
