//! What thresholds may cost, or must save.

use std::fmt;

use super::super::divergence::Divergence;
use crate::error::{Error, Result};

/// What thresholds may cost, or must save.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// At least this sparsity, see [`PageStatistics::sparsity`](crate::delta::PageStatistics::sparsity).
    Sparsity(f64),
    /// The largest sparsity of which the mean divergence from dense attention is at most this many
    /// nats a token.
    Kl(f64),
    /// The largest sparsity at which perplexity grows by at most this share of itself.
    Perplexity(f64),
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sparsity(share) => write!(f, "sparsity {share}"),
            Self::Kl(nats) => write!(f, "KL {nats}"),
            Self::Perplexity(share) => write!(f, "perplexity +{}%", 100.0 * share),
        }
    }
}

impl Budget {
    fn name(self) -> &'static str {
        match self {
            Self::Sparsity(_) => "sparsity",
            Self::Kl(_) => "kl",
            Self::Perplexity(_) => "perplexity",
        }
    }

    pub(super) fn refuse(self, allowed: String) -> Error {
        let value = match self {
            Self::Sparsity(share) => share.to_string(),
            Self::Kl(nats) => nats.to_string(),
            Self::Perplexity(share) => format!("{}%", 100.0 * share),
        };
        Error::Parameter { name: self.name(), value, allowed }
    }

    pub(super) fn check(self) -> Result<()> {
        match self {
            Self::Sparsity(share) if !(0.0..=1.0).contains(&share) => {
                Err(self.refuse("must be from 0 to 1".into()))
            }
            Self::Kl(x) | Self::Perplexity(x) if !(x > 0.0 && x.is_finite()) => {
                Err(self.refuse("must be above 0".into()))
            }
            _ => Ok(()),
        }
    }

    /// What a run spends of it.
    pub(super) fn spent(self, found: &Divergence) -> f64 {
        match self {
            Self::Sparsity(_) => sparsity(found),
            Self::Kl(_) => found.mean_kl().unwrap_or(0.0),
            Self::Perplexity(_) => found.perplexity_increase().unwrap_or(0.0),
        }
    }

    pub(super) fn keeps(self, found: &Divergence) -> bool {
        let spent = self.spent(found);
        match self {
            Self::Sparsity(least) => spent >= least,
            Self::Kl(most) | Self::Perplexity(most) => spent <= most,
        }
    }

    pub(super) fn spelt(self, found: &Divergence) -> String {
        match self {
            Self::Sparsity(_) => format!("a sparsity of {:.4}", sparsity(found)),
            Self::Kl(_) => format!("a KL of {:.3e}", self.spent(found)),
            Self::Perplexity(_) => format!("{:+.4}% of perplexity", 100.0 * self.spent(found)),
        }
    }
}

pub(super) fn sparsity(found: &Divergence) -> f64 {
    found.statistics.total().sparsity(&found.statistics.policy).unwrap_or(0.0)
}
