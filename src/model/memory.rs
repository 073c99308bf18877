//! What a model and a context take, counted before anything is allocated.

use super::{PREFILL_CHUNK, WeightFormat};
use crate::backend::Q8_BLOCK;
use crate::checkpoint::ModelConfig;
use crate::delta::AttentionPolicy;

/// Bytes held on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Weights, shared by all sessions of the model.
    pub weights: u64,
    /// Keys of the session, compressed and original.
    pub keys: u64,
    /// Values of the session.
    pub values: u64,
    /// Intermediate results of a step, and tables.
    pub activations: u64,
    /// What the device's operations need beside their inputs and outputs.
    pub scratch: u64,
}

impl MemoryUse {
    /// All of it.
    pub fn total(&self) -> u64 {
        let parts = [self.weights, self.keys, self.values, self.activations, self.scratch];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// What a model needs on a device for a text of `context` tokens, without padding and scratch
/// memory, which differ between backends: a few per cent, and some megabytes.
///
/// How many deltas will be kept is not known before: delta keys count as if all were.
pub fn plan_memory(
    config: &ModelConfig,
    stored_bytes_per_float: usize,
    weights: WeightFormat,
    context: usize,
    policy: &AttentionPolicy,
) -> MemoryUse {
    // Sizes of a made-up or damaged configuration may be far beyond 64 bits.
    let wide = |n: usize| n as u128;
    let (hidden, intermediate) = (wide(config.hidden), wide(config.intermediate));
    let (layers, vocabulary, length) =
        (wide(config.layers), wide(config.vocabulary), wide(context));
    let attention = &config.attention;
    let (q, kv) = (wide(attention.width()), wide(attention.kv_width()));
    let qkv = q + 2 * kv;

    let float = |elements: u128| match weights {
        WeightFormat::Stored => elements * wide(stored_bytes_per_float),
        WeightFormat::Q8 => elements + 2 * elements.div_ceil(wide(Q8_BLOCK)),
        WeightFormat::Q4 => elements.div_ceil(2) + 2 * elements.div_ceil(wide(Q8_BLOCK)),
    };
    let body = |elements: u128| match config.ternary {
        Some(_) => elements.div_ceil(4),
        None => float(elements),
    };
    let matrices = body(qkv * hidden) + body(hidden * q) + 3 * body(hidden * intermediate);
    let sub_norms = if config.ternary.is_some() { q + intermediate } else { 0 };
    let layer = matrices + 4 * (2 * hidden + sub_norms);
    let tables = if config.tied_head == Some(false) { 2 } else { 1 };

    let projected = if config.ternary.is_some() { 1 } else { 4 };
    let row = 4 * (hidden + qkv + q + 2 * intermediate) + projected * (hidden + intermediate);
    let chunk = wide(PREFILL_CHUNK).min(length);
    let rope = length * wide(attention.head_dim) * 4;
    let heads = layers * wide(attention.kv_heads);
    let bytes = |n: u128| u64::try_from(n).unwrap_or(u64::MAX);
    MemoryUse {
        weights: bytes(layers * layer + tables * float(vocabulary * hidden) + 4 * hidden),
        keys: bytes(heads * policy.most_key_bytes(context, PREFILL_CHUNK, attention.head_dim)),
        values: bytes(heads * policy.value_bytes(context, attention.head_dim)),
        activations: bytes(chunk * row + 4 * (hidden + vocabulary) + rope),
        scratch: 0,
    }
}
