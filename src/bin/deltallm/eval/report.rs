//! What came out, as tables, JSON, CSV and pictures.

use std::path::Path;

use deltallm::eval::{Candidate, Estimate, Outcome, Stage, Summary, TaskKind};
use deltallm::{Error, Model, write_whole};
use serde_json::{Value, json};

use super::Work;
use crate::cache_report::percent;
use crate::scatter::{Point, Scatter};
use crate::table::{aligned, quoted};

/// Figures of every task, stage and policy.
pub struct Report<'a> {
    model: Value,
    candidates: &'a [Candidate],
    results: Vec<TaskResult>,
}

struct TaskResult {
    name: String,
    kind: TaskKind,
    stage: Stage,
    rows: usize,
    left_out: usize,
    /// One a candidate.
    summaries: Vec<Summary>,
}

impl<'a> Report<'a> {
    pub fn new(name: &str, model: &Model, candidates: &'a [Candidate]) -> Self {
        let device = model.device();
        let model = json!({
            "name": name,
            "device": device.name,
            "backend": device.backend,
            "driver": device.driver,
        });
        Self { model, candidates, results: Vec::new() }
    }

    /// Adds a task's outcomes, `[rows][candidates]`.
    pub fn add(&mut self, work: &Work, stage: Stage, outcomes: &[Vec<Outcome>]) {
        let of = |candidate: usize| -> Vec<&Outcome> {
            outcomes.iter().filter_map(|row| row.get(candidate)).collect()
        };
        let first = of(0);
        let summaries = (0..self.candidates.len())
            .filter_map(|candidate| Summary::new(work.task.kind, &of(candidate), &first))
            .collect();
        self.results.push(TaskResult {
            name: work.task.name.clone(),
            kind: work.task.kind,
            stage,
            rows: outcomes.len(),
            left_out: work.rows.len() - outcomes.len(),
            summaries,
        });
    }

    /// The tables, for people.
    pub fn tables(&self) -> String {
        self.results
            .iter()
            .map(|result| result.table(self.candidates))
            .collect::<Vec<_>>()
            .join("\n")
    }

    pub fn json(&self) -> Value {
        let task = |result: &TaskResult| {
            let policies = self.candidates.iter().zip(&result.summaries);
            let policies = policies.map(|(candidate, summary)| {
                let metrics: serde_json::Map<String, Value> =
                    summary.metrics.iter().map(|m| (m.name.clone(), number(&m.estimate))).collect();
                json!({
                    "name": candidate.name,
                    "policy": candidate.attention.to_string(),
                    "thresholds": candidate.thresholds.as_ref().map(|t| t.iter().collect::<Vec<_>>()),
                    "metrics": metrics,
                    "change": number(&summary.change),
                    "zeros": summary.zeros(),
                    "sparsity": summary.sparsity(&candidate.attention),
                    "bits_per_key_element": summary.bits(&candidate.attention),
                    "kl": summary.kl.as_ref().map(number),
                    "seconds": summary.seconds,
                })
            });
            json!({
                "task": result.name,
                "kind": result.kind.name(),
                "stage": result.stage,
                "rows": result.rows,
                "left_out": result.left_out,
                "policies": policies.collect::<Vec<_>>(),
            })
        };
        let results: Vec<Value> = self.results.iter().map(task).collect();
        json!({ "model": self.model, "results": results })
    }

    /// One line a task, stage, policy and metric.
    fn csv(&self) -> String {
        let mut text =
            "task,kind,stage,name,policy,thresholds,metric,value,standard_error,count,zeros,sparsity,\
                        bits_per_key_element,kl,kl_standard_error,seconds\n"
                .to_owned();
        let optional = |x: Option<f64>| x.map_or(String::new(), |x| x.to_string());
        for result in &self.results {
            for (candidate, summary) in self.candidates.iter().zip(&result.summaries) {
                for metric in &summary.metrics {
                    let Estimate { value, error, count } = metric.estimate;
                    let policy = &candidate.attention;
                    text += &format!(
                        "{},{},{},{},{policy},{},{},{value},{},{count},{},{},{},{},{},{}\n",
                        quoted(&result.name),
                        result.kind.name(),
                        stage_name(result.stage),
                        quoted(&candidate.name),
                        if candidate.thresholds.is_some() { "each head" } else { "one" },
                        quoted(&metric.name),
                        optional(error),
                        optional(summary.zeros()),
                        optional(summary.sparsity(policy)),
                        optional(summary.bits(policy)),
                        optional(summary.kl.map(|kl| kl.value)),
                        optional(summary.kl.and_then(|kl| kl.error)),
                        summary.seconds,
                    );
                }
            }
        }
        text
    }

    /// Writes everything into a directory that is there.
    pub fn write(&self, out: &Path) -> Result<(), Error> {
        write_whole(&out.join("results.json"), &format!("{:#}\n", self.json()))?;
        write_whole(&out.join("results.csv"), &self.csv())?;
        for result in &self.results {
            let name = format!("{}-{}", result.name, stage_name(result.stage));
            for (axis, label, of) in AXES {
                let picture = result.scatter(self.candidates, label, of);
                if let Some(picture) = picture {
                    let path = out.join(format!("{name}-{axis}.svg"));
                    write_whole(&path, &format!("{}\n", picture.draw()))?;
                }
            }
        }
        Ok(())
    }
}

type Abscissa = fn(&Summary, &Candidate) -> Option<f64>;
const AXES: [(&str, &str, Abscissa); 2] = [
    ("sparsity", "sparsity: zeros × (1 - alpha)", |s, c| s.sparsity(&c.attention)),
    ("bits", "bits a key element", |s, c| s.bits(&c.attention).filter(|_| !c.attention.is_dense())),
];

impl TaskResult {
    fn table(&self, candidates: &[Candidate]) -> String {
        let left_out = match self.left_out {
            0 => String::new(),
            n => format!(", {n} too long and left out"),
        };
        let (kind, stage) = (self.kind.name(), stage_name(self.stage));
        let mut text = format!("{}: {kind}, {} rows{left_out}, {stage}\n\n", self.name, self.rows);
        let Some(first) = self.summaries.first() else { return text };
        let shown: Vec<usize> = (0..first.metrics.len())
            .filter(|&index| is_shown(&first.metrics[index].name))
            .collect();
        let mut rows = vec![vec!["policy".to_owned()]];
        rows[0].extend(shown.iter().map(|&index| first.metrics[index].name.clone()));
        let columns = ["change", "zeros", "sparsity", "bits", "KL, nats a token", "time"];
        rows[0].extend(columns.map(str::to_owned));
        let optional = |x: Option<String>| x.unwrap_or_else(|| "-".to_owned());
        for (index, (candidate, summary)) in candidates.iter().zip(&self.summaries).enumerate() {
            let policy = &candidate.attention;
            let versus = |figure: &Estimate| match index {
                0 => "-".to_owned(),
                _ => estimate(figure),
            };
            // Perplexity changes by a share of itself, everything else by so much.
            let change = match self.kind {
                TaskKind::Text if index > 0 => estimate(&summary.change.times(100.0)) + " %",
                _ => versus(&summary.change),
            };
            let mut row = vec![candidate.name.clone()];
            row.extend(shown.iter().map(|&index| estimate(&summary.metrics[index].estimate)));
            row.extend([
                change,
                optional(summary.zeros().map(percent)),
                optional(summary.sparsity(policy).map(percent)),
                optional(summary.bits(policy).map(|bits| format!("{bits:.2}"))),
                summary.kl.as_ref().map_or("-".to_owned(), versus),
                format!("{:.1} s", summary.seconds),
            ]);
            rows.push(row);
        }
        text += &aligned(&rows, 1);
        let idle = |(candidate, summary): (&Candidate, &Summary)| {
            !candidate.attention.is_dense() && summary.keys.elements == 0
        };
        if candidates.iter().zip(&self.summaries).any(idle) {
            text += "\nNo bits: no row has a full page beside what is seen exactly, and nothing was \
                     compressed. A smaller --page, or longer rows, would.\n";
        }
        text
    }

    /// The main metric along an axis; `None` where no policy has a place on it.
    fn scatter(
        &self,
        candidates: &[Candidate],
        label: &'static str,
        of: Abscissa,
    ) -> Option<Scatter> {
        let point = |(candidate, summary): (&Candidate, &Summary)| {
            let Estimate { value, error, .. } = summary.main().estimate;
            let name = candidate.name.clone();
            // Policies that differ in their threshold alone are one series.
            let series: Vec<&str> =
                name.split(' ').filter(|word| !word.starts_with("theta=")).collect();
            Some(Point {
                x: of(summary, candidate)?,
                y: value,
                error: error.unwrap_or(0.0),
                series: series.join(" "),
                name,
            })
        };
        let points: Vec<Point> = candidates.iter().zip(&self.summaries).filter_map(point).collect();
        let dense = self.summaries.first()?.main();
        (!points.is_empty()).then(|| Scatter {
            title: format!("{}: {} ({})", self.name, dense.name, stage_name(self.stage)),
            x: label,
            y: dense.name.clone(),
            points,
            level: ("dense".to_owned(), dense.estimate.value, dense.estimate.error.unwrap_or(0.0)),
        })
    }
}

/// What stands in the table: the rest is in JSON and CSV.
fn is_shown(metric: &str) -> bool {
    const LEFT_OUT: [&str; 3] = ["answerable_exact", "unanswerable_exact", "bits_per_byte"];
    !LEFT_OUT.contains(&metric) && !metric.starts_with("found at")
}

fn stage_name(stage: Stage) -> &'static str {
    match stage {
        Stage::Prefill => "prefill",
        Stage::Decode => "decode",
    }
}

fn number(estimate: &Estimate) -> Value {
    json!({ "value": estimate.value, "standard_error": estimate.error, "count": estimate.count })
}

/// A figure with its standard error, with as many digits as the error has use for.
fn estimate(estimate: &Estimate) -> String {
    let Estimate { value, error, .. } = *estimate;
    let smallest = error.filter(|error| *error > 0.0).unwrap_or(value.abs());
    if value != 0.0 && value.abs().max(smallest) < 1e-3 {
        return match error {
            Some(error) => format!("{value:.1e} ± {error:.0e}"),
            None => format!("{value:.1e}"),
        };
    }
    let digits = match smallest > 0.0 && smallest.is_finite() {
        true => (1.0 - smallest.log10().floor()).clamp(1.0, 5.0) as usize,
        false => 1,
    };
    match error {
        Some(error) => format!("{value:.digits$} ± {error:.digits$}"),
        None => format!("{value:.*}", digits + 2),
    }
}
