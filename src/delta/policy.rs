//! Every choice of how keys and values are kept, in one value.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use super::page::PageLayout;
use super::window::{ExactRule, Phase, Window};
use crate::error::{Error, Result};
use crate::formats::CacheFormat;

/// How keys and values are kept, and which keys a query sees exactly.
///
/// It is printed as the `name=value` pairs that have an effect, which [`FromStr`] reads:
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
        if let KeyFormat::Delta(DeltaKeys { threshold, .. }) = self.keys {
            let (Threshold::Absolute(theta) | Threshold::Relative(theta)) = threshold;
            if !(0.0..=1e4).contains(&theta) {
                return refuse("theta", threshold.to_string(), "must be from 0 to 10000".into());
            }
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

impl fmt::Display for AttentionPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "keys={}", self.keys.name())?;
        if let KeyFormat::Delta(DeltaKeys { threshold, reference, deltas }) = self.keys {
            write!(f, " theta={threshold}")?;
            write!(f, " reference={} deltas={}", reference.name(), deltas.name())?;
        }
        write!(f, " values={} exact={}", self.values.name(), self.exact.name())?;
        if self.is_dense() {
            return Ok(());
        }
        let PrefillWindow { share, shape } = self.prefill;
        write!(f, " sink={} alpha={share} shape={}", self.sink, shape.name())?;
        write!(f, " window={} page={}", self.window, self.page)
    }
}

impl FromStr for AttentionPolicy {
    type Err = Error;

    /// Reads `name=value` pairs in any order, as [`fmt::Display`] writes them; before them may stand
    /// one of `dense`, `delta` and `paper`, where fields that are left out come from. Without it
    /// they come from `dense`, and those of delta keys from `delta`.
    ///
    /// A field that is given twice, or that has no effect with the chosen keys, is an error.
    fn from_str(text: &str) -> Result<Self> {
        let mut words = text.split_whitespace().peekable();
        let preset = words.next_if(|word| !word.contains('='));
        let presets = "must be dense, delta or paper, or name=value";
        let mut policy = match preset {
            None if words.peek().is_none() => {
                return Err(refused("attention policy", "\"\"", presets));
            }
            None | Some("dense") => Self::dense(),
            Some("delta") => Self::delta(),
            Some("paper") => Self::paper(),
            Some(word) => return Err(refused("attention policy", word, presets)),
        };
        let fields = Fields::read(words)?;
        let plain = fields.keys == Some("plain");
        match preset {
            Some("dense") if fields.keys.is_some() && !plain => {
                return Err(refused("keys", fields.keys, "dense keeps keys plain: leave it out"));
            }
            Some("delta" | "paper") if plain => {
                let allowed = "contradicts delta and paper: use dense";
                return Err(refused("keys", fields.keys, allowed));
            }
            _ => {}
        }
        if let Some(keys) = fields.keys {
            policy.keys = policy.keys.changed_to(keys).ok_or_else(|| {
                refused("keys", keys, "must be plain, int8, channel4, channel2 or delta")
            })?;
        }
        fields.set_deltas(&mut policy)?;
        fields.set_windows(&mut policy)?;
        if let Some(values) = fields.values {
            policy.values = ValueFormat::named(values)
                .ok_or_else(|| refused("values", values, "must be plain, int8 or int4"))?;
        }
        if let Some(exact) = fields.exact {
            policy.exact = CacheFormat::named(exact)
                .ok_or_else(|| refused("exact", exact, "must be f16 or f32"))?;
        }
        policy.check()?;
        Ok(policy)
    }
}

/// The fields of a policy's text as they are given.
#[derive(Default)]
struct Fields<'a> {
    keys: Option<&'a str>,
    theta: Option<&'a str>,
    reference: Option<&'a str>,
    deltas: Option<&'a str>,
    values: Option<&'a str>,
    exact: Option<&'a str>,
    sink: Option<&'a str>,
    alpha: Option<&'a str>,
    shape: Option<&'a str>,
    window: Option<&'a str>,
    page: Option<&'a str>,
}

impl<'a> Fields<'a> {
    fn read(words: impl Iterator<Item = &'a str>) -> Result<Self> {
        let mut fields = Self::default();
        for word in words {
            let Some((name, value)) = word.split_once('=') else {
                let allowed = match word {
                    "dense" | "delta" | "paper" => "must stand first, and only one of them",
                    _ => "must be name=value",
                };
                return Err(refused("attention policy", word, allowed));
            };
            let field = match name {
                "keys" => &mut fields.keys,
                "theta" => &mut fields.theta,
                "reference" => &mut fields.reference,
                "deltas" => &mut fields.deltas,
                "values" => &mut fields.values,
                "exact" => &mut fields.exact,
                "sink" => &mut fields.sink,
                "alpha" => &mut fields.alpha,
                "shape" => &mut fields.shape,
                "window" => &mut fields.window,
                "page" => &mut fields.page,
                _ => return Err(refused("attention policy", word, "there is no such field")),
            };
            if field.replace(value).is_some() {
                return Err(refused("attention policy", word, "the field is given twice"));
            }
        }
        Ok(fields)
    }

    fn set_deltas(&self, policy: &mut AttentionPolicy) -> Result<()> {
        let KeyFormat::Delta(delta) = &mut policy.keys else {
            let given =
                [("theta", self.theta), ("reference", self.reference), ("deltas", self.deltas)];
            return none_given(&given, "needs keys=delta");
        };
        if let Some(theta) = self.theta {
            delta.threshold = theta.parse()?;
        }
        if let Some(reference) = self.reference {
            delta.reference = Reference::named(reference).ok_or_else(|| {
                refused("reference", reference, "must be continuous, anchored or mean")
            })?;
        }
        if let Some(deltas) = self.deltas {
            delta.deltas = DeltaFormat::named(deltas)
                .ok_or_else(|| refused("deltas", deltas, "must be f16, int8 or int4"))?;
        }
        Ok(())
    }

    fn set_windows(&self, policy: &mut AttentionPolicy) -> Result<()> {
        if policy.is_dense() {
            let given = [
                ("sink", self.sink),
                ("alpha", self.alpha),
                ("shape", self.shape),
                ("window", self.window),
                ("page", self.page),
            ];
            return none_given(&given, "needs compressed keys: keys=delta, or another format");
        }
        let whole = |name, given: Option<&str>, field: &mut usize| -> Result<()> {
            if let Some(value) = given {
                *field =
                    value.parse().map_err(|_| refused(name, value, "must be a whole number"))?;
            }
            Ok(())
        };
        whole("sink", self.sink, &mut policy.sink)?;
        whole("window", self.window, &mut policy.window)?;
        whole("page", self.page, &mut policy.page)?;
        if let Some(share) = self.alpha {
            policy.prefill.share =
                share.parse().map_err(|_| refused("alpha", share, "must be a number"))?;
        }
        if let Some(shape) = self.shape {
            policy.prefill.shape = WindowShape::named(shape)
                .ok_or_else(|| refused("shape", shape, "must be block or sliding"))?;
        }
        Ok(())
    }
}

/// Refuses the first field that is given although it has no effect.
fn none_given(fields: &[(&'static str, Option<&str>)], allowed: &str) -> Result<()> {
    match fields.iter().find(|(_, value)| value.is_some()) {
        None => Ok(()),
        Some(&(name, value)) => Err(refused(name, value, allowed)),
    }
}

fn refused<'a>(name: &'static str, value: impl Into<Option<&'a str>>, allowed: &str) -> Error {
    let value = value.into().unwrap_or_default().to_owned();
    Error::Parameter { name, value, allowed: allowed.to_owned() }
}

impl FromStr for Threshold {
    type Err = Error;

    /// `0.6`, or `1.5sigma` for standard deviations.
    fn from_str(text: &str) -> Result<Self> {
        let (number, make): (_, fn(f32) -> Self) = match text.strip_suffix("sigma") {
            Some(number) => (number, Self::Relative),
            None => (text, Self::Absolute),
        };
        number.trim().parse().map(make).map_err(|_| Error::Parameter {
            name: "theta",
            value: text.to_owned(),
            allowed: "must be a number, or a number and `sigma`".to_owned(),
        })
    }
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absolute(theta) => write!(f, "{theta}"),
            Self::Relative(theta) => write!(f, "{theta}sigma"),
        }
    }
}

/// Gives an enum the names by which it is printed and read.
macro_rules! names {
    ($type:ty: $($variant:ident = $name:literal),+) => {
        impl $type {
            /// The name as a policy spells it.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// The variant of this name.
            pub fn named(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$variant),)+
                    _ => None,
                }
            }
        }
    };
}

names!(Reference: Continuous = "continuous", Anchored = "anchored", Mean = "mean");
names!(DeltaFormat: F16 = "f16", Int8 = "int8", Int4 = "int4");
names!(ValueFormat: Plain = "plain", Int8 = "int8", Int4 = "int4");
names!(WindowShape: Block = "block", Sliding = "sliding");
names!(CacheFormat: F16 = "f16", F32 = "f32");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read() {
        let int4 = DeltaKeys {
            threshold: Threshold::Relative(0.7),
            reference: Reference::Anchored,
            deltas: DeltaFormat::Int4,
        };
        let policies = [
            AttentionPolicy::dense(),
            AttentionPolicy::delta(),
            AttentionPolicy::paper(),
            AttentionPolicy::plain(CacheFormat::F32),
            AttentionPolicy {
                keys: KeyFormat::Delta(int4),
                values: ValueFormat::Int4,
                sink: 0,
                window: 1,
                page: 16,
                ..AttentionPolicy::paper()
            },
            AttentionPolicy {
                keys: KeyFormat::Channel(ChannelBits::Two),
                values: ValueFormat::Int8,
                ..AttentionPolicy::dense()
            },
        ];
        for policy in policies {
            let text = policy.to_string();
            assert_eq!(text.parse::<AttentionPolicy>().expect(&text), policy, "{text}");
        }
        let named: AttentionPolicy = "paper theta=1.5 window=256".parse().expect("a policy");
        assert_eq!(named.window, 256);
        assert!(named.to_string().contains("theta=1.5 reference=continuous"));
    }

    /// Each preset with every choice of a field or two: what is accepted is printed, and read again.
    #[test]
    fn what_is_read_is_printed() {
        let fields = [
            "keys=plain",
            "keys=int8",
            "keys=channel4",
            "keys=channel2",
            "keys=delta",
            "theta=0",
            "theta=-0",
            "theta=1e-7",
            "theta=1e4sigma",
            "theta=0.1sigma",
            "reference=anchored",
            "deltas=int4",
            "values=int4",
            "exact=f32",
            "sink=0",
            "alpha=0.3333333333",
            "shape=block",
            "window=65536",
            "page=16",
        ];
        let mut accepted = 0;
        for preset in ["", "dense", "delta", "paper"] {
            for (index, first) in fields.iter().enumerate() {
                for second in fields[index..].iter().chain([&""]) {
                    let Ok(policy) =
                        format!("{preset} {first} {second}").parse::<AttentionPolicy>()
                    else {
                        continue;
                    };
                    let printed = policy.to_string();
                    let again: AttentionPolicy = printed.parse().expect(&printed);
                    assert_eq!(again, policy, "{preset} {first} {second}: {printed}");
                    accepted += 1;
                }
            }
        }
        assert!(accepted > 300, "{accepted}");
    }

    #[test]
    fn what_is_out_of_range_is_refused_with_the_range() {
        for (text, allowed) in [
            ("delta theta=-1", "from 0 to 10000"),
            ("delta theta=NaN", "from 0 to 10000"),
            ("delta theta=inf", "from 0 to 10000"),
            ("delta theta=much", "must be a number"),
            ("delta sink=1025", "from 0 to 1024"),
            ("delta alpha=1.5", "from 0 to 1"),
            ("delta window=0", "from 1 to 65536"),
            ("delta page=48", "16, 32, 64 or 128"),
            ("delta deltas=int2", "f16, int8 or int4"),
            ("sparse", "dense, delta or paper"),
            ("delta depth=3", "no such field"),
            ("delta theta=20000sigma", "20000sigma"),
            ("delta sink=1.5", "a whole number"),
            ("delta window=-1", "a whole number"),
            ("delta page=", "a whole number"),
            ("delta alpha=half", "must be a number"),
            ("keys=int8 theta=1", "needs keys=delta"),
            ("reference=mean", "needs keys=delta"),
            ("values=int8 deltas=int4", "needs keys=delta"),
            ("paper keys=channel2 theta=1", "needs keys=delta"),
            ("dense sink=4", "needs compressed keys"),
            ("keys=plain window=128", "needs compressed keys"),
            ("shape=block", "needs compressed keys"),
            ("dense keys=int8", "leave it out"),
            ("paper keys=plain", "contradicts"),
            ("keys=int8 keys=int8", "twice"),
            ("paper page=16 theta=1 page=16", "twice"),
            ("page=16 delta", "must stand first"),
            ("delta paper", "must stand first"),
            ("delta 3", "must be name=value"),
            ("", "dense, delta or paper"),
            (" ", "dense, delta or paper"),
        ] {
            let error = text.parse::<AttentionPolicy>().expect_err(text).to_string();
            assert!(error.contains(allowed), "{text}: {error}");
        }
    }
}
