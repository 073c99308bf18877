//! Two runs of one text in lockstep: how far a policy moves what a model expects of each token.

use std::ops::AddAssign;

use super::lockstep::{Expectation, lockstep};
use crate::delta::CacheStatistics;
use crate::error::Result;
use crate::model::Model;
use crate::session::{Cancel, LogitsOptions};

/// How far one run of a text is from another, summed over the tokens that were foretold.
#[derive(Clone, Debug, PartialEq)]
pub struct Divergence {
    /// Tokens that were foretold: those after [`LogitsOptions::from`], without the first one.
    pub tokens: usize,
    /// The sum over them of the Kullback-Leibler divergence of the other run's distribution of the
    /// next token from the dense one's, `sum p ln(p / q)`, in nats.
    pub kl: f64,
    /// The sum over them of `-ln` of the probability of the token that came, in nats: of the dense
    /// run, and of the other.
    pub nats: [f64; 2],
    /// What the compressed keys of the other run were at its end.
    pub statistics: CacheStatistics,
}

impl Divergence {
    /// Nats a token: the mean of [`Divergence::kl`]; `None` where no token was foretold.
    pub fn mean_kl(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.kl / self.tokens as f64)
    }

    /// The perplexities of the dense run and of the other, `exp` of the mean of
    /// [`Divergence::nats`]; `None` where no token was foretold.
    pub fn perplexities(&self) -> Option<[f64; 2]> {
        (self.tokens > 0).then(|| self.nats.map(|nats| (nats / self.tokens as f64).exp()))
    }

    /// By which share of itself the dense run's perplexity grows: 0.01 is one per cent, and less than
    /// nothing where the other run's is better. `None` where no token was foretold.
    pub fn perplexity_increase(&self) -> Option<f64> {
        let [dense, other] = self.nats;
        (self.tokens > 0).then(|| ((other - dense) / self.tokens as f64).exp_m1())
    }
}

impl AddAssign<&Self> for Divergence {
    /// Adds another text's sums; the statistics are of both texts. The two are of the same model.
    fn add_assign(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.kl += other.kl;
        self.nats[0] += other.nats[0];
        self.nats[1] += other.nats[1];
        let (all, more) = (&mut self.statistics, &other.statistics);
        all.length += more.length;
        for (heads, more) in all.heads.iter_mut().zip(&more.heads) {
            for (head, more) in heads.iter_mut().zip(more) {
                *head += *more;
            }
        }
        all.key_bytes += more.key_bytes;
        all.value_bytes += more.value_bytes;
        all.dense_bytes += more.dense_bytes;
    }
}

/// Runs `ids` twice in lockstep, as `dense` says and as `other` says, and compares what each of the
/// two expects of every next token.
///
/// Probabilities are computed in `f64` from the `f32` logits. Nothing requires `dense` to be dense:
/// it is the yardstick.
///
/// # Errors
/// [`Error::Parameter`](crate::Error::Parameter) where the two differ in [`LogitsOptions::prompt`] or
/// [`LogitsOptions::from`], so that their rows would not be of the same tokens; and as
/// [`LogitsRun`](crate::LogitsRun), [`Error::Cancelled`](crate::Error::Cancelled) among them.
pub fn divergence(
    model: &Model,
    ids: &[u32],
    dense: &LogitsOptions,
    other: &LogitsOptions,
    cancel: &Cancel,
) -> Result<Divergence> {
    let mut found = divergences(model, ids, dense, std::slice::from_ref(other), cancel)?;
    // One for each of the others.
    Ok(found.remove(0))
}

/// [`divergence`] of several other runs from one dense one, in the order given. Every run holds its
/// own cache meanwhile.
///
/// # Errors
/// As [`divergence`].
pub fn divergences(
    model: &Model,
    ids: &[u32],
    dense: &LogitsOptions,
    others: &[LogitsOptions],
    cancel: &Cancel,
) -> Result<Vec<Divergence>> {
    let runs: Vec<LogitsOptions> = [dense].into_iter().chain(others).cloned().collect();
    let mut found = lockstep(model, ids, &runs, cancel)?;
    let first = found.remove(0);
    let compared = |other: Expectation| Divergence {
        tokens: other.tokens,
        kl: other.kl,
        nats: [first.nats, other.nats],
        statistics: other.statistics,
    };
    Ok(found.into_iter().map(compared).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::synthetic::Synthetic;
    use crate::delta::AttentionPolicy;
    use crate::formats::CacheFormat;
    use crate::{DeviceChoice, LogitsRun, ModelOptions};

    #[test]
    fn a_policy_is_as_far_as_its_logits_say() {
        let dir = tempfile::tempdir().expect("a directory");
        Synthetic::named("tiny").expect("a model").write(dir.path()).expect("written");
        let options = ModelOptions { device: DeviceChoice::Cpu, ..ModelOptions::default() };
        let model = Model::open(dir.path(), &options).expect("opens");
        let ids: Vec<u32> = (0..100).map(|i| (i * 37 + 11) % 256).collect();
        let of = |attention| LogitsOptions { attention, from: 20, ..LogitsOptions::default() };
        let dense = of(AttentionPolicy::plain(CacheFormat::F32));
        let delta = of("delta theta=1.5sigma page=16".parse().expect("a policy"));
        let cancel = Cancel::default();
        let others = [dense.clone(), delta.clone()];
        let found = divergences(&model, &ids, &dense, &others, &cancel).expect("compared");
        assert_eq!((found[0].kl, found[0].tokens), (0.0, 79));
        assert_eq!(found[0].nats[0], found[0].nats[1]);
        assert_eq!(found[0].perplexity_increase(), Some(0.0));

        let logits = |options: &LogitsOptions| {
            let mut all = Vec::new();
            let mut run = LogitsRun::new(&model, &ids[..], options, &cancel).expect("runs");
            while let Some(rows) = run.next_rows().expect("rows") {
                all.extend(rows);
            }
            all
        };
        let (p, q) = (logits(&dense), logits(&delta));
        let vocabulary = model.config().vocabulary;
        let (mut kl, mut nats) = (0.0, 0.0);
        for (i, &next) in ids[21..].iter().enumerate() {
            let softmax = |all: &[f32]| {
                let row = &all[i * vocabulary..][..vocabulary];
                let exps: Vec<f64> = row.iter().map(|&x| f64::from(x).exp()).collect();
                let sum: f64 = exps.iter().sum();
                exps.iter().map(|e| e / sum).collect::<Vec<f64>>()
            };
            let (p, q) = (softmax(&p), softmax(&q));
            kl += p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
            nats -= q[next as usize].ln();
        }
        assert!(kl > 0.0 && (found[1].kl - kl).abs() < 1e-6 * kl.max(1e-3), "{found:?} {kl}");
        assert!((found[1].nats[1] - nats).abs() < 1e-9 * nats, "{found:?} {nats}");
        assert_eq!(found[1].nats[0], found[0].nats[0]);
        assert_eq!(found[1].statistics.length, 99);

        let mut both = found[1].clone();
        both += &found[1];
        assert_eq!(both.tokens, 158);
        assert_eq!(both.mean_kl(), found[1].mean_kl());
        assert_eq!(both.statistics.total().zeros, 2 * found[1].statistics.total().zeros);

        // Of the last token only the probability is taken, which must not go unchecked.
        let beyond = [1, 2, model.config().vocabulary as u32];
        let error = divergence(&model, &beyond, &dense, &dense, &cancel).expect_err("refused");
        assert!(matches!(error, crate::Error::TokenOutOfRange { .. }), "{error}");

        let elsewhere = LogitsOptions { from: 0, ..delta };
        let error = divergence(&model, &ids, &dense, &elsewhere, &cancel).expect_err("refused");
        assert!(error.to_string().contains("from 20"), "{error}");
        cancel.cancel();
        let error = divergence(&model, &ids, &dense, &dense, &cancel).expect_err("cancelled");
        assert!(matches!(error, crate::Error::Cancelled));
    }
}
