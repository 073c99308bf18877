//! Policies as text: `name=value` pairs, printed and read.

use std::fmt;
use std::str::FromStr;

use super::policy::{
    AttentionPolicy, DeltaFormat, DeltaKeys, KeyFormat, PrefillWindow, Reference, Threshold,
    ValueFormat, WindowShape,
};
use crate::error::{Error, Result, shortened};
use crate::formats::CacheFormat;

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
    let value = shortened(value.into().unwrap_or_default());
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
            value: shortened(text),
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
    use crate::delta::ChannelBits;

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
