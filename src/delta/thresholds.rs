//! A threshold of its own for each layer and KV head.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::page::PageLayout;
use super::policy::{AttentionPolicy, DeltaKeys, KeyFormat, MAX_THETA, Threshold};
use crate::error::{Error, Result, shortened};

/// Thresholds of every layer and KV head, `[layers][G]`, in place of the one in a policy's
/// [`DeltaKeys`], whose unit they are in: absolute, or standard deviations. Cheap to clone.
///
/// Printed with a space between heads and `;` between layers, which [`FromStr`] reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Thresholds(Arc<[Arc<[f32]>]>);

impl Thresholds {
    /// From `[layers][G]`.
    ///
    /// # Errors
    /// [`Error::Parameter`]: no layer or no head, layers of different numbers of heads, a threshold
    /// out of the range of [`AttentionPolicy::check`].
    pub fn new(layers: Vec<Vec<f32>>) -> Result<Self> {
        let heads = layers.first().map_or(0, Vec::len);
        let refuse = |value: String, allowed: &str| {
            Err(Error::Parameter { name: "thresholds", value, allowed: allowed.to_owned() })
        };
        if heads == 0 {
            let value = format!("{} layers, and none in layer 0", layers.len());
            return refuse(value, "needs a number for each layer and KV head");
        }
        for (layer, row) in layers.iter().enumerate() {
            if row.len() != heads {
                let value = format!("{} in layer {layer}, {heads} in layer 0", row.len());
                return refuse(value, "every layer must have as many");
            }
            for (head, theta) in row.iter().enumerate() {
                if !(0.0..=MAX_THETA).contains(theta) {
                    let value = format!("{theta} in layer {layer}, KV head {head}");
                    return refuse(value, &format!("must be from 0 to {MAX_THETA}"));
                }
            }
        }
        Ok(Self(layers.into_iter().map(Into::into).collect()))
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.0.len()
    }

    /// KV heads of a layer, `G`.
    pub fn kv_heads(&self) -> usize {
        self.0.first().map_or(0, |heads| heads.len())
    }

    /// Those of a layer, `[G]`; `None` where there is no such layer.
    pub fn layer(&self, layer: usize) -> Option<&Arc<[f32]>> {
        self.0.get(layer)
    }

    /// All of them, layer by layer.
    pub fn iter(&self) -> impl Iterator<Item = &[f32]> {
        self.0.iter().map(|heads| &heads[..])
    }

    /// Refuses them where they do not belong to such a model and policy.
    ///
    /// # Errors
    /// [`Error::Parameter`] with both shapes, or with the policy's format of keys.
    pub fn check(&self, policy: &AttentionPolicy, layers: usize, kv_heads: usize) -> Result<()> {
        let refuse = |value, allowed| Err(Error::Parameter { name: "thresholds", value, allowed });
        let shape = |layers: usize, heads: usize| format!("{layers} layers of {heads} KV heads");
        if !matches!(policy.keys, KeyFormat::Delta(_)) {
            let value = shape(self.layers(), self.kv_heads());
            return refuse(value, format!("need delta keys, but keys are {}", policy.keys.name()));
        }
        if (self.layers(), self.kv_heads()) != (layers, kv_heads) {
            let value = shape(self.layers(), self.kv_heads());
            return refuse(value, format!("the model has {}", shape(layers, kv_heads)));
        }
        Ok(())
    }
}

impl fmt::Display for Thresholds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (layer, heads) in self.iter().enumerate() {
            f.write_str(if layer == 0 { "" } else { ";" })?;
            for (head, theta) in heads.iter().enumerate() {
                write!(f, "{}{theta}", if head == 0 { "" } else { " " })?;
            }
        }
        Ok(())
    }
}

impl FromStr for Thresholds {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |word: &str| {
            word.parse().map_err(|_| Error::Parameter {
                name: "thresholds",
                value: shortened(word),
                allowed: "must be a number".to_owned(),
            })
        };
        let row = |row: &str| row.split_whitespace().map(number).collect();
        Self::new(text.split(';').map(row).collect::<Result<_>>()?)
    }
}

impl AttentionPolicy {
    /// The same with this threshold, in the unit of the one that it has: the policy of one KV head
    /// under [`Thresholds`]. Without one, or where keys are not deltas, it is as it was.
    pub fn with_theta(self, theta: Option<f32>) -> Self {
        Self { keys: self.keys.with_theta(theta), ..self }
    }
}

impl PageLayout {
    /// See [`AttentionPolicy::with_theta`].
    pub fn with_theta(self, theta: Option<f32>) -> Self {
        Self { keys: self.keys.with_theta(theta), ..self }
    }
}

impl KeyFormat {
    fn with_theta(self, theta: Option<f32>) -> Self {
        match (self, theta) {
            (Self::Delta(delta), Some(theta)) => {
                let threshold = match delta.threshold {
                    Threshold::Absolute(_) => Threshold::Absolute(theta),
                    Threshold::Relative(_) => Threshold::Relative(theta),
                };
                Self::Delta(DeltaKeys { threshold, ..delta })
            }
            (keys, _) => keys,
        }
    }
}

impl Threshold {
    /// The number without its unit.
    pub fn number(self) -> f32 {
        let (Self::Absolute(theta) | Self::Relative(theta)) = self;
        theta
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read() {
        let rows = vec![vec![0.0, 0.1, 1e-7], vec![0.333_333_34, 10000.0, 2.5]];
        let thresholds = Thresholds::new(rows).expect("in range");
        assert_eq!(thresholds.to_string(), "0 0.1 0.0000001;0.33333334 10000 2.5");
        assert_eq!(thresholds.to_string().parse::<Thresholds>().expect("read"), thresholds);
        for text in ["", ";", "1 2;3", "1 x", "-1", "NaN", "inf", "10001", "1;;1"] {
            text.parse::<Thresholds>().expect_err(text);
        }
    }

    #[test]
    fn they_are_of_one_shape_and_in_the_policys_unit() {
        let thresholds: Thresholds = "1 2;3 4;5 6".parse().expect("read");
        let delta = AttentionPolicy::delta();
        thresholds.check(&delta, 3, 2).expect("fits");
        let error = thresholds.check(&delta, 2, 3).expect_err("another shape").to_string();
        assert!(error.contains("3 layers of 2 KV heads"), "{error}");
        assert!(error.contains("2 layers of 3 KV heads"), "{error}");
        let error = thresholds.check(&AttentionPolicy::dense(), 3, 2).expect_err("dense");
        assert!(error.to_string().contains("plain"), "{error}");

        let text = |policy: AttentionPolicy| policy.with_theta(Some(0.25)).to_string();
        assert!(text(delta).contains("theta=0.25sigma"));
        assert!(text(AttentionPolicy::paper()).contains("theta=0.25 "));
        assert_eq!(AttentionPolicy::dense().with_theta(Some(1.0)), AttentionPolicy::dense());
        assert_eq!(delta.with_theta(None), delta);
    }
}
