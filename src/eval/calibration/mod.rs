//! Thresholds for each layer and KV head that keep within a budget on a text.

mod budget;
mod search;
mod text;

pub use budget::Budget;
use budget::sparsity;
use search::Search;
pub use text::CalibrationText;

use super::divergence::Divergence;
use crate::delta::{
    AttentionPolicy, Calibration, Curve, KeyFormat, LayerTrace, Measured, PolicyFile, Threshold,
    Thresholds,
};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::session::Cancel;

/// Thresholds that are tried, in standard deviations of a head's keys.
const GRID: [f32; 33] = [
    0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8,
    0.85, 0.9, 0.95, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 4.0, 6.0,
];
/// Queries of a segment at which attention is compared, at most.
const QUERIES: usize = 128;

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
/// head's output are measured for a grid of thresholds ([`LayerTrace::curve`]), and [`allocate`](crate::delta::allocate)
/// makes of these a family of choices, from few zeros to many. What an error of a layer costs the
/// model is measured: by how much the divergence from dense attention grows when this layer alone
/// has larger thresholds. In that family the model is run, until the budget is kept in real runs:
/// its divergence is taken to grow with the sparsity.
///
/// # Errors
/// A policy without delta keys or out of range; a budget that cannot be kept, which says what can; a
/// segment without a full page; [`Error::Cancelled`]; and as [`divergence`](crate::eval::divergence).
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
        // The last token of a segment is only foretold.
        if ids.len() <= policy.page {
            return Err(Error::Parameter {
                name: "length",
                value: ids.len().to_string(),
                allowed: format!("a segment must have more than a page of {} tokens", policy.page),
            });
        }
        let ids = &ids[..ids.len() - 1];
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
    fn thresholds_are_short() {
        assert_eq!([0.0, 1.23456, 0.000_123_456, 99_999.0].map(short), [0.0, 1.235, 1.235e-4, 1e4]);
    }
}
