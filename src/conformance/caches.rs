//! What the cases of `rope_append`, `encode_keys` and `attention` share: steps over a cache, and
//! how far attention may be from exact.

use std::sync::Arc;

use super::{FLUSHED, Inputs, U};
use crate::backend::{
    AttentionShape, Backend, CacheShape, Input, Operations, Step, StreamShape, TensorFormat,
};
use crate::delta::{
    AttentionPolicy, CacheImage, KeyFormat, Page, PageLayout, Phase, Reference as DeltaReference,
    ValueFormat,
};
use crate::error::Result;
use crate::reference::Reference;

/// A few steps over one cache.
#[derive(Clone)]
pub(super) struct Case {
    pub name: String,
    pub shape: AttentionShape,
    pub policy: AttentionPolicy,
    /// `[G]`, in place of the policy's.
    pub thresholds: Option<Arc<[f32]>>,
    /// `[positions, D / 2]`.
    pub table: Vec<[f32; 2]>,
    /// `[tokens, (H + 2 G) D]`.
    pub qkv: Vec<f32>,
    pub steps: Vec<StepOf>,
}

/// One step of a case.
#[derive(Clone, Copy)]
pub(super) struct StepOf {
    pub rows: usize,
    pub phase: Phase,
    /// Whether its attention is computed.
    pub attend: bool,
}

/// Steps of decoding: tokens of each, and whether attention is computed.
pub(super) fn decoding(steps: &[(usize, bool)]) -> Vec<StepOf> {
    let step = |&(rows, attend): &(usize, bool)| StepOf { rows, phase: Phase::Decode, attend };
    steps.iter().map(step).collect()
}

/// A prompt in chunks of `prompt` tokens, then steps of decoding; attention of all.
pub(super) fn prompt_then_decode(prompt: &[usize], decode: &[usize]) -> Vec<StepOf> {
    let phase = Phase::Prefill { length: prompt.iter().sum() };
    let step = |&rows: &usize| StepOf { rows, phase, attend: true };
    let decode: Vec<_> = decode.iter().map(|&rows| (rows, true)).collect();
    prompt.iter().map(step).chain(decoding(&decode)).collect()
}

/// What a case gives; a row for each token of the steps that compute attention.
#[derive(Default)]
pub(super) struct Output {
    /// `[rows, H D]`, rotated.
    pub queries: Vec<f32>,
    /// `[rows, H D]`.
    pub attention: Vec<f32>,
    /// `[G][full pages]`, at the end.
    pub pages: Vec<Vec<Page>>,
}

/// A cache that steps are run over.
pub(super) struct Player<'a, B: Backend> {
    backend: &'a B,
    stream: B::Stream,
    rope: B::Rope,
    cache: B::Cache,
    qkv: B::Tensor,
    out: B::Tensor,
    shape: CacheShape,
    /// Tokens in the cache.
    length: usize,
    exact_from: usize,
    output: Output,
}

impl<'a, B: Backend> Player<'a, B> {
    /// An empty cache for `case`, with room for `context` tokens in steps of up to `rows`.
    pub fn new(backend: &'a B, case: &Case, context: usize, rows: usize) -> Result<Self> {
        let attention = case.shape;
        let (policy, thresholds) = (case.policy, case.thresholds.clone());
        let shape = CacheShape { attention, context, rows, policy, thresholds };
        Ok(Self {
            backend,
            stream: backend.stream(&StreamShape { rows, context, attention, vocabulary: 32 })?,
            rope: backend.rope(&case.table, attention.head_dim)?,
            cache: backend.cache(&shape)?,
            qkv: backend.tensor(rows, attention.qkv_width(), TensorFormat::F32)?,
            out: backend.tensor(rows, attention.width(), TensorFormat::F32)?,
            shape,
            length: 0,
            exact_from: 0,
            output: Output::default(),
        })
    }

    /// Appends the tokens of one step, `[rows, (H + 2 G) D]`.
    pub fn step(&mut self, step: StepOf, qkv: &[f32]) -> Result<()> {
        let StepOf { rows, phase, attend } = step;
        self.backend.write(&mut self.qkv, qkv)?;
        let tokens = vec![0; rows];
        self.stream.begin(&Step { input: Input::Tokens(&tokens), position: self.length, phase })?;
        self.stream.rope_append(&mut self.qkv, &self.rope, &mut self.cache)?;
        self.stream.encode_keys(&mut self.cache)?;
        if attend {
            self.stream.attention(&self.qkv, &self.cache, &mut self.out)?;
        }
        self.stream.submit()?;
        self.length += rows;
        if !self.shape.policy.is_dense() {
            let slots = self.shape.policy.recent_slots(self.shape.context, self.shape.rows);
            self.exact_from = self.exact_from.max(self.length.saturating_sub(slots));
        }
        if attend {
            let rotated = self.stream.read(&self.qkv)?;
            for row in rotated.chunks_exact(self.shape.attention.qkv_width()) {
                self.output.queries.extend(&row[..self.shape.attention.width()]);
            }
            self.output.attention.extend(self.stream.read(&self.out)?);
        }
        Ok(())
    }

    /// Runs `steps` over the tokens of `case` that follow those in the cache.
    pub fn play(&mut self, case: &Case, steps: &[StepOf]) -> Result<()> {
        let width = self.shape.attention.qkv_width();
        for &step in steps {
            let at = self.length * width;
            self.step(step, &case.qkv[at..at + step.rows * width])?;
        }
        Ok(())
    }

    pub fn truncate(&mut self, length: usize) -> Result<()> {
        self.length = length;
        if length == 0 {
            self.exact_from = 0;
        }
        self.stream.truncate(&mut self.cache, length)
    }

    /// All that the steps gave.
    pub fn done(mut self) -> Result<Output> {
        self.output.pages = self.stream.pages(&self.cache)?;
        Ok(self.output)
    }

    /// The first original key beyond the sink that must still be there.
    pub fn exact_from(&self) -> usize {
        self.exact_from
    }

    pub fn save(&mut self) -> Result<CacheImage> {
        self.stream.save(&self.cache, self.exact_from)
    }

    pub fn restore(&mut self, image: &CacheImage) -> Result<()> {
        (self.length, self.exact_from) = (image.length, image.exact_from);
        self.stream.restore(&mut self.cache, image)
    }
}

impl Case {
    pub fn tokens(&self) -> usize {
        self.steps.iter().map(|step| step.rows).sum()
    }

    /// Tokens of the largest step.
    pub fn rows(&self) -> usize {
        self.steps.iter().map(|step| step.rows).max().unwrap_or(1)
    }

    /// What pages look like; nothing where keys are plain.
    pub fn layout(&self) -> Option<PageLayout> {
        PageLayout::new(&self.policy, self.shape.head_dim).expect("pages of the table fit")
    }

    /// Keys of one head `[tokens, D]`, as they are before the rotation.
    pub fn keys(&self, kv_head: usize) -> Vec<f32> {
        let AttentionShape { heads, head_dim, .. } = self.shape;
        let at = (heads + kv_head) * head_dim;
        let rows = self.qkv.chunks_exact(self.shape.qkv_width());
        rows.flat_map(|row| &row[at..at + head_dim]).copied().collect()
    }

    pub fn run<B: Backend>(&self, backend: &B) -> Result<Output> {
        // One more than is used: a kernel that reads to the end of the cache is found out.
        let mut player = Player::new(backend, self, self.tokens() + 1, self.rows())?;
        player.play(self, &self.steps)?;
        player.done()
    }

    /// Element-wise bound of the error of attention, for the keys that `pages` hold.
    ///
    /// A score is a dot product of `D` terms, so that its error is at most
    /// `(D + 4) u |q| |k| / sqrt(D)` (Cauchy-Schwarz), to which comes `key_error`, that of the
    /// rotation and the rounding of the keys, relative to `|q| |k|`. A compressed key is itself a
    /// sum of at most `C + 1` terms, and a kernel may add up keys, or scores of terms: `C` more
    /// roundings, and `|k|` is replaced by the sum of the terms' norms, see [`Case::reach`].
    ///
    /// A weight has twice the error of the scores (its own and the maximum's) and that of `exp`,
    /// at most `3 + 2 |x|` ULP of which `w |x| <= 1 / e` times `w`'s share matters; sums over up
    /// to `L` positions add `L u` twice, above and below the fraction bar, and rescaling by
    /// blocks as much again. All of it is relative to `sum w |v|`. A value in 4 bits is
    /// `level * scale + minimum`, whose parts a kernel may sum apart: neither is beyond
    /// `2 max |v|` of its row, so that `4 max |v|` stands in for `|v|`.
    pub fn bound(&self, key_error: f64, pages: &[Vec<Page>]) -> Result<Vec<f64>> {
        let AttentionShape { heads, kv_heads, head_dim } = self.shape;
        let longest = |from: usize, count: usize| {
            let rows = self.qkv.chunks_exact(self.shape.qkv_width());
            let heads = rows.flat_map(|row| row[from..].chunks_exact(head_dim).take(count));
            heads.map(norm).fold(0.0, f64::max)
        };
        let key = longest(heads * head_dim, kv_heads).max(self.reach(pages));
        let terms = head_dim + self.layout().map_or(0, |layout| layout.tokens);
        let product = longest(0, heads) * key;
        let scale = (head_dim as f64).sqrt();
        let score = ((terms as f64 + 4.0) * U + key_error) * product / scale;
        let span = (2.0 * product / scale).min(88.0);
        let length = self.tokens() as f64;
        let relative = 2.0 * score + 2.0 * U * (2.0 * (3.0 + 2.0 * span) + 4.0) + 4.0 * length * U;

        // The same softmax over |v|.
        let mut absolute = self.clone();
        for row in absolute.qkv.chunks_exact_mut(self.shape.qkv_width()) {
            for value in row[(heads + kv_heads) * head_dim..].chunks_exact_mut(head_dim) {
                let largest = value.iter().fold(0.0f32, |max, v| max.max(v.abs()));
                for v in value {
                    *v = match self.policy.values {
                        ValueFormat::Int4 => 4.0 * largest,
                        _ => v.abs(),
                    };
                }
            }
        }
        let sums = absolute.run(&Reference::new())?.attention;
        Ok(sums.iter().map(|&sum| relative.min(2.0) * f64::from(sum) + length * FLUSHED).collect())
    }

    /// The largest sum of the norms of the terms that a compressed key is made of.
    ///
    /// References, means and minima lie within what the page's keys span, and so no key is further
    /// from them than twice the largest magnitudes of the channels: three times that norm, and
    /// some for the rounding of references. A chain adds all steps of the page.
    fn reach(&self, pages: &[Vec<Page>]) -> f64 {
        let Some(layout) = self.layout() else { return 0.0 };
        let is_chain = match layout.keys {
            KeyFormat::Delta(delta) => delta.reference != DeltaReference::Mean,
            _ => false,
        };
        let reach = |page: &Page| {
            let keys = page.reconstruct(&layout);
            let mut largest = vec![0.0f32; layout.head_dim];
            for key in keys.chunks_exact(layout.head_dim) {
                largest.iter_mut().zip(key).for_each(|(max, k)| *max = max.max(k.abs()));
            }
            let steps = keys
                .chunks_exact(layout.head_dim)
                .zip(keys[layout.head_dim..].chunks_exact(layout.head_dim));
            let step = |(a, b): (&[f32], &[f32])| {
                norm(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>())
            };
            let travel = if is_chain { steps.map(step).sum() } else { 0.0 };
            3.01 * norm(&largest) + travel
        };
        pages.iter().flatten().map(reach).fold(0.0, f64::max)
    }
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

pub(super) fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim }
}

/// A table of real angles, as a model has them.
pub(super) fn angles(positions: usize, head_dim: usize) -> Vec<[f32; 2]> {
    let pairs = head_dim / 2;
    let entry = |i: usize| {
        let (position, pair) = ((i / pairs) as f64, (i % pairs) as f64);
        let angle = position * 10_000f64.powf(-pair / pairs as f64);
        [angle.cos() as f32, angle.sin() as f32]
    };
    (0..positions * pairs).map(entry).collect()
}

/// A table of quarter turns.
pub(super) fn quarter_turns(positions: usize, head_dim: usize) -> Vec<[f32; 2]> {
    let turn = |i: usize| [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]][(i * 7 + i / 5) % 4];
    (0..positions * head_dim / 2).map(turn).collect()
}

/// A table that turns nothing.
pub(super) fn no_turns(positions: usize, head_dim: usize) -> Vec<[f32; 2]> {
    vec![[1.0, 0.0]; positions * head_dim / 2]
}

/// Queries, keys and values `[tokens, (H + 2 G) D]` like a model's: keys drift from token to
/// token, about a mean of their own in some channels, with a large one now and then. All are
/// exact in f16.
pub(super) fn drifting(inputs: &mut Inputs, shape: AttentionShape, tokens: usize) -> Vec<f32> {
    let AttentionShape { heads, kv_heads, head_dim } = shape;
    let width = kv_heads * head_dim;
    let mut key: Vec<f32> =
        (0..width).map(|c| [0.0, 1.5, -4.0, 0.0, 0.25][c % 5] + inputs.unit()).collect();
    let mut out = Vec::new();
    for _ in 0..tokens {
        out.extend(inputs.halves(heads * head_dim, 1.0));
        let steps = inputs.halves(width, 0.25);
        key.iter_mut().zip(steps).for_each(|(k, step)| *k = 0.98 * *k + step);
        // In steps of 1 / 256: exact in f16 below 8, and never a negative zero.
        let exact = |k: f32| (k * 256.0).round() / 256.0 + 0.0;
        out.extend(key.iter().map(|&k| exact(k)));
        if inputs.below(16) == 0 {
            let at = out.len() - 1 - inputs.below(width);
            out[at] = exact(4.0 * inputs.unit());
        }
        out.extend(inputs.halves(width, 1.0));
    }
    out
}

/// Moves values that lie next to a tie between two levels away from it: there a device whose
/// division is rounded otherwise may choose the other level.
pub(super) fn avoid_ties(case: &mut Case) {
    let AttentionShape { heads, kv_heads, head_dim } = case.shape;
    let top = match case.policy.values {
        ValueFormat::Plain => return,
        ValueFormat::Int8 => 127.0,
        ValueFormat::Int4 => 15.0,
    };
    for row in case.qkv.chunks_exact_mut(case.shape.qkv_width()) {
        for value in row[(heads + kv_heads) * head_dim..].chunks_exact_mut(head_dim) {
            let largest = value.iter().fold(0.0f32, |max, v| max.max(v.abs()));
            let lowest = value.iter().copied().fold(f32::INFINITY, f32::min);
            let highest = value.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let (minimum, range) = match case.policy.values {
                ValueFormat::Int4 => (lowest, highest - lowest),
                _ => (0.0, largest),
            };
            let scale = half::f16::from_f32(range / top).to_f32();
            let minimum = half::f16::from_f32(minimum).to_f32();
            for v in value.iter_mut().filter(|v| **v != lowest && **v != highest) {
                let level = (*v - minimum) / scale;
                if (level - level.floor() - 0.5).abs() < 0.01 {
                    *v -= 0.05 * scale;
                }
            }
        }
    }
}
