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
            return refuse("temperature", self.temperature, "must be 0 or more");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", self.top_p, "must be above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return refuse("min_p", self.min_p, "must be from 0 to 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return refuse("repetition_penalty", self.repetition_penalty, "must be above 0");
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
/// Sums run in the candidates' order, in `f32`. A NaN among the logits is an error, never a token.
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
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 40) as f32 / (1u32 << 24) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_gives_its_published_sequence() {
        // The first output of SplitMix64 for seed 0 is 0xe220a8397b1dcdaf.
        let first = Draws::new(0).draw();
        assert_eq!(first, (0xe220_a839_7b1d_cdafu64 >> 40) as f32 / (1u32 << 24) as f32);
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
}
