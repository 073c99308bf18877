//! How a token is chosen from logits: the user's parameters, and the exact rule that every backend
//! follows.

use crate::error::{Error, Result};

/// What the user asks of sampling. The default is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Softmax temperature; 0 takes the most likely token. At least 0.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the fewest tokens whose probabilities reach `top_p`; 1 keeps all. In (0, 1].
    pub top_p: f32,
    /// Keep tokens at least `min_p` times as likely as the most likely one; 0 keeps all. In [0, 1].
    pub min_p: f32,
    /// Divides the positive and multiplies the negative logits of tokens that stand in the context;
    /// 1 changes nothing. Above 0.
    pub repetition_penalty: f32,
    /// Seed of the random numbers. The same seed gives the same text on the same device.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Refuses values out of range.
    ///
    /// # Errors
    /// [`Error::Parameter`] with the allowed range.
    pub fn check(&self) -> Result<()> {
        let refuse = |name, value: f32, allowed: &str| {
            let (value, allowed) = (value.to_string(), allowed.to_owned());
            Err(Error::Parameter { name, value, allowed })
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return refuse(
                "temperature",
                self.temperature,
                "must be a finite number of at least 0",
            );
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", self.top_p, "must be above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return refuse("min_p", self.min_p, "must be from 0 to 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return refuse(
                "repetition_penalty",
                self.repetition_penalty,
                "must be a finite number above 0",
            );
        }
        Ok(())
    }
}

/// The set of token ids that stand in the context, a bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenSet {
    words: Vec<u32>,
}

impl TokenSet {
    /// An empty set over a vocabulary.
    pub fn new(vocabulary: usize) -> Self {
        Self { words: vec![0; vocabulary.div_ceil(32)] }
    }

    /// Adds a token of the vocabulary.
    pub fn insert(&mut self, token: u32) {
        self.words[token as usize / 32] |= 1 << (token % 32);
    }

    /// Whether a token is in the set.
    pub fn contains(&self, token: u32) -> bool {
        self.words.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// Removes every token.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The set as words of 32 tokens, the lowest id in the lowest bit.
    pub fn words(&self) -> &[u32] {
        &self.words
    }
}

/// Everything that the choice of one token depends on.
///
/// # The rule
/// 1. Each logit `l` of a token in `seen` becomes `l / penalty` if positive, else `l * penalty`.
/// 2. Candidates are ordered by logit, falling; equal logits by id, rising.
/// 3. `temperature = 0` or `top_k = 1`: the first candidate.
/// 4. Else the first `top_k` candidates are kept (all if 0) with weights
///    `w_i = exp((l_i - l_0) / temperature)`, `W` their sum.
/// 5. `min_p`: the candidates with `w_i >= min_p` are kept: a prefix, never empty.
/// 6. `top_p`: of these the shortest prefix with `w_0 + ... + w_i >= top_p W`, if there is one.
/// 7. The first candidate with `w_0 + ... + w_i > draw S` is chosen, `S` the sum over those left;
///    the last one if rounding leaves none.
///
/// Sums run in the candidates' order, in `f32`. A NaN among the logits, or a first candidate that
/// is infinite, is an error, never a token.
#[derive(Clone, Copy, Debug)]
pub struct SampleStep<'a> {
    /// See [`Sampling::temperature`].
    pub temperature: f32,
    /// See [`Sampling::top_k`].
    pub top_k: usize,
    /// See [`Sampling::top_p`].
    pub top_p: f32,
    /// See [`Sampling::min_p`].
    pub min_p: f32,
    /// See [`Sampling::repetition_penalty`].
    pub repetition_penalty: f32,
    /// Tokens of the context, for the repetition penalty.
    pub seen: &'a TokenSet,
    /// A uniform random number in [0, 1).
    pub draw: f32,
}

impl SampleStep<'_> {
    /// Whether the choice is the most likely token, whatever is drawn.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }

    /// Chooses a token from `logits` `[vocabulary]` by the rule, on the host; `None` where one of
    /// them is NaN or the likeliest is infinite. The logits are left with the repetition penalty applied.
    pub fn choose(&self, logits: &mut [f32]) -> Option<u32> {
        if self.repetition_penalty != 1.0 {
            for (token, logit) in (0u32..).zip(logits.iter_mut()) {
                if self.seen.contains(token) {
                    *logit = if *logit > 0.0 {
                        *logit / self.repetition_penalty
                    } else {
                        *logit * self.repetition_penalty
                    };
                }
            }
        }
        if logits.is_empty() || logits.iter().any(|logit| logit.is_nan()) {
            return None;
        }
        let likelier = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
        let likeliest = (1..logits.len()).fold(0, likelier);
        if !logits[likeliest].is_finite() {
            return None;
        }
        if self.is_greedy() {
            return Some(likeliest as u32);
        }
        let candidates = self.candidates(logits);
        self.draw_from(&candidates)
    }

    /// The `top_k` likeliest tokens with their logits, in the rule's order.
    fn candidates(&self, logits: &[f32]) -> Vec<(u32, f32)> {
        let mut all: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if self.top_k > 0 && self.top_k < all.len() {
            all.select_nth_unstable_by(self.top_k - 1, order);
            all.truncate(self.top_k);
        }
        all.sort_unstable_by(order);
        all
    }

    /// Steps 4 to 7 of the rule.
    fn draw_from(&self, candidates: &[(u32, f32)]) -> Option<u32> {
        let &(_, highest) = candidates.first()?;
        let weight = |&(_, logit): &(u32, f32)| ((logit - highest) / self.temperature).exp();
        let weights: Vec<f32> = candidates.iter().map(weight).collect();
        let total: f32 = weights.iter().sum();
        let mut kept = weights.iter().take_while(|w| **w >= self.min_p).count().max(1);
        let mut sum = 0.0;
        let reaches = |w: &f32| {
            sum += w;
            sum >= self.top_p * total
        };
        if let Some(last) = weights[..kept].iter().position(reaches) {
            kept = last + 1;
        }
        let target = self.draw * weights[..kept].iter().sum::<f32>();
        let mut sum = 0.0;
        let passes = |w: &f32| {
            sum += w;
            sum > target
        };
        let chosen = weights[..kept].iter().position(passes).unwrap_or(kept - 1);
        Some(candidates[chosen].0)
    }
}

/// Uniform random numbers from a seed: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
///
/// It stands here and not in a dependency because a seed must give the same text in every later
/// version of this crate.
#[derive(Clone, Debug)]
pub struct Draws {
    state: u64,
}

impl Draws {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next number, in [0, 1), a multiple of 2^-24.
    pub fn draw(&mut self) -> f32 {
        (splitmix64(&mut self.state) >> 40) as f32 / (1u32 << 24) as f32
    }
}

/// One step of SplitMix64: 64 random bits.
pub(crate) fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_gives_its_published_sequence() {
        // The first output of SplitMix64 for seed 0 is 0xe220a8397b1dcdaf.
        assert_eq!(splitmix64(&mut 0), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        let bad = [
            Sampling { temperature: -0.1, ..Default::default() },
            Sampling { temperature: f32::NAN, ..Default::default() },
            Sampling { top_p: 0.0, ..Default::default() },
            Sampling { top_p: 1.1, ..Default::default() },
            Sampling { min_p: -1.0, ..Default::default() },
            Sampling { repetition_penalty: 0.0, ..Default::default() },
        ];
        for sampling in bad {
            assert!(sampling.check().is_err(), "{sampling:?}");
        }
        assert!(Sampling::default().check().is_ok());
    }

    fn choose(logits: &[f32], change: impl FnOnce(&mut SampleStep<'_>)) -> Option<u32> {
        let seen = TokenSet::new(logits.len());
        let mut step = SampleStep {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seen: &seen,
            draw: 0.0,
        };
        change(&mut step);
        step.choose(&mut logits.to_vec())
    }

    #[test]
    fn a_draw_follows_the_probabilities() {
        let logits = [0.5f32.ln(), 0.25f32.ln(), 0.125f32.ln(), 0.125f32.ln()];
        for (draw, token) in [(0.0, 0), (0.49, 0), (0.51, 1), (0.74, 1), (0.76, 2), (0.9, 3)] {
            assert_eq!(choose(&logits, |s| s.draw = draw), Some(token), "{draw}");
        }
    }

    #[test]
    fn each_filter_keeps_a_prefix() {
        let logits = [0.125f32.ln(), 0.5f32.ln(), 0.25f32.ln(), 0.125f32.ln()];
        let last = 0.999;
        assert_eq!(choose(&logits, |s| (s.draw, s.top_k) = (last, 2)), Some(2));
        assert_eq!(choose(&logits, |s| (s.draw, s.top_p) = (last, 0.7)), Some(2));
        assert_eq!(choose(&logits, |s| (s.draw, s.top_p) = (last, 0.4)), Some(1));
        assert_eq!(choose(&logits, |s| (s.draw, s.min_p) = (last, 0.4)), Some(2));
        assert_eq!(choose(&logits, |s| (s.draw, s.min_p) = (last, 1.0)), Some(1));
        assert_eq!(choose(&logits, |s| (s.draw, s.temperature) = (last, 1e-6)), Some(1));
        assert_eq!(choose(&logits, |s| (s.draw, s.top_k) = (last, 1)), Some(1));
        assert_eq!(choose(&logits, |s| s.draw = last), Some(3));
    }

    #[test]
    fn equal_logits_go_by_id_and_nan_is_refused() {
        assert_eq!(choose(&[1.0, 2.0, 2.0], |s| s.temperature = 0.0), Some(1));
        assert_eq!(choose(&[1.0, f32::NAN], |_| ()), None);
        assert_eq!(choose(&[1.0, f32::NAN], |s| s.temperature = 0.0), None);
        for bad in [[f32::NEG_INFINITY, f32::INFINITY], [f32::NEG_INFINITY; 2]] {
            assert_eq!(choose(&bad, |s| s.draw = 0.9), None);
            assert_eq!(choose(&bad, |s| s.temperature = 0.0), None);
        }
        assert_eq!(choose(&[f32::NEG_INFINITY, 3.0], |s| s.draw = 0.9), Some(1));
    }

    #[test]
    fn the_penalty_lowers_what_was_seen() {
        let mut seen = TokenSet::new(3);
        seen.insert(0);
        seen.insert(2);
        let mut logits = [2.0, 1.5, -1.0];
        let step = SampleStep {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 2.0,
            seen: &seen,
            draw: 0.0,
        };
        assert_eq!(step.choose(&mut logits), Some(1));
        assert_eq!(logits, [1.0, 1.5, -2.0]);
    }
}
