//! The search for the choice of thresholds that keeps a budget.

use super::super::divergence::{Divergence, divergence, divergences};
use super::budget::{Budget, sparsity};
use super::text::CalibrationText;
use super::{Calibrated, CalibrationProgress, GRID, short};
use crate::delta::{AttentionPolicy, Curve, Thresholds, allocate, reachable_zeros, uniform_theta};
use crate::error::{Error, Result};
use crate::formats::CacheFormat;
use crate::model::Model;
use crate::session::{Cancel, LogitsOptions};

/// Where in the grid lies the threshold that tells what a layer's error costs the model.
const PROBED: usize = 20;
const _: () = assert!(GRID[PROBED] == 1.0);
/// Segments that it is told from, at most.
const SENSITIVITY_SEGMENTS: usize = 4;
/// What a layer's error costs at least, of what that of the median layer does.
const LEAST_COST: f64 = 0.25;
/// Runs of the model that look for a budget of KL or perplexity.
const SEARCH: usize = 9;
/// Runs that make up for what keys of a compressed run differ by from those of a dense one.
const CORRECTIONS: usize = 5;

/// One of the family of choices.
pub(super) struct Choice {
    thresholds: Thresholds,
    /// Zeros that were foretold.
    zeros: u64,
    fitting: Divergence,
}

/// A calibration between what was measured on dense runs and what it chooses.
pub(super) struct Search<'a> {
    pub model: &'a Model,
    pub text: &'a CalibrationText,
    pub policy: &'a AttentionPolicy,
    pub cancel: &'a Cancel,
    /// `[layers * G]`.
    pub curves: Vec<Curve>,
    /// KV heads, `G`.
    pub heads: usize,
    /// What a unit of each head's error costs, `[layers * G]`.
    pub weights: Vec<f64>,
}

impl Search<'_> {
    /// The most sparse choice that keeps the budget, or the least sparse one for a target of
    /// sparsity.
    pub(super) fn run(
        &self,
        budget: Budget,
        progress: &mut impl FnMut(CalibrationProgress),
    ) -> Result<Choice> {
        let elements: u64 = self.curves.iter().map(|curve| curve.elements).sum();
        let [least, most] = reachable_zeros(&self.curves);
        let runs = match budget {
            Budget::Sparsity(_) => CORRECTIONS,
            _ => 2 + SEARCH,
        };
        let total = 2 * runs * self.text.fitting.len();
        let mut done = 0;
        let mut run = |zeros: u64| {
            self.choice(zeros, || {
                done += 2;
                progress(CalibrationProgress { things: "runs", done, total });
            })
        };
        if let Budget::Sparsity(target) = budget {
            let share = target / (1.0 - f64::from(self.policy.prefill.share));
            let mut wanted = (share * elements as f64).ceil();
            for last in (0..CORRECTIONS).rev() {
                let zeros = (wanted.max(0.0) as u64).min(most);
                let choice = run(zeros)?;
                if budget.keeps(&choice.fitting) {
                    return Ok(choice);
                }
                if zeros == most || last == 0 {
                    let found = budget.spelt(&choice.fitting);
                    return Err(budget.refuse(format!(
                        "cannot be reached on this text: {found} can (alpha = {} is exact)",
                        self.policy.prefill.share
                    )));
                }
                // Keys of a compressed run are a little other than those that curves were made of.
                let missing = share * (1.0 - sparsity(&choice.fitting) / target) + 2e-4;
                wanted = wanted.max(choice.zeros as f64) + missing * elements as f64;
            }
        }
        let first = run(least)?;
        if !budget.keeps(&first.fitting) {
            return Err(budget.refuse(format!(
                "cannot be kept on this text: the smallest thresholds already take {}, at a \
                 sparsity of {:.4}",
                budget.spelt(&first.fitting),
                sparsity(&first.fitting)
            )));
        }
        let last = run(most)?;
        if budget.keeps(&last.fitting) {
            return Ok(last);
        }
        let (mut best, mut low, mut high) = (first, least, most);
        for _ in 0..SEARCH {
            let middle = low + (high - low) / 2;
            let choice = run(middle)?;
            if budget.keeps(&choice.fitting) {
                (low, best) = (middle, choice);
            } else {
                high = middle;
            }
        }
        Ok(best)
    }

    /// The choice with that many zeros, run over the fitting segments.
    fn choice(&self, zeros: u64, mut step: impl FnMut()) -> Result<Choice> {
        let chosen = allocate(&self.curves, &self.weights, zeros).unwrap_or_default();
        let points = || self.curves.iter().zip(&chosen).map(|(curve, &i)| curve.points[i]);
        let thetas: Vec<f32> = points().map(|point| point.theta).collect();
        let thresholds = Thresholds::new(thetas.chunks(self.heads).map(<[f32]>::to_vec).collect())?;
        let other = self.options(*self.policy, Some(thresholds.clone()));
        let mut sum: Option<Divergence> = None;
        for ids in &self.text.fitting {
            let found = divergence(self.model, ids, &self.dense(), &other, self.cancel)?;
            step();
            add(&mut sum, found);
        }
        let zeros = points().map(|point| point.zeros).sum();
        Ok(Choice { thresholds, zeros, fitting: sum.ok_or(Error::EmptyPrompt)? })
    }

    /// Nats that a unit of each head's error costs: the divergence of runs in which the thresholds of
    /// one layer are larger than in the others, over the error that they make there. Heads of a
    /// layer count alike: their outputs are added up.
    ///
    /// Few segments tell it roughly, and small errors do not foretell large ones: no layer counts
    /// less than a part of the median one, so that none is taken to cost next to nothing.
    pub(super) fn sensitivities(
        &self,
        progress: &mut impl FnMut(CalibrationProgress),
    ) -> Result<Vec<f64>> {
        let layers = self.curves.len() / self.heads;
        let segments = &self.text.fitting[..self.text.fitting.len().min(SENSITIVITY_SEGMENTS)];
        let total = 2 * (layers + 1) * segments.len();
        let mut done = 0;
        let theta = |at: usize, layer: usize| {
            let point = if at / self.heads == layer { PROBED } else { 0 };
            self.curves[at].points[point].theta
        };
        let mut run = |layer: usize| {
            let thetas: Vec<f32> = (0..self.curves.len()).map(|at| theta(at, layer)).collect();
            let rows = thetas.chunks(self.heads).map(<[f32]>::to_vec).collect();
            let other = self.options(*self.policy, Some(Thresholds::new(rows)?));
            let mut kl = 0.0;
            for ids in segments {
                kl += divergence(self.model, ids, &self.dense(), &other, self.cancel)?.kl;
                done += 2;
                progress(CalibrationProgress { things: "runs", done, total });
            }
            Ok(kl)
        };
        // Beyond the last layer: none of them.
        let least: f64 = run(layers)?;
        let mut costs = Vec::with_capacity(layers);
        for layer in 0..layers {
            let of_layer = &self.curves[layer * self.heads..][..self.heads];
            let error: f64 =
                of_layer.iter().map(|c| c.points[PROBED].error - c.points[0].error).sum();
            let cost = (run(layer)? - least) / error;
            costs.push(if error > 0.0 && cost.is_finite() { cost.max(0.0) } else { 0.0 });
        }
        let mut shown: Vec<f64> = costs.iter().copied().filter(|cost| *cost > 0.0).collect();
        shown.sort_by(f64::total_cmp);
        let floor = shown.get(shown.len() / 2).map_or(1.0, |median| LEAST_COST * median);
        let weights = costs.iter().map(|cost| cost.max(floor));
        Ok(weights.flat_map(|cost| vec![cost; self.heads]).collect())
    }

    /// Runs the choice beside one threshold for all.
    pub(super) fn compare(
        &self,
        choice: Choice,
        progress: &mut impl FnMut(CalibrationProgress),
    ) -> Result<Calibrated> {
        let theta = short(f64::from(uniform_theta(&self.curves, choice.zeros)));
        let policy = self.policy.with_theta(Some(theta));
        let others =
            [self.options(policy, None), self.options(policy, Some(choice.thresholds.clone()))];
        let text = match self.text.held_out.is_empty() {
            true => &self.text.fitting,
            false => &self.text.held_out,
        };
        let (mut global, mut calibrated) = (None, None);
        for (i, ids) in text.iter().enumerate() {
            let found = divergences(self.model, ids, &self.dense(), &others, self.cancel)?;
            for (sum, found) in [&mut global, &mut calibrated].into_iter().zip(found) {
                add(sum, found);
            }
            let (done, total) = (3 * (i + 1), 3 * text.len());
            progress(CalibrationProgress { things: "runs", done, total });
        }
        let Choice { thresholds, fitting, .. } = choice;
        let compared = [global.ok_or(Error::EmptyPrompt)?, calibrated.ok_or(Error::EmptyPrompt)?];
        Ok(Calibrated { policy, thresholds, fitting, compared })
    }

    fn dense(&self) -> LogitsOptions {
        self.options(AttentionPolicy::plain(CacheFormat::F32), None)
    }

    fn options(&self, attention: AttentionPolicy, thresholds: Option<Thresholds>) -> LogitsOptions {
        LogitsOptions { attention, thresholds, ..LogitsOptions::default() }
    }
}

fn add(sum: &mut Option<Divergence>, found: Divergence) {
    match sum {
        Some(sum) => *sum += &found,
        None => *sum = Some(found),
    }
}
