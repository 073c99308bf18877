//! All known answers of a device, in every variant of the kernels: what a bug report needs.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::shader::{Abilities, Kernel};
use super::{Gpu, GpuOptions, Packing};
use crate::backend::{Activation, DeviceInfo, MatrixFormat, ModelPlan};
use crate::conformance::known::{Question, of_attention, of_model};
use crate::delta::{AttentionPolicy, KeyFormat, ValueFormat};
use crate::error::{Error, Result};
use crate::formats::CacheFormat;

/// What a device answers.
#[derive(Clone, Debug)]
pub struct Diagnosis {
    /// Which device; its features are all that it has.
    pub device: DeviceInfo,
    /// The variants that kernels were linked in, that with all abilities first.
    pub variants: Vec<Abilities>,
    /// The answers, by question.
    pub answers: Vec<Answer>,
}

impl Diagnosis {
    /// Whether every answer is right.
    pub fn is_healthy(&self) -> bool {
        self.answers.iter().flat_map(|answer| &answer.verdicts).flatten().all(Verdict::is_right)
    }
}

/// The answers to one question.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The operation and what was asked of it.
    pub question: String,
    /// The kernels that had a part in it, by name.
    pub kernels: Vec<&'static str>,
    /// In each variant; nothing where that runs the same code as one before it.
    pub verdicts: Vec<Option<Verdict>>,
}

/// How one answer is.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The error of the element that is nearest to its tolerance or beyond it, as a share of that: at
    /// most 1 where the answer is right.
    pub share: f64,
    /// What is wrong: a check that failed, or what the driver said.
    pub wrong: Option<String>,
    /// With the compilation of the kernels.
    pub time: Duration,
}

impl Verdict {
    /// Whether nothing is wrong.
    pub fn is_right(&self) -> bool {
        self.wrong.is_none()
    }
}

/// Asks a device everything, in every variant. `progress` gets how many of how many questions are done;
/// `Break` stops it with [`Error::Cancelled`].
///
/// # Errors
/// No such device, one that cannot be opened, or that was lost.
pub fn diagnose(
    options: &GpuOptions,
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Diagnosis> {
    let options = GpuOptions { self_test: false, ..options.clone() };
    let gpu = Gpu::open(&options)?;
    let (device, all) = (gpu.info().clone(), gpu.device.abilities);
    drop(gpu);
    let variants: Vec<_> = all.plainer().collect();
    let questions = questions();
    let total = questions.len() * variants.len();
    let ask = |question: &Question<Gpu>| (question.name.clone(), Vec::new(), Vec::new());
    let mut asked: Vec<(String, Vec<Kernel>, Vec<Option<Verdict>>)> =
        questions.iter().map(ask).collect();
    for (at, &variant) in variants.iter().enumerate() {
        let Abilities { f16, subgroups, packed_dot, matrix_unit } = variant;
        let matrix_unit = matrix_unit.is_some();
        let variant_options =
            GpuOptions { f16, subgroups, packed_dot, matrix_unit, ..options.clone() };
        let gpu = Gpu::open(&variant_options)?;
        for (index, (question, (_, kernels, verdicts))) in
            questions.iter().zip(&mut asked).enumerate()
        {
            if progress(at * questions.len() + index, total).is_break() {
                return Err(Error::Cancelled);
            }
            let code =
                |abilities| kernels.iter().map(move |k: &Kernel| k.program(abilities).wgsl());
            if variants[..at].iter().any(|&earlier| code(earlier).eq(code(variant))) {
                verdicts.push(None);
                continue;
            }
            let (verdict, used) = ask_one(&gpu, question)?;
            if at == 0 {
                *kernels = used;
            }
            verdicts.push(Some(verdict));
        }
    }
    let answer = |(question, kernels, verdicts): (String, Vec<Kernel>, _)| {
        let mut names: Vec<_> = kernels.iter().map(|kernel| kernel.name()).collect();
        names.dedup();
        Answer { question, kernels: names, verdicts }
    };
    Ok(Diagnosis { device, variants, answers: asked.into_iter().map(answer).collect() })
}

fn ask_one(gpu: &Gpu, question: &Question<Gpu>) -> Result<(Verdict, Vec<Kernel>)> {
    let start = Instant::now();
    gpu.device.pipelines.watch();
    let answer = question.ask(gpu);
    let used = gpu.device.pipelines.watched();
    let time = start.elapsed();
    let verdict = match answer {
        Ok(checks) => {
            let share = |error: f64, tolerance: f64| match error {
                0.0 => 0.0,
                error => error / tolerance.max(f64::MIN_POSITIVE),
            };
            let shares = checks.iter().map(|check| share(check.error, check.tolerance));
            let wrong = checks.iter().find(|check| !check.pass).map(ToString::to_string);
            Verdict { share: shares.fold(0.0, f64::max), wrong, time }
        }
        Err(Error::DeviceLost { device, message }) => {
            return Err(Error::DeviceLost {
                device,
                message: format!("{}: {message}", question.name),
            });
        }
        Err(error) => Verdict { share: f64::INFINITY, wrong: Some(error.to_string()), time },
    };
    Ok((verdict, used))
}

/// What any model may ask: every format of weights, and of keys and values.
fn questions() -> Vec<Question<Gpu>> {
    let mut questions: Vec<Question<Gpu>> = Vec::new();
    let mut add = |more: Vec<Question<Gpu>>| {
        for question in more {
            if questions.iter().all(|known| known.name != question.name) {
                questions.push(question);
            }
        }
    };
    for format in [
        MatrixFormat::BF16,
        MatrixFormat::F16,
        MatrixFormat::F32,
        MatrixFormat::Q8,
        MatrixFormat::Q4,
    ] {
        for (body, activation) in
            [(MatrixFormat::Ternary, Activation::Relu2), (format, Activation::Silu)]
        {
            let (embedding, head) = (format, format);
            let body = [body; 3];
            let plan = ModelPlan { embedding, body, head, activation, intermediate: 640 };
            add(of_model(&plan).into_iter().flat_map(in_every_packing).collect());
        }
    }
    for head_dim in [64, 128] {
        for policy in policies() {
            add(of_attention(head_dim, &policy));
        }
    }
    questions
}

/// A device has one packing of ternary weights; it is to be known of both whether they would do.
fn in_every_packing(question: Question<Gpu>) -> Vec<Question<Gpu>> {
    if question.operation != "linear_ternary" {
        return vec![question];
    }
    let question = Arc::new(question);
    let packed = |packing| {
        let question = Arc::clone(&question);
        Question::new(
            question.operation,
            format!("{packing} weights in a byte"),
            move |gpu: &Gpu| question.ask(&gpu.packed(packing)),
        )
    };
    Packing::ALL.map(packed).into()
}

/// Keys and values in all formats, though not each with each.
fn policies() -> Vec<AttentionPolicy> {
    let dense = AttentionPolicy::dense();
    let delta = AttentionPolicy::delta();
    let keys = |name: &str| delta.keys.changed_to(name).unwrap_or(KeyFormat::Plain);
    vec![
        dense,
        AttentionPolicy::plain(CacheFormat::F32),
        AttentionPolicy { values: ValueFormat::Int8, ..dense },
        AttentionPolicy { values: ValueFormat::Int4, ..dense },
        delta,
        AttentionPolicy { values: ValueFormat::Int4, ..delta },
        AttentionPolicy::paper(),
        AttentionPolicy { keys: keys("int8"), values: ValueFormat::Int8, ..delta },
        AttentionPolicy { keys: keys("channel4"), ..delta },
        AttentionPolicy { keys: keys("channel2"), page: 32, ..delta },
    ]
}
