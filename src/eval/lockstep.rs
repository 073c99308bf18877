//! Several runs of one text side by side, so that their distributions can be compared without
//! keeping all logits of any.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::delta::CacheStatistics;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::session::{Cancel, LogitsOptions, LogitsRun};

/// What one of the runs made of the text: sums over the tokens that were foretold.
#[derive(Clone, Debug)]
pub(super) struct Expectation {
    /// Tokens that were foretold: those after `from`, without the first one.
    pub tokens: usize,
    /// `-ln` of the probability of the token that came, in nats.
    pub nats: f64,
    /// Kullback-Leibler divergence of this run's distributions from the first run's, in nats.
    pub kl: f64,
    /// Its compressed keys at its end.
    pub statistics: CacheStatistics,
    /// Time that the device took for it.
    pub time: Duration,
}

/// Runs all but the last of `ids`, whose successor is unknown, as each of `runs` says.
///
/// # Errors
/// [`Error::Parameter`] where runs differ in [`LogitsOptions::prompt`] or [`LogitsOptions::from`],
/// so that their rows would not be of the same tokens; fewer than two tokens; and as
/// [`LogitsRun`].
pub(super) fn lockstep(
    model: &Model,
    ids: &[u32],
    runs: &[LogitsOptions],
    cancel: &Cancel,
) -> Result<Vec<Expectation>> {
    let Some(first) = runs.first() else { return Ok(Vec::new()) };
    for other in runs {
        let place = |options: &LogitsOptions| {
            let prompt = options.prompt.map_or("all".to_owned(), |tokens| tokens.to_string());
            format!("prompt {prompt}, from {}", options.from)
        };
        if place(other) != place(first) {
            return Err(Error::Parameter {
                name: "logits options",
                value: place(other),
                allowed: format!("must be those of the run compared with: {}", place(first)),
            });
        }
    }
    let vocabulary = model.config().vocabulary;
    // The last token is never run, and a tokenizer may know more tokens than its model.
    if let Some(&token) = ids.iter().find(|&&token| token as usize >= vocabulary) {
        return Err(Error::TokenOutOfRange { token, vocabulary });
    }
    let input: Arc<[u32]> = ids[..ids.len().saturating_sub(1)].into();
    let mut at = first.from + 1;
    let start = |options| LogitsRun::new(model, Arc::clone(&input), options, cancel);
    let mut runs = runs.iter().map(start).collect::<Result<Vec<_>>>()?;
    let mut sums = vec![(0.0, 0.0, Duration::ZERO); runs.len()];
    let mut tokens = 0;
    loop {
        let mut portions = Vec::with_capacity(runs.len());
        for (run, sums) in runs.iter_mut().zip(&mut sums) {
            let start = Instant::now();
            portions.extend(run.next_rows()?);
            sums.2 += start.elapsed();
        }
        let Some(yardstick) = portions.first() else { break };
        let targets = &ids[at..at + yardstick.len() / vocabulary];
        // Rows at once, summed in order: the same sums every time.
        let found: Vec<Vec<(f64, f64)>> = targets
            .par_iter()
            .enumerate()
            .map(|(row, &target)| {
                let of = |rows: &Vec<f32>| {
                    log_probabilities(&rows[row * vocabulary..(row + 1) * vocabulary])
                };
                let yardstick = of(yardstick);
                let compared = |rows: &Vec<f32>| {
                    let found = of(rows);
                    (-found[target as usize], divergence(&yardstick, &found))
                };
                portions.iter().map(compared).collect()
            })
            .collect();
        for row in found {
            for (sums, (nats, kl)) in sums.iter_mut().zip(row) {
                sums.0 += nats;
                sums.1 += kl;
            }
        }
        (at, tokens) = (at + targets.len(), tokens + targets.len());
    }
    let finish = |(run, (nats, kl, time)): (&mut LogitsRun, (f64, f64, Duration))| {
        Ok(Expectation { tokens, nats, kl, statistics: run.statistics()?, time })
    };
    runs.iter_mut().zip(sums).map(finish).collect()
}

/// `ln softmax` of a row of logits, in `f64`.
pub(super) fn log_probabilities(logits: &[f32]) -> Vec<f64> {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - largest).exp()).sum();
    let normaliser = largest + sum.ln();
    logits.iter().map(|&x| f64::from(x) - normaliser).collect()
}

/// `sum p ln(p / q)`, of log-probabilities. Rounding must not make it negative: it never is.
pub(super) fn divergence(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_a_softmax() {
        let even = log_probabilities(&[0.0, 0.0, 0.0]);
        let sharp = log_probabilities(&[1000.0, 999.0, -1000.0]);
        assert!((even[1] + 3f64.ln()).abs() < 1e-15);
        let (p, q) = (1.0 / (1.0 + (-1f64).exp()), 1.0 / (1.0 + 1f64.exp()));
        assert!((sharp[0] - p.ln()).abs() < 1e-12 && (sharp[1] - q.ln()).abs() < 1e-12);
        let expected = p * (p * 3.0).ln() + q * (q * 3.0).ln();
        assert!((divergence(&sharp, &even) - expected).abs() < 1e-12);
        assert_eq!(divergence(&even, &even), 0.0);
    }
}
