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
    /// Divergence from the first candidate, nats a token; `None` where none was taken.
    pub kl: Option<Estimate>,
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
        let kl = divergence(outcomes);
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

/// Nats a token; samples are rows, or the windows of a single text.
fn divergence(outcomes: &[&Outcome]) -> Option<Estimate> {
    let whole = |parts: &[(f64, usize)]| {
        parts.iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1 as f64))
    };
    match outcomes {
        [outcome] => Estimate::ratio(outcome.kl.iter().map(|part| (part.0, part.1 as f64))),
        _ => Estimate::ratio(outcomes.iter().map(|outcome| whole(&outcome.kl))),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(score: Score, kl: &[(f64, usize)]) -> Outcome {
        let keys = KeyCounts { elements: 100, zeros: Some(60), bits: 350 };
        Outcome { score, kl: kl.to_vec(), keys, seconds: 0.5 }
    }

    fn summary(kind: TaskKind, outcomes: &[Outcome], first: &[Outcome]) -> Summary {
        let (outcomes, first) =
            (outcomes.iter().collect::<Vec<_>>(), first.iter().collect::<Vec<_>>());
        Summary::new(kind, &outcomes, &first).expect("outcomes")
    }

    fn value(summary: &Summary, name: &str) -> f64 {
        let found = summary.metrics.iter().find(|metric| metric.name == name);
        found.expect(name).estimate.value
    }

    fn near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
    }

    #[test]
    fn perplexity_weighs_tokens_and_bits_count_bytes() {
        let text =
            |windows: &[(f64, usize)], bytes| Score::Text { windows: windows.to_vec(), bytes };
        let first = [
            outcome(text(&[(6.0, 3), (4.0, 2)], 20), &[(0.0, 3), (0.0, 2)]),
            outcome(text(&[(10.0, 5)], 30), &[(0.0, 5)]),
        ];
        let other = [
            outcome(text(&[(6.5, 3), (4.5, 2)], 20), &[(0.3, 3), (0.1, 2)]),
            outcome(text(&[(10.0, 5)], 30), &[(0.2, 5)]),
        ];
        let found = summary(TaskKind::Text, &other, &first);
        near(value(&found, "perplexity"), (21.0f64 / 10.0).exp());
        near(value(&found, "bits_per_byte"), 21.0 / 50.0 / std::f64::consts::LN_2);
        near(found.change.value, (1.0f64 / 10.0).exp_m1());
        near(found.kl.expect("taken").value, 0.06);
        // Two rows: residuals 0.5 and -0.5 around the ratio 0.1 times 5 tokens.
        let error = (0.5f64 / 2.0).sqrt() / 5.0 * (0.1f64).exp();
        near(found.change.error.expect("two rows"), error);
        near(found.zeros().expect("deltas"), 0.6);
        near(found.seconds, 1.0);
        let policy: AttentionPolicy = "delta alpha=0.25".parse().expect("policy");
        near(found.sparsity(&policy).expect("deltas"), 0.45);
        near(found.bits(&policy).expect("pages"), 3.5);
        // A single text has the windows as samples.
        let found = summary(TaskKind::Text, &other[..1], &first[..1]);
        assert_eq!(found.metrics[0].estimate.count, 2);
        assert!(found.kl.expect("taken").error.is_some());
    }

    #[test]
    fn accuracy_with_and_without_lengths_and_row_by_row() {
        let choice = |log_likelihoods: [f64; 2], lengths: [usize; 2], label| {
            let (log_likelihoods, lengths) = (log_likelihoods.to_vec(), lengths.to_vec());
            outcome(Score::Choice { log_likelihoods, lengths, label }, &[(0.5, 2)])
        };
        // The first row is right only by length, the second only without, the third in both.
        let rows = [
            choice([-4.0, -5.0], [2, 5], 1),
            choice([-4.0, -5.0], [2, 5], 0),
            choice([-1.0, -9.0], [3, 3], 0),
        ];
        let wrong = [rows[0].clone(), rows[1].clone(), choice([-9.0, -1.0], [3, 3], 0)];
        let found = summary(TaskKind::Choice, &rows, &wrong);
        assert_eq!(found.main().name, "acc_norm");
        near(value(&found, "acc_norm"), 2.0 / 3.0);
        near(value(&found, "acc"), 2.0 / 3.0);
        let found = summary(TaskKind::Choice, &rows[..1], &rows[..1]);
        assert_eq!((value(&found, "acc_norm"), value(&found, "acc")), (1.0, 0.0));
        assert_eq!(found.change.error, None);
        let found = summary(TaskKind::Choice, &rows, &wrong);
        near(found.change.value, 1.0 / 3.0);
        near(found.change.error.expect("three rows"), 1.0 / 3.0);
    }

    #[test]
    fn questions_and_passkeys_are_told_apart() {
        let question = |exact, f1, answerable| {
            outcome(Score::Question { answer: "x".into(), exact, f1, answerable }, &[])
        };
        let rows = [question(0.0, 0.5, true), question(1.0, 1.0, true), question(0.0, 0.0, false)];
        let found = summary(TaskKind::Question, &rows, &rows);
        let names = ["f1", "exact", "answerable_f1", "answerable_exact", "unanswerable_f1"];
        for (name, expected) in names.into_iter().zip([0.5, 1.0 / 3.0, 0.75, 0.5, 0.0]) {
            near(value(&found, name), expected);
        }
        assert_eq!(found.kl, None);
        let passkey = |right, depth, length| {
            let (depth, length) = (Some(depth), Some(length));
            outcome(Score::Passkey { answer: "1".into(), right, depth, length }, &[])
        };
        let rows = [passkey(true, 0.5, 200), passkey(false, 0.5, 200), passkey(true, 0.0, 400)];
        let found = summary(TaskKind::Passkey, &rows, &rows);
        near(value(&found, "found"), 2.0 / 3.0);
        near(value(&found, "found at 0.5 of 200"), 0.5);
        near(value(&found, "found at 0 of 400"), 1.0);
    }
}
