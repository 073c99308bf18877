//! What compressed pages hold, counted from their words: backends are not asked.

use std::iter::Sum;
use std::ops::AddAssign;

use super::page::{Page, PageLayout};
use super::policy::AttentionPolicy;
use crate::formats::{AttentionShape, CacheFormat};

/// Counts over compressed pages of one layout; add those of several heads or layers up.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct PageStatistics {
    /// Pages.
    pub pages: u64,
    /// Tokens in them.
    pub tokens: u64,
    /// Elements of the keys of these tokens.
    pub elements: u64,
    /// Of a delta page: elements whose difference is not kept, counted from the masks.
    pub zeros: u64,
    /// 32-bit words of the pages.
    pub words: u64,
    /// Thresholds that delta pages were encoded with; `None` for quantised keys.
    pub theta: Option<ThetaRange>,
}

/// Thresholds of several pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ThetaRange {
    /// The smallest.
    pub min: f32,
    /// The largest.
    pub max: f32,
    sum: f64,
    pages: u64,
}

impl ThetaRange {
    /// The mean over the pages.
    pub fn mean(&self) -> f64 {
        self.sum / self.pages as f64
    }
}

impl PageStatistics {
    /// Counts one page, which [`Page::check`] has no objection to.
    pub fn of_page(layout: &PageLayout, page: &Page) -> Self {
        let tokens = layout.tokens as u64;
        let elements = tokens * layout.head_dim as u64;
        let delta = layout.delta().map(|_| {
            let masks = &page.words[layout.masks()..layout.offsets()];
            let kept: u64 = masks.iter().map(|word| u64::from(word.count_ones())).sum();
            (elements - kept, page.theta(layout))
        });
        Self {
            pages: 1,
            tokens,
            elements,
            zeros: delta.map_or(0, |(zeros, _)| zeros),
            words: page.words.len() as u64,
            theta: delta.map(|(_, theta)| ThetaRange {
                min: theta,
                max: theta,
                sum: f64::from(theta),
                pages: 1,
            }),
        }
    }

    /// Counts some pages.
    pub fn of_pages(layout: &PageLayout, pages: &[Page]) -> Self {
        pages.iter().map(|page| Self::of_page(layout, page)).sum()
    }

    /// Bytes of the pages.
    pub fn bytes(&self) -> u64 {
        4 * self.words
    }

    /// Bits that an element takes, everything in its page included; `None` without a page.
    pub fn bits_per_element(&self) -> Option<f64> {
        self.of_elements(32 * self.words)
    }

    /// Share of elements whose difference is zero; `None` where keys are not differences, or
    /// without a page.
    pub fn zero_share(&self) -> Option<f64> {
        self.theta.and_then(|_| self.of_elements(self.zeros))
    }

    /// The paper's sparsity: the share of zeros in the part of a prompt's attention that uses them,
    /// `zeros * (1 - alpha)`.
    pub fn sparsity(&self, policy: &AttentionPolicy) -> Option<f64> {
        self.zero_share().map(|zeros| zeros * (1.0 - f64::from(policy.prefill.share)))
    }

    fn of_elements(&self, count: u64) -> Option<f64> {
        (self.elements > 0).then(|| count as f64 / self.elements as f64)
    }
}

impl AddAssign for PageStatistics {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.tokens += other.tokens;
        self.elements += other.elements;
        self.zeros += other.zeros;
        self.words += other.words;
        self.theta = match (self.theta, other.theta) {
            (Some(a), Some(b)) => Some(ThetaRange {
                min: a.min.min(b.min),
                max: a.max.max(b.max),
                sum: a.sum + b.sum,
                pages: a.pages + b.pages,
            }),
            (one, other) => one.or(other),
        };
    }
}

impl Sum for PageStatistics {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, one| {
            sum += one;
            sum
        })
    }
}

/// What the cache of a session holds.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheStatistics {
    /// How the cache is kept.
    pub policy: AttentionPolicy,
    /// Tokens in the cache.
    pub length: usize,
    /// Counts of the compressed pages of each layer and KV head, `[layers][G]`.
    pub heads: Vec<Vec<PageStatistics>>,
    /// Bytes that the keys of these tokens take: their pages, and the original keys that are kept
    /// beside them. Room to grow is not counted.
    pub key_bytes: u64,
    /// Bytes that the values of these tokens take, likewise.
    pub value_bytes: u64,
    /// Bytes that the same tokens take with dense attention in f16, keys and values, likewise: one
    /// half each.
    pub dense_bytes: u64,
}

impl CacheStatistics {
    /// Counts the pages `[layers][G][pages]` of a cache of `length` tokens that keeps so many
    /// `originals` of their keys.
    pub fn new(
        policy: &AttentionPolicy,
        shape: &AttentionShape,
        length: usize,
        originals: usize,
        pages: &[Vec<Vec<Page>>],
    ) -> crate::Result<Self> {
        let layout = PageLayout::new(policy, shape.head_dim)?;
        let count = |pages: &Vec<Page>| match &layout {
            Some(layout) => PageStatistics::of_pages(layout, pages),
            None => PageStatistics::default(),
        };
        let layer = |heads: &Vec<Vec<Page>>| match layout {
            Some(_) => heads.iter().map(count).collect(),
            None => vec![PageStatistics::default(); shape.kv_heads],
        };
        let dense = pages.len() * length * 2 * shape.kv_width() * CacheFormat::F16.bytes();
        let heads: Vec<Vec<PageStatistics>> = pages.iter().map(layer).collect();
        let compressed: u64 = heads.iter().flatten().map(PageStatistics::bytes).sum();
        let every_head = pages.len() * shape.kv_heads;
        let originals = every_head * originals * shape.head_dim * policy.exact.bytes();
        Ok(Self {
            policy: *policy,
            length,
            heads,
            key_bytes: compressed + originals as u64,
            value_bytes: (every_head * length * policy.value_row_bytes(shape.head_dim)) as u64,
            dense_bytes: dense as u64,
        })
    }

    /// All KV heads of a layer.
    pub fn layer(&self, layer: usize) -> PageStatistics {
        self.heads[layer].iter().copied().sum()
    }

    /// All of it.
    pub fn total(&self) -> PageStatistics {
        self.heads.iter().flatten().copied().sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::delta::encode_page;
    use crate::sampler::Draws;

    /// A random walk, as keys are.
    fn walk(layout: &PageLayout, seed: u64) -> Vec<f32> {
        let mut draws = Draws::new(seed);
        let mut now: Vec<f32> = (0..layout.head_dim).map(|_| draws.draw()).collect();
        let mut keys = Vec::new();
        for _ in 0..layout.tokens {
            now.iter_mut().for_each(|k| *k += draws.draw() - 0.5);
            keys.extend_from_slice(&now);
        }
        keys
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

        /// Against counts made in other ways: kept channels one by one, and the sizes that the
        /// format's description gives.
        #[test]
        fn counts_agree_with_the_words(
            seed in 0u64..1000,
            theta in 0.0f32..1.5,
            head_dim in (1usize..40).prop_map(|half| 2 * half),
            pages in 1usize..4,
            deltas in prop_oneof![Just(("f16", 16)), Just(("int8", 8)), Just(("int4", 4))],
            reference in prop_oneof![Just("continuous"), Just("anchored"), Just("mean")],
        ) {
            let (name, bits) = deltas;
            let text = format!("delta theta={theta} deltas={name} reference={reference} page=16 alpha=0.25");
            let policy: AttentionPolicy = text.parse().expect("a policy");
            let layout = PageLayout::new(&policy, head_dim).expect("fits").expect("compressed");
            let pages: Vec<Page> = (0..pages as u64)
                .map(|page| encode_page(&layout, &walk(&layout, 10 * seed + page), None))
                .collect();
            let found = PageStatistics::of_pages(&layout, &pages);

            let (mut kept, mut words) = (0, 0);
            for page in &pages {
                let mut in_page = 0;
                for token in 0..16 {
                    in_page += (0..head_dim).filter(|&c| page.is_kept(&layout, token, c)).count();
                }
                let scales = if bits == 16 { 0 } else { head_dim / 2 };
                let masks = 16 * head_dim.div_ceil(32);
                words += head_dim / 2 + scales + masks + 16 / 2 + 3 + (in_page * bits).div_ceil(32);
                kept += in_page;
            }
            let elements = pages.len() * 16 * head_dim;
            prop_assert_eq!(found.pages, pages.len() as u64);
            prop_assert_eq!(found.tokens, 16 * pages.len() as u64);
            prop_assert_eq!(found.elements, elements as u64);
            prop_assert_eq!(found.zeros, (elements - kept) as u64);
            prop_assert_eq!(found.words, words as u64);
            prop_assert_eq!(found.bytes(), pages.iter().map(Page::bytes).sum::<u64>());
            let zeros = 1.0 - kept as f64 / elements as f64;
            prop_assert!((found.zero_share().expect("deltas") - zeros).abs() < 1e-12);
            let sparsity = found.sparsity(&policy).expect("deltas");
            prop_assert!((sparsity - 0.75 * zeros).abs() < 1e-12);
            let bits = found.bits_per_element().expect("elements");
            prop_assert!((bits - 32.0 * words as f64 / elements as f64).abs() < 1e-12);
            let range = found.theta.expect("deltas");
            prop_assert_eq!((range.min, range.max), (theta, theta));
            prop_assert!((range.mean() - f64::from(theta)).abs() < 1e-6);
        }
    }

    #[test]
    fn quantised_keys_have_no_zeros_and_no_theta() {
        for (text, bits) in [("keys=int8", 8.25), ("keys=channel4", 4.5), ("keys=channel2", 2.5)] {
            let policy: AttentionPolicy = text.parse().expect("a policy");
            let layout = PageLayout::new(&policy, 64).expect("fits").expect("compressed");
            let page = encode_page(&layout, &walk(&layout, 1), None);
            let found = PageStatistics::of_page(&layout, &page);
            assert_eq!(found.bits_per_element(), Some(bits), "{text}");
            assert_eq!((found.zero_share(), found.theta), (None, None), "{text}");
        }
        assert_eq!(PageStatistics::default().bits_per_element(), None);
    }

    #[test]
    fn a_cache_is_the_sum_of_its_heads() {
        let policy: AttentionPolicy = "delta page=16".parse().expect("a policy");
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 8 };
        let layout = PageLayout::new(&policy, 8).expect("fits").expect("compressed");
        let page = |seed| encode_page(&layout, &walk(&layout, seed), None);
        let layers: Vec<Vec<Vec<Page>>> =
            (0..3).map(|l| (0..2).map(|g| vec![page(2 * l + g)]).collect()).collect();
        let found = CacheStatistics::new(&policy, &shape, 20, 7, &layers).expect("counted");
        let thetas: Vec<f32> =
            layers.iter().flatten().flatten().map(|p| p.theta(&layout)).collect();
        let total = found.total();
        assert_eq!(total.pages, 6);
        assert_eq!(total.words, (0..3).map(|l| found.layer(l).words).sum::<u64>());
        let range = total.theta.expect("deltas");
        assert_eq!(range.min, thetas.iter().copied().fold(f32::INFINITY, f32::min));
        assert_eq!(range.max, thetas.iter().copied().fold(0.0, f32::max));
        // Keys and values, 20 tokens, 3 layers, 2 heads of 8, 2 bytes.
        assert_eq!(found.dense_bytes, 2 * 20 * 3 * 2 * 8 * 2);
        assert_eq!(found.key_bytes, total.bytes() + 7 * 3 * 2 * 8 * 2);
        assert_eq!(found.value_bytes, found.dense_bytes / 2);

        let dense = vec![Vec::new(); 3];
        let dense = CacheStatistics::new(&AttentionPolicy::dense(), &shape, 20, 20, &dense);
        let dense = dense.expect("counted");
        assert_eq!(dense.total(), PageStatistics::default());
        assert_eq!(dense.key_bytes + dense.value_bytes, dense.dense_bytes);
    }
}
