//! A layer's cache as bytes.

use super::page::Page;

/// The cache of one layer, as every backend writes and reads it: what a saved session is made of.
///
/// Numbers are little-endian; `G` are the KV heads and `D` the elements of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheImage {
    /// Tokens in the cache.
    pub length: usize,
    /// Compressed pages, `[G][floor(length / page)]`; no pages where keys are plain.
    pub pages: Vec<Vec<Page>>,
    /// The first position beyond the sink whose original key is here.
    pub exact_from: usize,
    /// Original keys in [`AttentionPolicy::exact`](super::AttentionPolicy::exact), `[G, N, D]`:
    /// those of the sink, `0..min(sink, length)`, where keys are compressed, then
    /// `exact_from..length`. A key of the sink at or after `exact_from` is there twice.
    pub exact: Vec<u8>,
    /// Values, `[G, length]` rows. Plain: `D` floats. Int8: `D` bytes and the scale, f16. Int4:
    /// `ceil(D / 2)` bytes, the lower half first, then scale and minimum, f16.
    pub values: Vec<u8>,
}
