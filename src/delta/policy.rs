//! Every choice of how keys and values are kept, in one value.

use std::ops::RangeInclusive;

use super::page::PageLayout;
use super::window::{ExactRule, Phase, Window};
use crate::error::{Error, Result};
use crate::formats::CacheFormat;

/// How keys and values are kept, and which keys a query sees exactly.
///
/// It is printed as the `name=value` pairs that have an effect, which [`FromStr`](std::str::FromStr) reads:
/// `keys=delta theta=0.6 reference=continuous deltas=f16 ...`. The default is dense attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionPolicy {
    /// How the keys of full pages are kept.
    pub keys: KeyFormat,
    /// How values are kept.
    pub values: ValueFormat,
    /// Format of what is not compressed: plain keys and values, the sink and the window.
    pub exact: CacheFormat,
    /// The first keys of a text, which every query sees exactly.
    pub sink: usize,
    /// The window of a prompt's queries.
    pub prefill: PrefillWindow,
    /// The window of decoding: the most recent keys, at least this many, in whole pages.
    pub window: usize,
    /// Tokens of a page: 16, 32, 64 or 128.
    pub page: usize,
}

/// How the keys of full pages are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KeyFormat {
    /// As they are, in [`AttentionPolicy::exact`]: dense attention.
    Plain,
    /// 8 bits an element and one scale a token.
    Int8,
    /// 4 or 2 bits an element; each channel has its scale and minimum over the tokens of a page
    /// (as in KIVI, <https://arxiv.org/abs/2402.02750>).
    Channel(ChannelBits),
    /// Thresholded differences (DeltaLLM).
    Delta(DeltaKeys),
}

impl KeyFormat {
    /// The name as a policy spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Int8 => "int8",
            Self::Channel(ChannelBits::Four) => "channel4",
            Self::Channel(ChannelBits::Two) => "channel2",
            Self::Delta(_) => "delta",
        }
    }

    /// The format of this name in place of this one; delta keys are as they were, or as in
    /// [`AttentionPolicy::delta`].
    pub fn changed_to(self, name: &str) -> Option<Self> {
        Some(match (name, self) {
            ("plain", _) => Self::Plain,
            ("int8", _) => Self::Int8,
            ("channel4", _) => Self::Channel(ChannelBits::Four),
            ("channel2", _) => Self::Channel(ChannelBits::Two),
            ("delta", Self::Delta(_)) => self,
            ("delta", _) => AttentionPolicy::delta().keys,
            _ => return None,
        })
    }
}

/// Bits of an element in [`KeyFormat::Channel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChannelBits {
    /// 16 levels.
    Four,
    /// 4 levels.
    Two,
}

impl ChannelBits {
    /// The number.
    pub fn bits(self) -> usize {
        match self {
            Self::Four => 4,
            Self::Two => 2,
        }
    }
}

/// How keys become thresholded differences.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaKeys {
    /// What a channel's difference must exceed to be kept.
    pub threshold: Threshold,
    /// What keys are differences from.
    pub reference: Reference,
    /// Number format of the differences that are kept.
    pub deltas: DeltaFormat,
}

/// What a channel's difference must exceed to be kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Threshold {
    /// This much: the paper's theta.
    Absolute(f32),
    /// This many standard deviations of the keys' elements, taken over the page: each layer, head
    /// and page has a theta of its own.
    Relative(f32),
}

/// What keys are differences from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reference {
    /// The reconstruction of the key before, through the whole text: the paper's chain.
    Continuous,
    /// The same, begun anew with each page's first key.
    Anchored,
    /// The mean over the page of each channel: every token stands alone.
    Mean,
}

/// Number format of kept differences.
///
/// Chains are encoded in closed loop: the reference moves by the rounded difference, so that
/// rounding errors do not add up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeltaFormat {
    /// Half precision.
    F16,
    /// 8 bits, one scale a channel and page.
    Int8,
    /// 4 bits, one scale a channel and page.
    Int4,
}

impl DeltaFormat {
    /// Bits of a kept difference.
    pub fn bits(self) -> usize {
        match self {
            Self::F16 => 16,
            Self::Int8 => 8,
            Self::Int4 => 4,
        }
    }

    /// The largest level; `None` for floats.
    pub fn levels(self) -> Option<i32> {
        match self {
            Self::F16 => None,
            Self::Int8 => Some(127),
            Self::Int4 => Some(7),
        }
    }
}

/// How values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ValueFormat {
    /// As they are, in [`AttentionPolicy::exact`].
    Plain,
    /// 8 bits an element and one scale a token.
    Int8,
    /// 4 bits an element, one scale and minimum a token.
    Int4,
}

/// The window of a prompt of `L` tokens: `round(share * L)` keys, at least one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrefillWindow {
    /// The paper's alpha, from 0 to 1.
    pub share: f32,
    /// Where the window lies.
    pub shape: WindowShape,
}

/// Where the window of a prompt's query lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WindowShape {
    /// From the start of the query's own aligned block on: the paper's.
    Block,
    /// The keys just before the query.
    Sliding,
}

/// Thresholds up to here.
pub(super) const MAX_THETA: f32 = 1e4;
/// Sinks up to here.
const MAX_SINK: usize = 1024;
/// Windows of decoding.
const WINDOWS: RangeInclusive<usize> = 1..=65536;
/// Page sizes.
const PAGES: [usize; 4] = [16, 32, 64, 128];

impl Default for AttentionPolicy {
    fn default() -> Self {
        Self::dense()
    }
}

impl AttentionPolicy {
    /// Every key and value as it is, in f16.
    pub const fn dense() -> Self {
        Self {
            keys: KeyFormat::Plain,
            values: ValueFormat::Plain,
            exact: CacheFormat::F16,
            sink: 4,
            prefill: PrefillWindow { share: 0.05, shape: WindowShape::Sliding },
            window: 128,
            page: 64,
        }
    }

    /// The default of delta attention: about 60 % zeros in three bits a key element, the part of the
    /// range in which deltas have less error than plain quantised keys of as many bits
    /// (benches/runs/2026-11-20-epyc-attention).
    pub const fn delta() -> Self {
        let keys = DeltaKeys {
            threshold: Threshold::Relative(0.7),
            reference: Reference::Mean,
            deltas: DeltaFormat::Int4,
        };
        Self { keys: KeyFormat::Delta(keys), ..Self::dense() }
    }

    /// The paper's settings: theta 0.6, one chain, differences as floats, aligned blocks of 5 %.
    ///
    /// The paper does not state its sink, its decode window or a page: those are ours.
    pub const fn paper() -> Self {
        let keys = DeltaKeys {
            threshold: Threshold::Absolute(0.6),
            reference: Reference::Continuous,
            deltas: DeltaFormat::F16,
        };
        let prefill = PrefillWindow { share: 0.05, shape: WindowShape::Block };
        Self { keys: KeyFormat::Delta(keys), prefill, ..Self::dense() }
    }

    /// Dense attention with keys and values in this format.
    pub const fn plain(exact: CacheFormat) -> Self {
        Self { exact, ..Self::dense() }
    }

    /// Whether every query sees every key exactly.
    pub fn is_dense(&self) -> bool {
        self.keys == KeyFormat::Plain
    }

    /// Refuses what is out of range.
    ///
    /// # Errors
    /// [`Error::Parameter`] with the allowed range.
    pub fn check(&self) -> Result<()> {
        let refuse = |name, value: String, allowed: String| -> Result<()> {
            Err(Error::Parameter { name, value, allowed })
        };
        if let KeyFormat::Delta(DeltaKeys { threshold, .. }) = self.keys
            && !(0.0..=MAX_THETA).contains(&threshold.number())
        {
            return refuse("theta", threshold.to_string(), "must be from 0 to 10000".into());
        }
        if self.sink > MAX_SINK {
            let allowed = format!("must be from 0 to {MAX_SINK} tokens");
            return refuse("sink", self.sink.to_string(), allowed);
        }
        let share = self.prefill.share;
        if !(0.0..=1.0).contains(&share) {
            return refuse("alpha", share.to_string(), "must be from 0 to 1".into());
        }
        if !WINDOWS.contains(&self.window) {
            let allowed = format!("must be from {} to {} tokens", WINDOWS.start(), WINDOWS.end());
            return refuse("window", self.window.to_string(), allowed);
        }
        if !PAGES.contains(&self.page) {
            let allowed = "must be 16, 32, 64 or 128 tokens".into();
            return refuse("page", self.page.to_string(), allowed);
        }
        Ok(())
    }

    /// The window of a prompt of `length` tokens, in keys.
    pub fn prefill_window(&self, length: usize) -> usize {
        ((f64::from(self.prefill.share) * length as f64).round() as usize).max(1)
    }

    /// Which keys the queries of a phase see exactly.
    pub fn rule(&self, phase: Phase) -> ExactRule {
        let window = match (self.keys, phase, self.prefill.shape) {
            (KeyFormat::Plain, ..) => Window::Everything,
            (_, Phase::Decode, _) => Window::Pages(self.window),
            (_, Phase::Prefill { length }, WindowShape::Block) => {
                Window::Block(self.prefill_window(length))
            }
            (_, Phase::Prefill { length }, WindowShape::Sliding) => {
                Window::Sliding(self.prefill_window(length))
            }
        };
        ExactRule { sink: self.sink, page: self.page, window }
    }

    /// Most keys before a query, itself included, that it sees exactly as its window, in a text of
    /// up to `context` tokens.
    pub fn widest_window(&self, context: usize) -> usize {
        let decode = self.window + self.page;
        decode.max(self.prefill_window(context)).max(self.page).min(context)
    }

    /// Original keys that are kept beside the sink, where keys are compressed: the widest window of
    /// the first token of a step, and the `rows` tokens of the step.
    ///
    /// Key `n` beyond the sink lies in slot `n % recent_slots` until it is overwritten.
    pub fn recent_slots(&self, context: usize, rows: usize) -> usize {
        (self.widest_window(context) + rows).min(context)
    }

    /// Bytes that the keys of one layer and KV head can take at most, `context` tokens in steps of
    /// up to `rows`: where keys are deltas, all of which are kept.
    pub fn most_key_bytes(&self, context: usize, rows: usize, head_dim: usize) -> u128 {
        let wide = |n: usize| n as u128;
        let key = wide(head_dim) * wide(self.exact.bytes());
        if self.is_dense() {
            return wide(context) * key;
        }
        let layout = PageLayout { keys: self.keys, tokens: self.page, head_dim };
        let exact = self.sink.min(context) + self.recent_slots(context, rows);
        wide(exact) * key + wide(context / self.page) * wide(layout.max_words()) * 4
    }

    /// Bytes that the values of one layer and KV head take.
    pub fn value_bytes(&self, context: usize, head_dim: usize) -> u128 {
        context as u128 * self.value_row_bytes(head_dim) as u128
    }

    /// Bytes of one value of a head, its scales included.
    pub fn value_row_bytes(&self, head_dim: usize) -> usize {
        match self.values {
            ValueFormat::Plain => head_dim * self.exact.bytes(),
            ValueFormat::Int8 => head_dim + 2,
            ValueFormat::Int4 => head_dim.div_ceil(2) + 4,
        }
    }
}
