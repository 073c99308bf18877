//! What operations cost, counted from what they are given.
//!
//! The bytes are the least that an operation moves: each of its inputs is read once and each of its
//! outputs written once, as they lie in memory, whatever a kernel reads again from its caches. Of a
//! cache count the keys and pages that the step's queries see, and all values up to them.

use std::ops::AddAssign;

use crate::backend::{CacheRows, TensorFormat};
use crate::delta::{AttentionPolicy, ExactRule};
use crate::formats::AttentionShape;

/// What some operations cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Cost {
    /// Bytes of weights that are read: matrices, norms, rows of the embedding.
    pub weights: u64,
    /// Bytes of keys and values that are read and written.
    pub cache: u64,
    /// Bytes of intermediate results that are read and written.
    pub activations: u64,
    /// Multiplications with an addition each, of matrices and attention; the others do not count.
    pub multiply_adds: u64,
}

impl Cost {
    /// All bytes that are moved.
    pub fn bytes(&self) -> u64 {
        self.weights + self.cache + self.activations
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.weights += other.weights;
        self.cache += other.cache;
        self.activations += other.activations;
        self.multiply_adds += other.multiply_adds;
    }
}

/// Bytes of a row of activations.
pub(super) fn row_bytes(width: usize, format: TensorFormat) -> u64 {
    match format {
        TensorFormat::F32 => 4 * width as u64,
        // A scale and a sum beside it.
        TensorFormat::Int8 => width as u64 + 8,
    }
}

/// Attention of `tokens` queries from `position` on.
pub(super) fn attention(
    rule: &ExactRule,
    shape: &AttentionShape,
    rows: CacheRows,
    position: usize,
    tokens: usize,
) -> Cost {
    let keys = position + tokens;
    // The first query's window begins first; the last one sees most pages.
    let (first, last) = (rule.start(position), rule.start(keys.saturating_sub(1)));
    let exact = keys - first + rule.sink.min(first);
    let pages = match last > rule.sink {
        true => last.div_ceil(rule.page) - rule.sink / rule.page,
        false => 0,
    };
    let page_bytes = (pages as u64 * rows.page_bytes).checked_div(rows.pages).unwrap_or(0);
    let seen = tokens * position + tokens * (tokens + 1) / 2;
    Cost {
        weights: 0,
        cache: exact as u64 * rows.key + page_bytes + keys as u64 * rows.value,
        activations: 2 * tokens as u64 * row_bytes(shape.width(), TensorFormat::F32),
        multiply_adds: 2 * (shape.width() * seen) as u64,
    }
}

/// Bytes that compressing the last `pages` pages moves: the original keys, and the pages.
pub(super) fn encode(policy: &AttentionPolicy, rows: CacheRows, pages: u64) -> u64 {
    let written = (pages * rows.page_bytes).checked_div(rows.pages).unwrap_or(0);
    pages * policy.page as u64 * rows.key + written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::Phase;

    const SHAPE: AttentionShape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 64 };

    #[test]
    fn dense_attention_reads_every_key_and_value() {
        let policy = AttentionPolicy::dense();
        let rows = CacheRows { key: 256, value: 256, ..CacheRows::default() };
        let cost = attention(&policy.rule(Phase::Decode), &SHAPE, rows, 99, 1);
        assert_eq!(cost.cache, 100 * 512);
        assert_eq!(cost.activations, 2 * 4 * 256);
        assert_eq!(cost.multiply_adds, 2 * 256 * 100);
        // Queries at 10, 11 and 12 see 11, 12 and 13 keys.
        let cost = attention(&policy.rule(Phase::Decode), &SHAPE, rows, 10, 3);
        assert_eq!(cost.cache, 13 * 512);
        assert_eq!(cost.multiply_adds, 2 * 256 * 36);
    }

    #[test]
    fn a_compressed_cache_is_read_as_sink_pages_and_window() {
        let policy: AttentionPolicy = "delta page=16 window=20 sink=4".parse().expect("policy");
        let rows = CacheRows { key: 256, value: 64, pages: 6, page_bytes: 600 };
        // 101 keys; the window of the last 20 begins with the page at 80: five pages before it.
        let cost = attention(&policy.rule(Phase::Decode), &SHAPE, rows, 100, 1);
        assert_eq!(cost.cache, (21 + 4) * 256 + 5 * 100 + 101 * 64);
        // A text within its window has no page to read.
        let rows = CacheRows { pages: 0, page_bytes: 0, ..rows };
        let cost = attention(&policy.rule(Phase::Decode), &SHAPE, rows, 9, 1);
        assert_eq!(cost.cache, 10 * 256 + 10 * 64);
    }

    #[test]
    fn a_sink_of_whole_pages_is_not_read_twice() {
        let policy: AttentionPolicy = "delta page=16 window=16 sink=32".parse().expect("policy");
        let rows = CacheRows { key: 8, value: 8, pages: 6, page_bytes: 600 };
        let cost = attention(&policy.rule(Phase::Decode), &SHAPE, rows, 99, 1);
        // 100 keys, the window from 80 on; pages 2, 3 and 4.
        assert_eq!(cost.cache, (20 + 32) * 8 + 3 * 100 + 100 * 8);
        assert_eq!(encode(&policy, rows, 2), 2 * 16 * 8 + 200);
    }
}
