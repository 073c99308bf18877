//! Where a GPU goes wrong: a prompt is run on it and on the CPU, operation by operation.
//!
//! Each operation gets the same input on both, so that the first one that differs beyond rounding is
//! the one that is wrong, and everything behind it is judged as if it had been right.

mod pair;

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::{Backend, DeviceInfo, Input};
use crate::checkpoint::Checkpoint;
use crate::cpu::Cpu;
use crate::delta::{AttentionPolicy, Phase, Thresholds};
use crate::error::{Error, Result};
use crate::gpu::{Gpu, GpuOptions};
use crate::model::{
    Engine, LoadProgress, Output, PREFILL_CHUNK, SessionShape, Transformer, WeightFormat,
};
use crate::session::check_fits;
use pair::{Log, Pair};

/// One operation on both devices.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Where the step stands in the text.
    pub position: usize,
    /// Tokens of the step.
    pub tokens: usize,
    /// The decoder layer; the number of layers for what comes after the last.
    pub layer: usize,
    /// The operation, and the weights that it multiplies by.
    pub operation: String,
    /// The largest difference as a share of what rounding explains; above 1 it is wrong.
    pub share: f64,
    /// Whether the CPU's result is finite; else the checkpoint is broken, whatever the GPU does.
    pub finite: bool,
}

impl Comparison {
    /// Whether rounding explains the difference.
    pub fn is_right(&self) -> bool {
        self.share <= 1.0 && self.finite
    }
}

/// All that was compared, in the order that it was computed in.
#[derive(Clone, Debug)]
pub struct Bisection {
    /// The GPU.
    pub device: DeviceInfo,
    /// Decoder layers of the model.
    pub layers: usize,
    /// The comparisons.
    pub comparisons: Vec<Comparison>,
}

impl Bisection {
    /// The first operation that differs beyond rounding, or is not finite.
    pub fn first(&self) -> Option<&Comparison> {
        self.comparisons.iter().find(|comparison| !comparison.is_right())
    }
}

/// What is run.
#[derive(Clone, Debug)]
pub struct BisectOptions {
    /// The GPU that is doubted.
    pub gpu: GpuOptions,
    /// Format of float weights.
    pub weights: WeightFormat,
    /// Threads of the CPU backend; `None` takes every core.
    pub threads: Option<usize>,
    /// How keys and values are kept.
    pub attention: AttentionPolicy,
    /// Thresholds of each layer and KV head in place of the policy's one.
    pub thresholds: Option<Thresholds>,
    /// Tokens to decode after the prompt, each the likeliest.
    pub decode: usize,
}

/// Runs `prompt` and some tokens more on a GPU and on the CPU.
///
/// Both hold all weights. `progress` is told how far they have been loaded.
///
/// # Errors
/// No such GPU, no memory for the weights on either; a prompt without tokens, with some outside the
/// vocabulary, or longer than the context.
pub fn bisect(
    checkpoint: &Checkpoint,
    prompt: &[u32],
    options: &BisectOptions,
    mut progress: impl FnMut(LoadProgress) -> ControlFlow<()>,
) -> Result<Bisection> {
    let (vocabulary, limit) = (checkpoint.config.vocabulary, checkpoint.config.context);
    let context = prompt.len() + options.decode;
    check_fits(context, limit, limit)?;
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocabulary) {
        return Err(Error::TokenOutOfRange { token, vocabulary });
    }
    // What a self-test would put right is what is looked for.
    options.attention.check()?;
    if let Some(thresholds) = &options.thresholds {
        let (layers, heads) = (checkpoint.config.layers, checkpoint.config.attention.kv_heads);
        thresholds.check(&options.attention, layers, heads)?;
    }
    let gpu = Gpu::open(&GpuOptions { self_test: false, ..options.gpu.clone() })?;
    let device = gpu.device().clone();
    let log: Log = Arc::new(Mutex::new(Vec::new()));
    let pair = Arc::new(Pair::new(gpu, Cpu::new(options.threads)?, Arc::clone(&log)));
    let engine = Arc::new(Transformer::load(pair, checkpoint, options.weights, &mut progress)?);
    let shape = SessionShape::new(context, options.attention);
    let mut decoder =
        engine.start(SessionShape { thresholds: options.thresholds.clone(), ..shape })?;
    let phase = Phase::Prefill { length: prompt.len() };
    for chunk in prompt.chunks(PREFILL_CHUNK) {
        decoder.forward(Input::Tokens(chunk), phase, Output::LastLogits)?;
    }
    for _ in 0..options.decode {
        let logits = decoder.logits()?;
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        let token = [best.unwrap_or(0) as u32];
        decoder.forward(Input::Tokens(&token), Phase::Decode, Output::LastLogits)?;
    }
    let comparisons = std::mem::take(&mut *log.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(Bisection { device, layers: checkpoint.config.layers, comparisons })
}
