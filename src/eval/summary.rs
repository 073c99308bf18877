//! Outcomes of a task as figures.

use super::estimate::Estimate;
use super::rows::TaskKind;
use super::score::{KeyCounts, Outcome, Score};
use crate::delta::AttentionPolicy;

/// A figure under its name.
#[derive(Clone, Debug, PartialEq)]
pub struct Metric {
    /// As in tables and files.
    pub name: String,
    /// The figure.
    pub estimate: Estimate,
}

/// What one candidate reached at one task.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The metrics, the main one first.
    pub metrics: Vec<Metric>,
    /// Divergence from the first candidate, nats a token.
    pub kl: Estimate,
    /// Counts over the compressed keys.
    pub keys: KeyCounts,
    /// Time that it took.
    pub seconds: f64,
}

impl Summary {
    /// The figures of a candidate's outcomes; `None` without any.
    ///
    /// - text: `perplexity` of a token, `bits_per_byte`; samples are texts, or the windows of a
    ///   single text.
    /// - choice: `acc_norm` takes the choice with the greatest log-likelihood a character, `acc` that
    ///   with the greatest.
    /// - question: `f1` and `exact` over all questions, and over those with and without an answer.
    /// - passkey: `found`, over all and for each length and depth.
    pub fn new(kind: TaskKind, outcomes: &[&Outcome]) -> Option<Self> {
        let metrics = match kind {
            TaskKind::Text => text(outcomes),
            TaskKind::Choice => choice(outcomes),
            TaskKind::Question => question(outcomes),
            TaskKind::Passkey => passkey(outcomes),
        };
        let metrics: Vec<Metric> = metrics
            .into_iter()
            .filter_map(|(name, estimate)| Some(Metric { name, estimate: estimate? }))
            .collect();
        let mut keys = KeyCounts::default();
        outcomes.iter().for_each(|outcome| keys += outcome.keys);
        let kl = Estimate::ratio(outcomes.iter().map(|o| (o.kl, o.kl_tokens as f64)))?;
        let seconds = outcomes.iter().map(|outcome| outcome.seconds).sum();
        (!metrics.is_empty()).then_some(Self { metrics, kl, keys, seconds })
    }

    /// The main metric.
    pub fn main(&self) -> &Metric {
        &self.metrics[0]
    }

    /// Share of differences that are zero; `None` where keys are not differences, or no page was
    /// full.
    pub fn zeros(&self) -> Option<f64> {
        let KeyCounts { elements, zeros, .. } = self.keys;
        zeros.filter(|_| elements > 0).map(|zeros| zeros as f64 / elements as f64)
    }

    /// The paper's sparsity: `zeros * (1 - alpha)`.
    pub fn sparsity(&self, policy: &AttentionPolicy) -> Option<f64> {
        self.zeros().map(|zeros| zeros * (1.0 - f64::from(policy.prefill.share)))
    }

    /// Bits that an element of a compressed key takes; of a plain key those of its format. `None`
    /// where no page was full.
    pub fn bits(&self, policy: &AttentionPolicy) -> Option<f64> {
        if policy.is_dense() {
            return Some(8.0 * policy.exact.bytes() as f64);
        }
        let KeyCounts { elements, bits, .. } = self.keys;
        (elements > 0).then(|| bits as f64 / elements as f64)
    }
}

type Named = (String, Option<Estimate>);

fn text(outcomes: &[&Outcome]) -> Vec<Named> {
    let texts: Vec<(&[(f64, usize)], usize)> = outcomes
        .iter()
        .filter_map(|outcome| match &outcome.score {
            Score::Text { windows, bytes } => Some((windows.as_slice(), *bytes)),
            _ => None,
        })
        .collect();
    let nats = |windows: &[(f64, usize)]| windows.iter().map(|w| w.0).sum::<f64>();
    let tokens = |windows: &[(f64, usize)]| windows.iter().map(|w| w.1).sum::<usize>() as f64;
    let perplexity = match texts.as_slice() {
        // Windows of one text are not independent either, but say more than nothing.
        [(windows, _)] => Estimate::ratio(windows.iter().map(|w| (w.0, w.1 as f64))),
        _ => Estimate::ratio(texts.iter().map(|(windows, _)| (nats(windows), tokens(windows)))),
    };
    let bytes =
        Estimate::ratio(texts.iter().map(|(windows, bytes)| (nats(windows), *bytes as f64)));
    vec![
        ("perplexity".into(), perplexity.map(Estimate::exp)),
        ("bits_per_byte".into(), bytes.map(|e| e.times(1.0 / std::f64::consts::LN_2))),
    ]
}

fn choice(outcomes: &[&Outcome]) -> Vec<Named> {
    let right = |normalised: bool| {
        outcomes.iter().filter_map(move |outcome| match &outcome.score {
            Score::Choice { log_likelihoods, lengths, label } => {
                let scores = log_likelihoods.iter().zip(lengths).map(|(score, length)| {
                    if normalised { score / (*length).max(1) as f64 } else { *score }
                });
                let best = scores.enumerate().fold((0, f64::NEG_INFINITY), |best, (i, score)| {
                    if score > best.1 { (i, score) } else { best }
                });
                Some(share(best.0 == *label))
            }
            _ => None,
        })
    };
    vec![
        ("acc_norm".into(), Estimate::mean(right(true))),
        ("acc".into(), Estimate::mean(right(false))),
    ]
}

fn question(outcomes: &[&Outcome]) -> Vec<Named> {
    let mut metrics = Vec::new();
    for (prefix, wanted) in
        [("", None), ("answerable_", Some(true)), ("unanswerable_", Some(false))]
    {
        let scores: Vec<(f64, f64)> = outcomes
            .iter()
            .filter_map(|outcome| match outcome.score {
                Score::Question { exact, f1, answerable, .. } => {
                    (wanted.is_none_or(|wanted| wanted == answerable)).then_some((f1, exact))
                }
                _ => None,
            })
            .collect();
        metrics.push((format!("{prefix}f1"), Estimate::mean(scores.iter().map(|s| s.0))));
        metrics.push((format!("{prefix}exact"), Estimate::mean(scores.iter().map(|s| s.1))));
    }
    metrics
}

fn passkey(outcomes: &[&Outcome]) -> Vec<Named> {
    let found: Vec<(bool, Option<f64>, Option<usize>)> = outcomes
        .iter()
        .filter_map(|outcome| match outcome.score {
            Score::Passkey { right, depth, length, .. } => Some((right, depth, length)),
            _ => None,
        })
        .collect();
    let mut metrics = vec![("found".to_owned(), Estimate::mean(found.iter().map(|f| share(f.0))))];
    let mut places: Vec<(usize, f64)> =
        found.iter().filter_map(|(_, depth, length)| Some(((*length)?, (*depth)?))).collect();
    places.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    places.dedup();
    for (length, depth) in places {
        let here = found.iter().filter(|f| (f.1, f.2) == (Some(depth), Some(length)));
        metrics.push((
            format!("found at {depth} of {length}"),
            Estimate::mean(here.map(|f| share(f.0))),
        ));
    }
    metrics
}

fn share(right: bool) -> f64 {
    f64::from(u8::from(right))
}
