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
    /// The main metric less the first candidate's, row by row, which is known much better than
    /// either; of perplexity the relative change.
    pub change: Estimate,
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
    ///
    /// `first` are the first candidate's outcomes of the same rows.
    pub fn new(kind: TaskKind, outcomes: &[&Outcome], first: &[&Outcome]) -> Option<Self> {
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
        let change = change(kind, outcomes, first)?;
        (!metrics.is_empty()).then_some(Self { metrics, change, kl, keys, seconds })
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

/// Nats and tokens of a text's windows.
fn windows(outcome: &Outcome) -> &[(f64, usize)] {
    match &outcome.score {
        Score::Text { windows, .. } => windows,
        _ => &[],
    }
}

/// The main metric of each row, less the first candidate's.
fn change(kind: TaskKind, outcomes: &[&Outcome], first: &[&Outcome]) -> Option<Estimate> {
    let pairs = outcomes.iter().zip(first);
    if kind != TaskKind::Text {
        let score = |outcome: &Outcome| match &outcome.score {
            Score::Choice { log_likelihoods, lengths, label } => {
                share(likeliest(log_likelihoods, lengths) == *label)
            }
            Score::Question { f1, .. } => *f1,
            Score::Passkey { right, .. } => share(*right),
            Score::Text { .. } => 0.0,
        };
        return Estimate::mean(pairs.map(|(one, first)| score(one) - score(first)));
    }
    let differences = |(one, first): (&&Outcome, &&Outcome)| -> Vec<(f64, f64)> {
        let pairs = windows(one).iter().zip(windows(first));
        pairs.map(|(one, first)| (one.0 - first.0, one.1 as f64)).collect()
    };
    let texts: Vec<Vec<(f64, f64)>> = pairs.map(differences).collect();
    let whole = |text: &Vec<(f64, f64)>| {
        text.iter().fold((0.0, 0.0), |sum, window| (sum.0 + window.0, sum.1 + window.1))
    };
    let nats = match texts.as_slice() {
        [windows] => Estimate::ratio(windows.iter().copied()),
        _ => Estimate::ratio(texts.iter().map(whole)),
    }?;
    Some(Estimate { value: nats.value.exp_m1(), ..nats.exp() })
}

fn text(outcomes: &[&Outcome]) -> Vec<Named> {
    let nats = |outcome: &Outcome| windows(outcome).iter().map(|w| w.0).sum::<f64>();
    let tokens = |outcome: &Outcome| windows(outcome).iter().map(|w| w.1 as f64).sum::<f64>();
    let perplexity = match outcomes {
        // Windows of one text are not independent either, but say more than nothing.
        [outcome] => Estimate::ratio(windows(outcome).iter().map(|w| (w.0, w.1 as f64))),
        _ => Estimate::ratio(outcomes.iter().map(|outcome| (nats(outcome), tokens(outcome)))),
    };
    let bytes = Estimate::ratio(outcomes.iter().map(|outcome| match &outcome.score {
        Score::Text { bytes, .. } => (nats(outcome), *bytes as f64),
        _ => (0.0, 0.0),
    }));
    vec![
        ("perplexity".into(), perplexity.map(Estimate::exp)),
        ("bits_per_byte".into(), bytes.map(|e| e.times(1.0 / std::f64::consts::LN_2))),
    ]
}

/// The choice with the greatest log-likelihood a character; the first of equal ones.
fn likeliest(log_likelihoods: &[f64], lengths: &[usize]) -> usize {
    let scores = log_likelihoods.iter().zip(lengths);
    let scores = scores.map(|(score, length)| score / (*length).max(1) as f64);
    let best = scores.enumerate().fold((0, f64::NEG_INFINITY), |best, (index, score)| {
        if score > best.1 { (index, score) } else { best }
    });
    best.0
}

fn choice(outcomes: &[&Outcome]) -> Vec<Named> {
    let right = |normalised: bool| {
        outcomes.iter().filter_map(move |outcome| match &outcome.score {
            Score::Choice { log_likelihoods, lengths, label } => {
                let ones = vec![1; lengths.len()];
                let lengths = if normalised { lengths } else { &ones };
                Some(share(likeliest(log_likelihoods, lengths) == *label))
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
