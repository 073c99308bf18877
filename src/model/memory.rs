//! What a model and a context take, counted before anything is allocated.

use super::{SessionShape, WeightFormat};
use crate::backend::{CacheFormat, Q8_BLOCK};
use crate::checkpoint::ModelConfig;

/// Bytes held on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Weights, shared by all sessions of the model.
    pub weights: u64,
    /// Keys and values of the session's context.
    pub cache: u64,
    /// Intermediate results of a step, and tables.
    pub activations: u64,
    /// What the device's operations need beside their inputs and outputs.
    pub scratch: u64,
}

impl MemoryUse {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.cache + self.activations + self.scratch
    }
}

/// What a model needs on a device for `context` tokens, without padding and scratch memory, which
/// differ between backends: a few per cent, and some megabytes.
pub fn plan_memory(
    config: &ModelConfig,
    stored_bytes_per_float: usize,
    weights: WeightFormat,
    context: usize,
    cache: CacheFormat,
) -> MemoryUse {
    let ModelConfig { hidden, intermediate, layers, attention, vocabulary, .. } = *config;
    let float = |elements: usize| match weights {
        WeightFormat::Stored => (elements * stored_bytes_per_float) as u64,
        WeightFormat::Q8 => (elements + 2 * elements.div_ceil(Q8_BLOCK)) as u64,
    };
    let body = |elements: usize| match config.ternary {
        Some(_) => elements.div_ceil(4) as u64,
        None => float(elements),
    };
    let (q, qkv) = (attention.width(), attention.qkv_width());
    let matrices = body(qkv * hidden) + body(hidden * q) + 3 * body(hidden * intermediate);
    let sub_norms = if config.ternary.is_some() { q + intermediate } else { 0 };
    let layer = matrices + 4 * (2 * hidden + sub_norms) as u64;
    let heads = if config.tied_head == Some(false) { 2 } else { 1 };

    let shape = SessionShape::new(context, cache);
    let projected = if config.ternary.is_some() { 1 } else { 4 };
    let row = 4 * (hidden + qkv + q + 2 * intermediate) + projected * (hidden + intermediate);
    let rope = context * attention.head_dim * 4;
    MemoryUse {
        weights: layers as u64 * layer + heads * float(vocabulary * hidden) + 4 * hidden as u64,
        cache: (layers * context * 2 * attention.kv_heads * attention.head_dim * cache.bytes())
            as u64,
        activations: (shape.chunk * row + shape.logit_rows * 4 * (hidden + vocabulary) + rope)
            as u64,
        scratch: 0,
    }
}
