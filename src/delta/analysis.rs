//! What a policy does to the attention of a text, computed on the host from queries, keys and
//! values that were taken from a dense run: no backend is involved.

use half::f16;
use rayon::prelude::*;

use super::encode_page;
use super::page::{Page, PageLayout};
use super::policy::AttentionPolicy;
use super::statistics::PageStatistics;
use super::values::{decode_value, encode_value};
use super::window::{ExactRule, Phase};
use crate::error::Result;
use crate::formats::{AttentionShape, CacheFormat};

/// What a layer's attention saw in a dense run of a prompt of `T` tokens, as `f32`.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerTrace {
    /// Heads and their size.
    pub shape: AttentionShape,
    /// Rotated queries, `[T, H, D]`.
    pub queries: Vec<f32>,
    /// Rotated keys, `[T, G, D]`.
    pub keys: Vec<f32>,
    /// Values, `[T, G, D]`.
    pub values: Vec<f32>,
}

/// What a policy makes of the keys and values of one KV head.
#[derive(Clone, Debug)]
pub struct CompressedHead {
    shape: AttentionShape,
    rule: ExactRule,
    /// The compressed pages.
    pub pages: Vec<Page>,
    /// The layout of the pages; `None` where keys are plain.
    pub layout: Option<PageLayout>,
    /// Original keys as the cache holds them, `[T, D]`.
    exact: Vec<f32>,
    /// What the pages stand for, `[pages * C, D]`.
    approximate: Vec<f32>,
    /// Values as the cache gives them, `[T, D]`.
    values: Vec<f32>,
}

/// What a policy does to one KV head and the query heads that read it.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadAnalysis {
    /// Counts of the compressed pages.
    pub statistics: PageStatistics,
    /// Largest difference of an element of a compressed key from the original, rounding to
    /// [`AttentionPolicy::exact`] included.
    pub key_error: f32,
    /// For each query head of the group `|o - o_dense| / |o_dense|`, over all queries of the prompt
    /// and the head's elements; `o_dense` is dense attention in `f32`.
    pub output_errors: Vec<f64>,
}

impl LayerTrace {
    /// Tokens, `T`.
    pub fn tokens(&self) -> usize {
        self.keys.len() / self.shape.kv_width()
    }

    /// Compresses the keys and values of a KV head as a cache does.
    ///
    /// # Errors
    /// As [`PageLayout::new`].
    pub fn compress(&self, policy: &AttentionPolicy, kv_head: usize) -> Result<CompressedHead> {
        let head_dim = self.shape.head_dim;
        let layout = PageLayout::new(policy, head_dim)?;
        let exact: Vec<f32> = column(&self.keys, self.shape.kv_heads, kv_head, head_dim)
            .flatten()
            .map(|&k| match policy.exact {
                CacheFormat::F16 => f16::from_f32(k).to_f32(),
                CacheFormat::F32 => k,
            })
            .collect();
        let (mut pages, mut approximate) = (Vec::new(), Vec::<f32>::new());
        if let Some(layout) = &layout {
            for keys in exact.chunks_exact(layout.tokens * head_dim) {
                let previous = approximate.len().checked_sub(head_dim);
                let page = encode_page(layout, keys, previous.map(|at| &approximate[at..]));
                approximate.extend(page.reconstruct(layout));
                pages.push(page);
            }
        }
        let mut values = Vec::with_capacity(exact.len());
        let (mut bytes, mut row) = (Vec::new(), vec![0.0; head_dim]);
        for value in column(&self.values, self.shape.kv_heads, kv_head, head_dim) {
            bytes.clear();
            encode_value(policy.values, policy.exact, value, &mut bytes);
            decode_value(policy.values, policy.exact, &bytes, &mut row);
            values.extend_from_slice(&row);
        }
        let rule = policy.rule(Phase::Prefill { length: self.tokens() });
        Ok(CompressedHead { shape: self.shape, rule, pages, layout, exact, approximate, values })
    }

    /// What `policy` does to every KV head.
    ///
    /// Takes `O(T^2)` time, on all cores.
    ///
    /// # Errors
    /// As [`PageLayout::new`].
    pub fn analyse(&self, policy: &AttentionPolicy) -> Result<Vec<HeadAnalysis>> {
        self.analyse_heads(|_| *policy)
    }

    /// The same where each KV head has a policy of its own: its threshold, see
    /// [`AttentionPolicy::with_theta`].
    ///
    /// # Errors
    /// As [`PageLayout::new`].
    pub fn analyse_heads(
        &self,
        policy: impl Fn(usize) -> AttentionPolicy + Sync,
    ) -> Result<Vec<HeadAnalysis>> {
        let AttentionShape { heads, kv_heads, head_dim } = self.shape;
        let group = heads / kv_heads;
        // Dense attention of the same keys and values, unrounded.
        let dense = AttentionPolicy::plain(CacheFormat::F32);
        let head = |kv_head: usize| {
            let (found, expected) =
                (self.compress(&policy(kv_head), kv_head)?, self.compress(&dense, kv_head)?);
            let errors = (0..group).into_par_iter().map(|head| {
                let head = kv_head * group + head;
                let apart = |(query, row): (usize, &[f32])| {
                    let (mut a, mut b) = (vec![0.0; head_dim], vec![0.0; head_dim]);
                    found.attend(query, row, &mut a);
                    expected.attend(query, row, &mut b);
                    let squares = |x: f32| f64::from(x) * f64::from(x);
                    let difference: f64 = a.iter().zip(&b).map(|(a, b)| squares(a - b)).sum();
                    (difference, b.iter().map(|&b| squares(b)).sum())
                };
                let queries: Vec<(usize, &[f32])> =
                    column(&self.queries, heads, head, head_dim).enumerate().collect();
                let rows: Vec<(f64, f64)> = queries.into_par_iter().map(apart).collect();
                let (difference, whole) =
                    rows.into_iter().fold((0.0, 0.0), |sum, row| (sum.0 + row.0, sum.1 + row.1));
                if difference == 0.0 { 0.0 } else { (difference / whole).sqrt() }
            });
            let key_error = expected.exact.iter().zip(&found.approximate);
            Ok(HeadAnalysis {
                statistics: found.statistics(),
                key_error: key_error.map(|(k, found)| (k - found).abs()).fold(0.0, f32::max),
                output_errors: errors.collect(),
            })
        };
        (0..kv_heads).into_par_iter().map(head).collect()
    }

    /// The attention of a query head under a policy as a map of at most `cells` by `cells`: entry
    /// `[i, j]` is the mean weight that the queries of the `i`-th stretch of the text give to a key
    /// of the `j`-th; `None` above the diagonal.
    ///
    /// # Errors
    /// As [`PageLayout::new`].
    pub fn attention_map(
        &self,
        policy: &AttentionPolicy,
        head: usize,
        cells: usize,
    ) -> Result<Vec<Vec<Option<f64>>>> {
        let AttentionShape { heads, kv_heads, head_dim } = self.shape;
        let compressed = self.compress(policy, head / (heads / kv_heads))?;
        let tokens = self.tokens();
        let stretch = tokens.div_ceil(cells.max(1)).max(1);
        let queries: Vec<&[f32]> = column(&self.queries, heads, head, head_dim).collect();
        let row = |(index, queries): (usize, &[&[f32]])| {
            let mut sums = vec![(0.0, 0usize); tokens.div_ceil(stretch)];
            for (offset, query) in queries.iter().enumerate() {
                let weights = compressed.weights(index * stretch + offset, query);
                for (key, weight) in weights.into_iter().enumerate() {
                    let cell = &mut sums[key / stretch];
                    *cell = (cell.0 + f64::from(weight), cell.1 + 1);
                }
            }
            let mean = |(sum, count): (f64, usize)| (count > 0).then(|| sum / count as f64);
            sums.into_iter().map(mean).collect()
        };
        Ok(queries.par_chunks(stretch).enumerate().map(row).collect())
    }
}

impl CompressedHead {
    /// Counts of the pages.
    pub fn statistics(&self) -> PageStatistics {
        match &self.layout {
            Some(layout) => PageStatistics::of_pages(layout, &self.pages),
            None => PageStatistics::default(),
        }
    }

    /// Which keys are exact.
    pub fn rule(&self) -> ExactRule {
        self.rule
    }

    /// The weights that the query at position `query` gives to the keys up to its own,
    /// `softmax(q k^T / sqrt(D))`: exact keys and approximate ones where the rule says so.
    fn weights(&self, query: usize, row: &[f32]) -> Vec<f32> {
        let head_dim = self.shape.head_dim;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let start = self.rule.start(query);
        // A window holds the query's own page: what lies before it is in pages.
        let mut weights: Vec<f32> = (0..=query)
            .map(|key| {
                let exact = key < self.rule.sink || key >= start;
                let keys = if exact { &self.exact } else { &self.approximate };
                dot(row, &keys[key * head_dim..][..head_dim]) * scale
            })
            .collect();
        let largest = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.iter_mut().for_each(|s| *s = (*s - largest).exp());
        let sum: f64 = weights.iter().map(|&w| f64::from(w)).sum();
        weights.iter_mut().for_each(|w| *w = (f64::from(*w) / sum) as f32);
        weights
    }

    /// The attention output `out` `[D]`, zeros before, of a query.
    pub(super) fn attend(&self, query: usize, row: &[f32], out: &mut [f32]) {
        let weights = self.weights(query, row);
        for (weight, value) in weights.iter().zip(self.values.chunks_exact(self.shape.head_dim)) {
            for (out, v) in out.iter_mut().zip(value) {
                *out += weight * v;
            }
        }
    }
}

/// The rows of one head in `[T, heads, D]`.
fn column(all: &[f32], heads: usize, head: usize, head_dim: usize) -> impl Iterator<Item = &[f32]> {
    all.chunks_exact(head_dim).skip(head).step_by(heads)
}

/// Eight sums side by side, which the compiler turns into vector instructions.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (a_eights, b_eights) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a_eights.remainder().iter().zip(b_eights.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_eights.zip(b_eights) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::Window;
    use crate::sampler::Draws;

    const SHAPE: AttentionShape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 20 };

    fn trace(tokens: usize) -> LayerTrace {
        let mut draws = Draws::new(5);
        let mut random = |n: usize| (0..n).map(|_| 2.0 * draws.draw() - 1.0).collect::<Vec<_>>();
        LayerTrace {
            shape: SHAPE,
            queries: random(tokens * SHAPE.width()),
            keys: random(tokens * SHAPE.kv_width()),
            values: random(tokens * SHAPE.kv_width()),
        }
    }

    fn policy(text: &str) -> AttentionPolicy {
        text.parse().expect(text)
    }

    #[test]
    fn exact_settings_have_no_error() {
        let trace = trace(70);
        for text in [
            "exact=f32",
            "delta theta=0 reference=mean deltas=f16 exact=f32 sink=0 alpha=1 page=16",
            "keys=channel2 exact=f32 shape=block alpha=1 page=16",
            "paper exact=f32 sink=70 alpha=0 page=16",
        ] {
            for head in trace.analyse(&policy(text)).expect(text) {
                assert!(head.output_errors.iter().all(|e| *e < 1e-6), "{text}: {head:?}");
            }
        }
    }

    #[test]
    fn errors_grow_with_theta_and_keys_stay_within_it() {
        let trace = trace(100);
        let mut last = [0.0; 2];
        for theta in [0.01, 0.2, 0.8] {
            let text = format!("delta theta={theta} deltas=f16 exact=f32 sink=1 alpha=0 page=16");
            let heads = trace.analyse(&policy(&text)).expect("analysed");
            for (head, last) in heads.iter().zip(&mut last) {
                assert_eq!(head.statistics.tokens, 96);
                // Kept differences are rounded to f16.
                assert!(head.key_error <= theta + 1e-3, "{head:?}");
                assert_eq!(head.output_errors.len(), 2);
                assert!(head.output_errors[0] > *last, "{theta}: {head:?}");
                *last = head.output_errors[0];
            }
        }
        let int4 = trace.analyse(&policy("values=int4 exact=f32")).expect("analysed");
        assert!((0.01..0.2).contains(&int4[0].output_errors[0]), "{int4:?}");
        assert_eq!(int4[0].key_error, 0.0);
    }

    /// Attention with every score and weight written out, in `f64`.
    #[test]
    fn attention_is_what_the_rule_says() {
        let (trace, tokens, head) = (trace(50), 50, 3);
        let policy = policy("delta theta=0.7 exact=f32 sink=2 alpha=0.1 page=16");
        let compressed = trace.compress(&policy, 1).expect("compressed");
        assert_eq!(compressed.rule().window, Window::Sliding(5));
        assert_eq!((compressed.pages.len(), compressed.exact.len()), (3, tokens * 20));
        let query: Vec<&[f32]> = column(&trace.queries, 4, head, 20).collect();
        for at in [0, 15, 16, 33, 49] {
            let score = |key: usize| {
                let exact = compressed.rule().is_exact(at, key);
                let keys = if exact { &compressed.exact } else { &compressed.approximate };
                let products = query[at].iter().zip(&keys[20 * key..][..20]);
                products.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() / 20f64.sqrt()
            };
            let exps: Vec<f64> = (0..=at).map(|key| score(key).exp()).collect();
            let sum: f64 = exps.iter().sum();
            let found = compressed.weights(at, query[at]);
            for (found, exp) in found.iter().zip(&exps) {
                assert!((f64::from(*found) - exp / sum).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn a_map_keeps_the_weight_of_each_query() {
        let trace = trace(50);
        for cells in [1, 7, 50, 200] {
            let map = trace.attention_map(&policy("delta page=16"), 2, cells).expect("map");
            assert!(map.len() <= cells.max(1));
            let stretch = 50usize.div_ceil(map.len());
            for (i, row) in map.iter().enumerate() {
                assert!(row.iter().enumerate().all(|(j, cell)| cell.is_some() == (j <= i)));
            }
            if stretch == 1 {
                let sum: f64 = map[49].iter().flatten().sum();
                assert!((sum - 1.0).abs() < 1e-5, "{sum}");
            }
        }
    }
}
