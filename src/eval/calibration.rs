//! Thresholds for each layer and KV head that keep within a budget on a text.

use std::fmt;

use super::divergence::{Divergence, divergence, divergences};
use crate::delta::{
    AttentionPolicy, Calibration, Curve, KeyFormat, LayerTrace, Measured, PolicyFile, Threshold,
    Thresholds, allocate, reachable_zeros, uniform_theta,
};
use crate::error::{Error, Result};
use crate::formats::CacheFormat;
use crate::model::Model;
use crate::session::{Cancel, LogitsOptions};

/// Thresholds that are tried, in standard deviations of a head's keys.
const GRID: [f32; 33] = [
    0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8,
    0.85, 0.9, 0.95, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 4.0, 6.0,
];
/// Where in the grid lies the threshold that tells what a layer's error costs the model.
const PROBED: usize = 20;
/// Segments that it is told from, at most.
const SENSITIVITY_SEGMENTS: usize = 4;
/// What a layer's error costs at least, of what that of the median layer does.
const LEAST_COST: f64 = 0.25;
/// Queries of a segment at which attention is compared, at most.
const QUERIES: usize = 128;
/// Runs of the model that look for a budget of KL or perplexity.
const SEARCH: usize = 9;
/// Runs that make up for what keys of a compressed run differ by from those of a dense one.
const CORRECTIONS: usize = 5;

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

    fn refuse(self, allowed: String) -> Error {
        let value = match self {
            Self::Sparsity(share) => share.to_string(),
            Self::Kl(nats) => nats.to_string(),
            Self::Perplexity(share) => format!("{}%", 100.0 * share),
        };
        Error::Parameter { name: self.name(), value, allowed }
    }

    fn check(self) -> Result<()> {
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
    fn spent(self, found: &Divergence) -> f64 {
        match self {
            Self::Sparsity(_) => sparsity(found),
            Self::Kl(_) => found.mean_kl().unwrap_or(0.0),
            Self::Perplexity(_) => found.perplexity_increase().unwrap_or(0.0),
        }
    }

    fn keeps(self, found: &Divergence) -> bool {
        let spent = self.spent(found);
        match self {
            Self::Sparsity(least) => spent >= least,
            Self::Kl(most) | Self::Perplexity(most) => spent <= most,
        }
    }

    fn spelt(self, found: &Divergence) -> String {
        match self {
            Self::Sparsity(_) => format!("a sparsity of {:.4}", sparsity(found)),
            Self::Kl(_) => format!("a KL of {:.3e}", self.spent(found)),
            Self::Perplexity(_) => format!("{:+.4}% of perplexity", 100.0 * self.spent(found)),
        }
    }
}

fn sparsity(found: &Divergence) -> f64 {
    found.statistics.total().sparsity(&found.statistics.policy).unwrap_or(0.0)
}

/// Token ids of a text in segments, each run as a prompt of its own.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct CalibrationText {
    /// Thresholds are fitted to these.
    pub fitting: Vec<Vec<u32>>,
    /// What they do is told from these; where there are none, from those above.
    pub held_out: Vec<Vec<u32>>,
}

impl CalibrationText {
    /// Cuts a text into segments of `length` tokens, what is left over is not used; of more than
    /// `most` segments takes as many, evenly spread. Every second one is held out. Each begins
    /// with the tokens `beginning`, which count.
    ///
    /// # Errors
    /// [`Error::Parameter`] where the text has no segment.
    pub fn new(beginning: &[u32], ids: &[u32], length: usize, most: usize) -> Result<Self> {
        let body = length.saturating_sub(beginning.len());
        if body == 0 || most == 0 || ids.len() < body {
            return Err(Error::Parameter {
                name: "length",
                value: length.to_string(),
                allowed: format!(
                    "a segment needs tokens of its own, and the text has {} beside the {} of its \
                     beginning",
                    ids.len(),
                    beginning.len()
                ),
            });
        }
        let count = ids.len() / body;
        let taken = count.min(most);
        let mut text = Self::default();
        for i in 0..taken {
            let at = i * count / taken * body;
            let segment = [beginning, &ids[at..at + body]].concat();
            if i % 2 == 0 { text.fitting.push(segment) } else { text.held_out.push(segment) }
        }
        Ok(text)
    }
}

/// How far a calibration is: `done` of `total` of these things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CalibrationProgress {
    /// `layers` while thresholds are tried on the host, `runs` of a segment after that.
    pub things: &'static str,
    /// So many are done.
    pub done: usize,
    /// Of so many, at most.
    pub total: usize,
}

/// Thresholds and what they do.
#[derive(Clone, Debug)]
pub struct Calibrated {
    /// The policy, with the one threshold for all heads that has about as many zeros.
    pub policy: AttentionPolicy,
    /// The thresholds of each layer and KV head.
    pub thresholds: Thresholds,
    /// Runs with these over the fitting segments.
    pub fitting: Divergence,
    /// Runs over the held-out segments, or the fitting ones where there are none: with the policy's
    /// one threshold, and with the thresholds of each head.
    pub compared: [Divergence; 2],
}

/// Finds thresholds for each layer and KV head that keep `budget` on the fitting segments of `text`.
///
/// A dense run gives what the attention of each layer sees; on it the zeros and the error of each
/// head's output are measured for a grid of thresholds ([`LayerTrace::curve`]), and [`allocate`]
/// makes of these a family of choices, from few zeros to many. What an error of a layer costs the
/// model is measured: by how much the divergence from dense attention grows when this layer alone
/// has larger thresholds. In that family the model is run, until the budget is kept in real runs:
/// its divergence is taken to grow with the sparsity.
///
/// # Errors
/// A policy without delta keys or out of range; a budget that cannot be kept, which says what can; a
/// segment without a full page; [`Error::Cancelled`]; and as [`divergence`].
pub fn calibrate(
    model: &Model,
    text: &CalibrationText,
    policy: &AttentionPolicy,
    budget: Budget,
    cancel: &Cancel,
    mut progress: impl FnMut(CalibrationProgress),
) -> Result<Calibrated> {
    policy.check()?;
    budget.check()?;
    let KeyFormat::Delta(delta) = policy.keys else {
        let allowed = "only delta keys have thresholds".into();
        let value = policy.keys.name().into();
        return Err(Error::Parameter { name: "keys", value, allowed });
    };
    let (layers, heads) = (model.config().layers, model.config().attention.kv_heads);
    let total = text.fitting.len() * layers;
    let (mut curves, mut done, mut grids) = (Vec::<Curve>::new(), 0, Vec::new());
    for ids in &text.fitting {
        if ids.len() < policy.page {
            return Err(Error::Parameter {
                name: "length",
                value: ids.len().to_string(),
                allowed: format!("a segment must have a page of {} tokens", policy.page),
            });
        }
        let traces = model.probe(ids, cancel, |_| {})?;
        if grids.is_empty() {
            grids = traces.iter().flat_map(|trace| grid(trace, delta.threshold)).collect();
        }
        // From the first query on that may see a page; the last is among them.
        let count = QUERIES.min(ids.len());
        let queries: Vec<usize> = (1..=count).map(|i| i * ids.len() / count - 1).collect();
        for (layer, trace) in traces.iter().enumerate() {
            for head in 0..heads {
                if cancel.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                let at = layer * heads + head;
                let curve = trace.curve(policy, head, &grids[at], &queries)?;
                match curves.get_mut(at) {
                    Some(sum) => *sum += &curve,
                    None => curves.push(curve),
                }
            }
            done += 1;
            progress(CalibrationProgress { things: "layers", done, total });
        }
    }
    let mut search = Search { model, text, policy, cancel, curves, heads, weights: Vec::new() };
    search.weights = search.sensitivities(&mut progress)?;
    let chosen = search.run(budget, &mut progress)?;
    search.compare(chosen, &mut progress)
}

/// The thresholds to try on each KV head of a layer, in the unit of the policy's.
fn grid(trace: &LayerTrace, unit: Threshold) -> Vec<Vec<f32>> {
    let head = |kv_head| match unit {
        Threshold::Relative(_) => GRID.to_vec(),
        Threshold::Absolute(_) => {
            let deviation = trace.key_deviation(kv_head);
            GRID.iter().map(|theta| short(f64::from(*theta) * deviation)).collect()
        }
    };
    (0..trace.shape.kv_heads).map(head).collect()
}

/// Rounded to four digits, for people; within the range of thresholds.
fn short(x: f64) -> f32 {
    let digits = if x > 0.0 { 10f64.powf(3.0 - x.log10().floor()) } else { 1.0 };
    ((x * digits).round() / digits).min(1e4) as f32
}

/// One of the family of choices.
struct Choice {
    thresholds: Thresholds,
    /// Zeros that were foretold.
    zeros: u64,
    fitting: Divergence,
}

struct Search<'a> {
    model: &'a Model,
    text: &'a CalibrationText,
    policy: &'a AttentionPolicy,
    cancel: &'a Cancel,
    /// `[layers * G]`.
    curves: Vec<Curve>,
    /// KV heads, `G`.
    heads: usize,
    /// What a unit of each head's error costs, `[layers * G]`.
    weights: Vec<f64>,
}

impl Search<'_> {
    /// The most sparse choice that keeps the budget, or the least sparse one for a target of
    /// sparsity.
    fn run(
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
    fn sensitivities(&self, progress: &mut impl FnMut(CalibrationProgress)) -> Result<Vec<f64>> {
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
    fn compare(
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

impl Calibrated {
    /// What was measured: the thresholds on the fitting text, then on the held-out one the single
    /// threshold, and the thresholds of each head.
    pub fn measured(&self, text: &CalibrationText) -> Vec<Measured> {
        let held_out = if text.held_out.is_empty() { "fitting" } else { "held out" };
        let theta = match self.policy.keys {
            KeyFormat::Delta(delta) => delta.threshold.to_string(),
            _ => String::new(),
        };
        let row = |policy: &str, text: &str, found: &Divergence| {
            let total = found.statistics.total();
            let [dense, other] = found.perplexities().unwrap_or_default();
            Measured {
                policy: policy.to_owned(),
                text: text.to_owned(),
                tokens: found.tokens,
                sparsity: sparsity(found),
                bits_per_key_element: total.bits_per_element().unwrap_or(0.0),
                kl: found.mean_kl().unwrap_or(0.0),
                perplexity: other,
                dense_perplexity: dense,
            }
        };
        let [global, calibrated] = &self.compared;
        let mut rows = vec![
            row(&format!("theta {theta}"), held_out, global),
            row("calibrated", held_out, calibrated),
        ];
        if !text.held_out.is_empty() {
            rows.insert(0, row("calibrated", "fitting", &self.fitting));
        }
        rows
    }

    /// All of it as a file.
    pub fn to_file(&self, model: &Model, text: &CalibrationText, budget: Budget) -> PolicyFile {
        let config = model.config();
        let calibration = Calibration {
            architecture: config.architecture.name().to_owned(),
            layers: config.layers,
            attention: config.attention,
            budget: budget.to_string(),
            length: text.fitting.first().map_or(0, Vec::len),
            fitting_segments: text.fitting.len(),
            held_out_segments: text.held_out.len(),
            measured: self.measured(text),
        };
        PolicyFile {
            policy: self.policy,
            thresholds: Some(self.thresholds.clone()),
            calibration: Some(calibration),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_spread_and_every_second_is_held_out() {
        let ids: Vec<u32> = (0..103).collect();
        let text = CalibrationText::new(&[999], &ids, 11, 4).expect("segments");
        let starts = |segments: &[Vec<u32>]| segments.iter().map(|s| s[1]).collect::<Vec<_>>();
        assert_eq!(starts(&text.fitting), [0, 50]);
        assert_eq!(starts(&text.held_out), [20, 70]);
        let all = || text.fitting.iter().chain(&text.held_out);
        assert!(all().all(|segment| segment.len() == 11 && segment[0] == 999));
        let text = CalibrationText::new(&[], &ids, 103, 4).expect("segments");
        assert_eq!((text.fitting.len(), text.held_out.len()), (1, 0));
        for (beginning, length) in [(&[][..], 104), (&[], 0), (&[1, 2], 2), (&[1], 200)] {
            let error = CalibrationText::new(beginning, &ids, length, 4).expect_err("refused");
            assert!(error.to_string().contains("103"), "{error}");
        }
    }

    #[test]
    fn thresholds_are_short() {
        assert_eq!([0.0, 1.23456, 0.000_123_456, 99_999.0].map(short), [0.0, 1.235, 1.235e-4, 1e4]);
    }
}
