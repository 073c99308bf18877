//! Keys and values of one layer, original and compressed.

use std::ops::Range;
use std::sync::Arc;

use half::f16;

use crate::backend::{AttentionShape, CacheBytes, CacheFormat, CacheRows, KeyValueCache};
use crate::delta::{
    AttentionPolicy, CacheImage, ExactRule, Page, PageLayout, ValueFormat, decode_value,
    encode_value,
};

/// Keys and values of one layer.
///
/// It keeps every original key beside the compressed pages: which of the two a query sees is
/// decided when it attends.
#[derive(Debug)]
pub struct Cache {
    pub(super) shape: AttentionShape,
    pub(super) policy: AttentionPolicy,
    /// Of the pages; nothing where keys are plain.
    pub(super) layout: Option<PageLayout>,
    /// Of each KV head, in place of the policy's.
    pub(super) thresholds: Option<Arc<[f32]>>,
    /// Tokens in it.
    pub(super) length: usize,
    /// `[context, G, D]`, as `f32` that the policy's exact format can hold.
    pub(super) keys: Vec<f32>,
    /// `[G][full pages]`.
    pub(super) pages: Vec<Vec<Page>>,
    /// The keys that they stand for, `[G][full pages * C, D]`.
    pub(super) reconstruction: Vec<Vec<f32>>,
    /// What the rows of `value_rows` stand for, `[context, G, D]`.
    pub(super) values: Vec<f32>,
    /// Values as bytes, see [`encode_value`]; `[context, G]` rows.
    pub(super) value_rows: Vec<u8>,
}

impl Cache {
    /// Rounds an original key to what the policy keeps of it.
    pub(super) fn round(&self, x: f32) -> f32 {
        match self.policy.exact {
            CacheFormat::F32 => x,
            CacheFormat::F16 => f16::from_f32(x).to_f32(),
        }
    }

    /// Where the key or value of a head at `position` begins.
    pub(super) fn at(&self, position: usize, kv_head: usize) -> usize {
        (position * self.shape.kv_heads + kv_head) * self.shape.head_dim
    }

    /// The key `[D]` at `key` that a query at `query` sees.
    pub(super) fn key(&self, rule: &ExactRule, query: usize, key: usize, kv_head: usize) -> &[f32] {
        let head_dim = self.shape.head_dim;
        if rule.is_exact(query, key) {
            &self.keys[self.at(key, kv_head)..][..head_dim]
        } else {
            &self.reconstruction[kv_head][key * head_dim..][..head_dim]
        }
    }

    /// Original keys of a head at `positions`, `[N, D]`.
    pub(super) fn originals(&self, positions: Range<usize>, kv_head: usize) -> Vec<f32> {
        let key = |n| &self.keys[self.at(n, kv_head)..][..self.shape.head_dim];
        positions.flat_map(key).copied().collect()
    }

    /// The positions whose original keys an image holds.
    fn exact_positions(&self, exact_from: usize) -> impl Iterator<Item = usize> + use<> {
        let sink = if self.layout.is_some() { self.policy.sink.min(self.length) } else { 0 };
        (0..sink).chain(exact_from..self.length)
    }

    /// Adds a full page of one head.
    pub(super) fn push_page(&mut self, kv_head: usize, page: Page) {
        let layout = self.layout.as_ref().expect("compressed keys");
        self.reconstruction[kv_head].extend(page.reconstruct(layout));
        self.pages[kv_head].push(page);
    }

    /// Sets the value of a head at `position` from its row of bytes.
    pub(super) fn set_value(&mut self, position: usize, kv_head: usize, row: &[u8]) {
        let AttentionShape { kv_heads, head_dim, .. } = self.shape;
        self.value_rows[(position * kv_heads + kv_head) * row.len()..][..row.len()]
            .copy_from_slice(row);
        let at = self.at(position, kv_head);
        let AttentionPolicy { values, exact, .. } = self.policy;
        decode_value(values, exact, row, &mut self.values[at..][..head_dim]);
    }

    /// See [`crate::backend::Operations::truncate`].
    pub(super) fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        if let Some(layout) = self.layout {
            let pages = self.length / layout.tokens;
            let keys = pages * layout.tokens * layout.head_dim;
            self.pages.iter_mut().for_each(|all| all.truncate(pages));
            self.reconstruction.iter_mut().for_each(|all| all.truncate(keys));
        }
    }

    /// See [`crate::backend::Operations::save`].
    pub(super) fn save(&self, exact_from: usize) -> CacheImage {
        let Self { shape, policy, length, .. } = *self;
        let (mut exact, mut values) = (Vec::new(), Vec::new());
        let row_bytes = policy.value_row_bytes(shape.head_dim);
        for kv_head in 0..shape.kv_heads {
            for n in self.exact_positions(exact_from) {
                let key = self.originals(n..n + 1, kv_head);
                encode_value(ValueFormat::Plain, policy.exact, &key, &mut exact);
            }
            for n in 0..length {
                let row = (n * shape.kv_heads + kv_head) * row_bytes;
                values.extend(&self.value_rows[row..][..row_bytes]);
            }
        }
        CacheImage { length, pages: self.pages.clone(), exact_from, exact, values }
    }

    /// See [`crate::backend::Operations::restore`].
    pub(super) fn restore(&mut self, image: &CacheImage) {
        let (AttentionShape { kv_heads, head_dim, .. }, policy) = (self.shape, self.policy);
        self.length = image.length;
        let mut exact = image.exact.chunks_exact(head_dim * policy.exact.bytes());
        let mut rows = image.values.chunks_exact(policy.value_row_bytes(head_dim));
        for kv_head in 0..kv_heads {
            for page in image.pages.get(kv_head).into_iter().flatten() {
                self.push_page(kv_head, page.clone());
            }
            // Keys whose originals are gone are what their pages stand for.
            for (i, &key) in self.reconstruction[kv_head].iter().enumerate() {
                let at = (i / head_dim * kv_heads + kv_head) * head_dim;
                self.keys[at + i % head_dim] = key;
            }
            for (n, key) in self.exact_positions(image.exact_from).zip(&mut exact) {
                let at = self.at(n, kv_head);
                let out = &mut self.keys[at..][..head_dim];
                decode_value(ValueFormat::Plain, policy.exact, key, out);
            }
            for (n, row) in (0..image.length).zip(&mut rows) {
                self.set_value(n, kv_head, row);
            }
        }
    }
}

impl KeyValueCache for Cache {
    fn held(&self) -> CacheBytes {
        let pages = self.pages.iter().flatten().map(Page::bytes).sum::<u64>();
        let reconstruction = self.reconstruction.iter().map(|keys| 4 * keys.len() as u64);
        CacheBytes {
            keys: 4 * self.keys.len() as u64 + pages + reconstruction.sum::<u64>(),
            values: 4 * self.values.len() as u64 + self.value_rows.len() as u64,
        }
    }

    /// As they count, not as they lie here.
    fn rows(&self) -> CacheRows {
        let AttentionShape { kv_heads, head_dim, .. } = self.shape;
        CacheRows {
            key: (kv_heads * head_dim * self.policy.exact.bytes()) as u64,
            value: (kv_heads * self.policy.value_row_bytes(head_dim)) as u64,
            pages: self.pages.first().map_or(0, |pages| pages.len() as u64),
            page_bytes: self.pages.iter().flatten().map(Page::bytes).sum(),
        }
    }
}
