//! The method as the paper writes it: no pages of bits, no devices, all of it in `f64`.
//!
//! It is here to be read beside the paper (DeltaLLM, <https://arxiv.org/abs/2507.19608>) and to
//! hold the pages against: it shares no code with their encoding. Shapes are `[rows, columns]`,
//! row-major: `L` tokens, `D` elements of a head; all of it is about one layer and one KV head,
//! after the rotation of keys.

/// Keys as thresholded differences.
///
/// A difference is zero where a channel is not kept: `delta` is what the paper's cache holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Differences {
    /// Elements of a head, `D`.
    pub head_dim: usize,
    /// `delta_n`, `[L, D]`.
    pub delta: Vec<f64>,
    /// `k^_n`, what the differences stand for, `[L, D]`.
    pub reconstruction: Vec<f64>,
    /// What the differences are added to.
    pub base: Base,
}

/// What a difference is added to.
#[derive(Clone, Debug, PartialEq)]
pub enum Base {
    /// All differences before it: `k^_n = delta_0 + ... + delta_n`. The paper's.
    Chain,
    /// Those since the start of its page of so many tokens.
    PageChain(usize),
    /// The mean of its page of so many tokens; the means, `[pages, D]`.
    PageMean(usize, Vec<f64>),
}

/// The paper's delta keys of `keys` `[L, D]`:
///
/// ```text
/// r = k_0;  delta_0 = k_0
/// n >= 1:   d          = k_n - r
///           keep[c]    = |d[c]| > theta
///           delta_n[c] = keep[c] ? d[c]   : 0
///           r[c]       = keep[c] ? k_n[c] : r[c]
/// ```
///
/// The reference `r` after step `n` is the reconstruction `k^_n`, of which every channel is within
/// `theta` of `k_n`.
pub fn delta_keys(keys: &[f64], head_dim: usize, theta: f64) -> Differences {
    let (mut delta, mut reconstruction) = (Vec::new(), Vec::new());
    let mut r = vec![0.0; head_dim];
    for (n, k) in keys.chunks_exact(head_dim).enumerate() {
        for c in 0..head_dim {
            let d = k[c] - r[c];
            let keep = n == 0 || d.abs() > theta;
            delta.push(if keep { d } else { 0.0 });
            r[c] = if keep { k[c] } else { r[c] };
        }
        reconstruction.extend(&r);
    }
    Differences { head_dim, delta, reconstruction, base: Base::Chain }
}

/// The same with kept differences rounded by `round(channel, d)`, in closed loop: the reference
/// moves by the rounded difference, `r += round(d)`, so that the next difference makes up for
/// what was lost. What rounds to zero is not kept. The first key is as it is.
pub fn rounded_delta_keys(
    keys: &[f64],
    head_dim: usize,
    theta: f64,
    round: impl Fn(usize, f64) -> f64,
) -> Differences {
    let mut delta: Vec<f64> = keys.iter().copied().take(head_dim).collect();
    let mut r = delta.clone();
    let mut reconstruction = r.clone();
    for k in keys.chunks_exact(head_dim).skip(1) {
        for c in 0..head_dim {
            let d = k[c] - r[c];
            delta.push(if d.abs() > theta { round(c, d) } else { 0.0 });
            r[c] += delta[delta.len() - 1];
        }
        reconstruction.extend(&r);
    }
    Differences { head_dim, delta, reconstruction, base: Base::Chain }
}

/// A chain that begins anew every `page` tokens: no error lives longer than a page.
pub fn anchored_delta_keys(
    keys: &[f64],
    head_dim: usize,
    page: usize,
    theta: f64,
    round: impl Fn(usize, f64) -> f64,
) -> Differences {
    let (mut delta, mut reconstruction) = (Vec::new(), Vec::new());
    for keys in keys.chunks(page * head_dim) {
        let part = rounded_delta_keys(keys, head_dim, theta, &round);
        delta.extend(part.delta);
        reconstruction.extend(part.reconstruction);
    }
    Differences { head_dim, delta, reconstruction, base: Base::PageChain(page) }
}

/// Differences from the mean of their page of `page` tokens, each on its own:
/// `k^_n = mean + delta_n`, with `delta_n = round(k_n - mean)` where that exceeds `theta`, else 0.
pub fn mean_delta_keys(
    keys: &[f64],
    head_dim: usize,
    page: usize,
    theta: f64,
    round: impl Fn(usize, f64) -> f64,
) -> Differences {
    let (mut delta, mut reconstruction) = (Vec::new(), Vec::new());
    let mut means = Vec::new();
    for keys in keys.chunks(page * head_dim) {
        let rows = || keys.chunks_exact(head_dim);
        let count = rows().count() as f64;
        let mean: Vec<f64> =
            (0..head_dim).map(|c| rows().map(|k| k[c]).sum::<f64>() / count).collect();
        for k in rows() {
            for c in 0..head_dim {
                let d = k[c] - mean[c];
                let kept = if d.abs() > theta { round(c, d) } else { 0.0 };
                delta.push(kept);
                reconstruction.push(mean[c] + kept);
            }
        }
        means.extend(mean);
    }
    Differences { head_dim, delta, reconstruction, base: Base::PageMean(page, means) }
}

impl Differences {
    /// The approximate scores of a query `[D]`, `[L]`, without the division by `sqrt(D)`: running
    /// sums of `q . delta_j`, which is what makes zeros worth having. They equal `q . k^_n`.
    pub fn scores(&self, query: &[f64]) -> Vec<f64> {
        let mut running = 0.0;
        let score = |(n, delta): (usize, &[f64])| {
            match &self.base {
                Base::Chain => {}
                Base::PageChain(page) => {
                    if n % page == 0 {
                        running = 0.0;
                    }
                }
                Base::PageMean(page, means) => {
                    running = dot(query, &means[n / page * self.head_dim..][..self.head_dim]);
                }
            }
            running += dot(query, delta);
            running
        };
        self.delta.chunks_exact(self.head_dim).enumerate().map(score).collect()
    }

    /// The share of zeros among the differences.
    pub fn zeros(&self) -> f64 {
        let zeros = self.delta.iter().filter(|d| **d == 0.0).count();
        zeros as f64 / self.delta.len() as f64
    }

    /// The sparsity that the paper reports: the share of zeros, less the share `alpha` of a text
    /// that is exact.
    pub fn sparsity(&self, alpha: f64) -> f64 {
        self.zeros() * (1.0 - alpha)
    }
}

/// Which keys the queries of a prompt of `length` tokens see exactly, `(query, key)`: the first
/// `sink`, and those of the query's own aligned block of `round(alpha * L)` tokens.
pub fn prefill_rule(length: usize, alpha: f64, sink: usize) -> impl Fn(usize, usize) -> bool {
    let block = ((alpha * length as f64).round() as usize).max(1);
    move |query, key| key < sink || key >= query / block * block
}

/// The same with a sliding window of that size in place of the block: the query's own key and the
/// ones before it.
pub fn sliding_rule(length: usize, alpha: f64, sink: usize) -> impl Fn(usize, usize) -> bool {
    decode_rule(((alpha * length as f64).round() as usize).max(1), sink)
}

/// Which keys a query sees exactly in decoding: the first `sink` and the last `window`, its own
/// among them.
pub fn decode_rule(window: usize, sink: usize) -> impl Fn(usize, usize) -> bool {
    move |query, key| key < sink || key + window > query
}

/// Keys and values of one KV head, `[L, D]` each.
#[derive(Clone, Copy, Debug)]
pub struct Text<'a> {
    /// Elements of a head, `D`.
    pub head_dim: usize,
    /// `k_n`.
    pub keys: &'a [f64],
    /// `k^_n`.
    pub reconstruction: &'a [f64],
    /// `v_n`.
    pub values: &'a [f64],
}

/// Hybrid attention of one query `[D]` at position `query_at`, `[D]`:
/// `softmax(s / sqrt(D)) v` over keys `0..=query_at`, with `s_n = q . k_n` where
/// `is_exact(query, key)`, else `q . k^_n`.
pub fn hybrid_attention(
    text: Text<'_>,
    query: &[f64],
    query_at: usize,
    is_exact: impl Fn(usize, usize) -> bool,
) -> Vec<f64> {
    let Text { head_dim, keys, reconstruction, values } = text;
    let score = |n: usize| {
        let seen = if is_exact(query_at, n) { keys } else { reconstruction };
        dot(query, &seen[n * head_dim..][..head_dim]) / (head_dim as f64).sqrt()
    };
    let scores: Vec<f64> = (0..=query_at).map(score).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; head_dim];
    for (weight, value) in weights.iter().zip(values.chunks_exact(head_dim)) {
        for (o, v) in out.iter_mut().zip(value) {
            *o += weight / sum * v;
        }
    }
    out
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One channel, theta 1.
    #[test]
    fn a_chain_by_hand() {
        let keys = [2.0, 2.5, 3.0, 3.5, 3.5, 1.0, 0.0];
        let found = delta_keys(&keys, 1, 1.0);
        // 3.0 is exactly theta from 2.0 and is not kept.
        assert_eq!(found.delta, [2.0, 0.0, 0.0, 1.5, 0.0, -2.5, 0.0]);
        assert_eq!(found.reconstruction, [2.0, 2.0, 2.0, 3.5, 3.5, 1.0, 1.0]);
        assert_eq!(found.zeros(), 4.0 / 7.0);
        assert_eq!(found.sparsity(0.5), 2.0 / 7.0);
        assert_eq!(found.scores(&[2.0]), [4.0, 4.0, 4.0, 7.0, 7.0, 2.0, 2.0]);
        // Theta 0 keeps all that moves, whatever the base.
        assert_eq!(delta_keys(&keys, 1, 0.0).reconstruction, keys);
        assert_eq!(anchored_delta_keys(&keys, 1, 2, 0.0, |_, d| d).reconstruction, keys);
        assert_eq!(mean_delta_keys(&keys, 1, 2, 0.0, |_, d| d).reconstruction, keys);
    }

    #[test]
    fn rounding_is_made_up_for() {
        let keys = [0.0, 0.4, 0.8, 1.2, 1.6];
        let whole = |_, d: f64| d.round();
        let found = rounded_delta_keys(&keys, 1, 0.0, whole);
        assert_eq!(found.reconstruction, [0.0, 0.0, 1.0, 1.0, 2.0]);
        let found = anchored_delta_keys(&keys, 1, 2, 0.0, whole);
        assert_eq!(found.delta, [0.0, 0.0, 0.8, 0.0, 1.6]);
        let found = mean_delta_keys(&keys, 1, 2, 0.5, |_, d| d);
        assert_eq!(found.reconstruction, [0.2, 0.2, 1.0, 1.0, 1.6]);
        assert_eq!(found.scores(&[1.0]), [0.2, 0.2, 1.0, 1.0, 1.6]);
    }

    #[test]
    fn rules_by_hand() {
        // Blocks of 5.
        let rule = prefill_rule(100, 0.05, 2);
        assert!(rule(14, 1) && !rule(14, 2) && !rule(14, 9) && rule(14, 10) && rule(14, 14));
        let rule = sliding_rule(100, 0.05, 0);
        assert!(!rule(14, 9) && rule(14, 10) && rule(14, 14));
        // The own key is always exact.
        assert!(decode_rule(1, 0)(14, 14) && !decode_rule(1, 0)(14, 13));
        assert!(prefill_rule(3, 0.0, 0)(2, 2));
    }

    /// Two keys of equal score share their values; the approximate one is scored by what it stands
    /// for.
    #[test]
    fn attention_by_hand() {
        let text = Text {
            head_dim: 1,
            keys: &[1.0, 2.0, 9.0],
            reconstruction: &[1.0, 1.0, 9.0],
            values: &[10.0, 20.0, 90.0],
        };
        assert_eq!(hybrid_attention(text, &[1.0], 1, |_, key| key == 0), [15.0]);
        let exact = hybrid_attention(text, &[1.0], 1, |_, _| true)[0];
        let first = 1.0 / (1.0 + 1f64.exp());
        assert!((exact - (10.0 * first + 20.0 * (1.0 - first))).abs() < 1e-12);
    }
}
