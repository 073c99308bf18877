//! Keys and values of one layer on the device.
//!
//! Memory grows with the text, by segments: nothing is copied, and no binding exceeds the device's
//! limit whatever the context. Each further segment has room for half of what is there, so that at
//! most a third of a long cache is unused.
//!
//! | part | layout |
//! |---|---|
//! | token segment | keys, if plain, and values: `[G][capacity][D padded to 4]`; quantised values `[G][capacity]` rows of words, then as many scales |
//! | original keys, if compressed | `[G][sink + recent][D padded to 4]`, a ring behind the sink |
//! | page segment | one word that counts delta words in use; headers `[page][G]`; deltas |
//!
//! How many deltas a page keeps is known to the device first. The host reads the counts back with the
//! step after; until then it assumes the worst, and asks at once only where a segment is so full
//! that it makes a difference.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::buffer::Buffer;
use super::device::Device;
use super::shader::Kernel;
use crate::backend::{
    AttentionShape, CacheBytes, CacheFormat, CacheRows, CacheShape, KeyValueCache,
};
use crate::delta::{
    AttentionPolicy, ChannelBits, DeltaFormat, KeyFormat, PageLayout, Reference, ValueFormat,
};
use crate::error::Result;

/// Tokens of a segment are a multiple of this: of every size of a page.
const SEGMENT_UNIT: usize = 128;

/// Tokens of the first segment, where the context is not shorter.
const FIRST_SEGMENT: usize = 1024;

/// The number format of cached values on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ValueStore {
    F32,
    F16,
    Int8,
    Int4,
}

impl ValueStore {
    pub(super) const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Int8, Self::Int4];

    fn of(policy: &AttentionPolicy) -> Self {
        match (policy.values, policy.exact) {
            (ValueFormat::Plain, CacheFormat::F32) => Self::F32,
            (ValueFormat::Plain, CacheFormat::F16) => Self::F16,
            (ValueFormat::Int8, _) => Self::Int8,
            (ValueFormat::Int4, _) => Self::Int4,
        }
    }

    /// Words of a row, its scale not counted.
    pub(super) fn row_words(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => head_dim.next_multiple_of(4),
            Self::F16 => head_dim.next_multiple_of(4) / 2,
            Self::Int8 => head_dim.div_ceil(4),
            Self::Int4 => head_dim.div_ceil(8),
        }
    }

    /// Bits of an element, where rows have scales.
    pub(super) fn quantised(self) -> Option<u32> {
        match self {
            Self::F32 | Self::F16 => None,
            Self::Int8 => Some(8),
            Self::Int4 => Some(4),
        }
    }
}

/// The format of compressed pages, as far as kernels differ in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PageKind {
    pub keys: PageKeys,
    /// Tokens of a page.
    pub page: u32,
}

/// How the keys of pages are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum PageKeys {
    Int8,
    Channel(ChannelBits),
    Delta(Reference, DeltaFormat),
}

/// Keys and values of one layer.
pub struct Cache {
    pub(super) device: Arc<Device>,
    pub(super) shape: AttentionShape,
    pub(super) policy: AttentionPolicy,
    pub(super) context: usize,
    /// Tokens of the largest step.
    pub(super) rows: usize,
    /// Tokens that were appended.
    pub(super) length: usize,
    pub(super) value_store: ValueStore,
    pub(super) tokens: Vec<TokenSegment>,
    /// Where keys are compressed.
    pub(super) compressed: Option<Compressed>,
}

/// Consecutive tokens.
pub(super) struct TokenSegment {
    /// The first position.
    pub first: usize,
    /// Tokens that there is room for.
    pub capacity: usize,
    /// Plain keys.
    pub keys: Option<Buffer>,
    pub values: Buffer,
}

impl TokenSegment {
    pub(super) fn range(&self) -> Range<usize> {
        self.first..self.first + self.capacity
    }
}

/// Compressed keys.
pub(super) struct Compressed {
    pub layout: PageLayout,
    pub kind: PageKind,
    /// Slots of the ring.
    pub recent: usize,
    /// Original keys.
    pub originals: Buffer,
    /// `[G, D]` f32, for a continuous chain: the last reconstructed key.
    pub carry: Buffer,
    /// `[G]` f32, of delta keys: absolute, or in standard deviations.
    pub thresholds: Buffer,
    pub segments: Vec<PageSegment>,
    /// Pages that are encoded.
    pub pages: usize,
}

/// Consecutive pages.
pub(super) struct PageSegment {
    /// The first page.
    pub first: usize,
    /// Pages whose headers there is room for.
    pub capacity: usize,
    /// Word at which deltas begin.
    pub deltas: usize,
    /// Words of deltas that there is room for.
    pub delta_capacity: usize,
    pub filled: Arc<Filled>,
    pub buffer: Buffer,
}

/// What the device has reported of a segment: its first `pages` take so many words of deltas.
#[derive(Default)]
pub(super) struct Filled {
    pages: AtomicU32,
    words: AtomicU32,
}

impl Filled {
    pub(super) fn set(&self, pages: usize, words: u32) {
        self.pages.store(pages as u32, Ordering::Relaxed);
        self.words.store(words, Ordering::Relaxed);
    }

    pub(super) fn pages(&self) -> usize {
        self.pages.load(Ordering::Relaxed) as usize
    }

    pub(super) fn words(&self) -> usize {
        self.words.load(Ordering::Relaxed) as usize
    }
}

/// Where a range of keys lies.
pub(super) struct Part<'a> {
    pub keys: Range<usize>,
    pub tokens: &'a TokenSegment,
    /// The pages of the range, where some are compressed.
    pub pages: Option<&'a PageSegment>,
}

impl Cache {
    pub(super) fn new(device: &Arc<Device>, shape: &CacheShape) -> Result<Self> {
        let CacheShape { attention, context, rows, policy, ref thresholds } = *shape;
        let layout = PageLayout::new(&policy, attention.head_dim)?;
        let compressed = layout.map(|layout| {
            let keys = match layout.keys {
                // Plain keys have no layout.
                KeyFormat::Int8 | KeyFormat::Plain => PageKeys::Int8,
                KeyFormat::Channel(bits) => PageKeys::Channel(bits),
                KeyFormat::Delta(delta) => PageKeys::Delta(delta.reference, delta.deltas),
            };
            let recent = policy.recent_slots(context, rows);
            let slots = attention.kv_heads * (policy.sink + recent);
            let originals = slots * attention.head_dim.next_multiple_of(4) * policy.exact.bytes();
            let uniform = layout.delta().map_or(0.0, |delta| delta.threshold.number());
            let uniform = vec![uniform; attention.kv_heads];
            let thresholds = thresholds.as_deref().unwrap_or(&uniform);
            Ok(Compressed {
                layout,
                kind: PageKind { keys, page: layout.tokens as u32 },
                recent,
                originals: device.storage("the original keys of a layer", originals as u64)?,
                carry: device
                    .storage("the last key of a layer", 4 * attention.kv_width() as u64)?,
                thresholds: device.storage_with("the thresholds of a layer", thresholds)?,
                segments: Vec::new(),
                pages: 0,
            })
        });
        let cache = Self {
            device: Arc::clone(device),
            shape: attention,
            policy,
            context,
            rows,
            length: 0,
            value_store: ValueStore::of(&policy),
            tokens: Vec::new(),
            compressed: compressed.transpose()?,
        };
        device.announce(cache.kernels());
        Ok(cache)
    }

    /// The kernels that work on such a cache.
    fn kernels(&self) -> Vec<Kernel> {
        let (exact, values) = (self.policy.exact, self.value_store);
        let head_dim = self.shape.head_dim as u32;
        let pages = self.compressed.as_ref().map(|compressed| compressed.kind);
        let page = pages.map(|pages| pages.page);
        let compressed = pages.is_some();
        let mut kernels = vec![Kernel::RopeAppend { exact, compressed, values }];
        if values.quantised().is_some() {
            kernels.push(Kernel::RopeAppendValues { values, head_dim });
        }
        if let Some(pages) = pages {
            kernels.push(Kernel::EncodeKeys { exact, pages, head_dim });
            kernels.push(Kernel::AttentionExpand { pages, head_dim });
        }
        kernels.push(Kernel::AttentionTiled { exact, page, values, head_dim });
        kernels.push(Kernel::Attention { exact, pages, values, head_dim });
        kernels.push(Kernel::AttentionMerge { head_dim });
        kernels
    }

    /// Elements of a head, padded.
    pub(super) fn padded_dim(&self) -> usize {
        self.shape.head_dim.next_multiple_of(4)
    }

    /// Slots of original keys beside the sink; 0 where keys are plain.
    pub(super) fn recent(&self) -> usize {
        self.compressed.as_ref().map_or(0, |compressed| compressed.recent)
    }

    /// Slots of the sink's keys; 0 where keys are plain.
    pub(super) fn sink(&self) -> usize {
        if self.compressed.is_some() { self.policy.sink } else { 0 }
    }

    /// Makes room for the first `length` tokens.
    pub(super) fn reserve(&mut self, length: usize) -> Result<()> {
        loop {
            let held = self.tokens.last().map_or(0, |last| last.range().end);
            if held >= length {
                return Ok(());
            }
            let kv_heads = self.shape.kv_heads;
            let key_bytes = self.padded_dim() * self.policy.exact.bytes();
            let value_bytes = 4 * self.value_store.row_words(self.shape.head_dim);
            let row_bytes = kv_heads * key_bytes.max(value_bytes + 4);
            let fit = self.device.max_binding as usize / row_bytes;
            let left = (self.context - held).next_multiple_of(SEGMENT_UNIT);
            let capacity =
                (held / 2).max(FIRST_SEGMENT).min(left).min(fit) / SEGMENT_UNIT * SEGMENT_UNIT;
            // Where not even the least fits, the device says what its limit is.
            let capacity = capacity.max(SEGMENT_UNIT);
            let plain = self.compressed.is_none();
            let bytes = |row: usize| (kv_heads * capacity * row) as u64;
            let scales = if self.value_store.quantised().is_some() { bytes(4) } else { 0 };
            let keys = plain
                .then(|| self.device.storage("the cached keys of a layer", bytes(key_bytes)))
                .transpose()?;
            let what = "the cached values of a layer";
            let values = self.device.storage(what, bytes(value_bytes) + scales)?;
            self.tokens.push(TokenSegment { first: held, capacity, keys, values });
        }
    }

    /// Word at which the scales of a segment's quantised values begin.
    pub(super) fn value_scales(&self, segment: &TokenSegment) -> usize {
        self.shape.kv_heads * segment.capacity * self.value_store.row_words(self.shape.head_dim)
    }

    /// Cuts a range of positions where segments meet, and into at most `most` keys each. Pages are
    /// looked for up to position `compressed`.
    pub(super) fn parts(
        &self,
        range: Range<usize>,
        compressed: usize,
        most: usize,
    ) -> Vec<Part<'_>> {
        let mut parts = Vec::new();
        let mut start = range.start;
        while start < range.end {
            let Some(tokens) = self.tokens.iter().find(|s| s.range().contains(&start)) else {
                break;
            };
            let mut end = range.end.min(tokens.range().end).min(start + most);
            let pages = self.compressed.as_ref().filter(|_| start < compressed).and_then(|c| {
                let page = c.layout.tokens;
                let segment = c.segments.iter().rev().find(|s| s.first * page <= start)?;
                // What follows may lie in the next segment.
                let next = c.segments.iter().find(|s| s.first * page > start);
                end = end.min(next.map_or(end, |next| next.first * page));
                Some(segment)
            });
            parts.push(Part { keys: start..end, tokens, pages });
            start = end;
        }
        parts
    }
}

impl Compressed {
    /// Words of deltas that a page of all KV heads can take.
    fn most_deltas(&self, kv_heads: usize) -> usize {
        kv_heads * (self.layout.max_words() - self.layout.header_words())
    }

    /// How many of the next `wanted` pages have room in the last segment, whatever they keep.
    pub(super) fn room(&self, kv_heads: usize, wanted: usize) -> usize {
        let Some(last) = self.segments.last() else {
            return 0;
        };
        let most = self.most_deltas(kv_heads);
        let headers = last.first + last.capacity - self.pages;
        let free = last.delta_capacity - last.filled.words() - self.unknown() * most;
        wanted.min(headers).min(free.checked_div(most).unwrap_or(wanted))
    }

    /// Pages of the last segment of which the device has not reported yet what they keep: of them
    /// the worst is assumed.
    pub(super) fn unknown(&self) -> usize {
        let counted = |last: &PageSegment| self.pages - last.first - last.filled.pages();
        self.segments.last().filter(|_| self.layout.delta().is_some()).map_or(0, counted)
    }

    /// Makes a segment for the next pages, of which `left` may come at most.
    pub(super) fn grow(&mut self, device: &Device, kv_heads: usize, left: usize) -> Result<()> {
        let most = self.most_deltas(kv_heads);
        let header = kv_heads * self.layout.header_words();
        let first_pages = FIRST_SEGMENT / self.layout.tokens;
        let fit = (device.max_binding as usize / 4 - 1) / (header + most);
        let capacity = (self.pages / 2).max(first_pages).min(left).min(fit).max(1);
        // As many deltas a page as so far, or half of all; and for the last page the worst case.
        let usual = self.usual_deltas().unwrap_or(most / 2);
        let delta_capacity = (capacity * usual + most).min(capacity * most);
        let deltas = 1 + capacity * header;
        let what = "the compressed keys of a layer";
        let buffer = device.storage(what, 4 * (deltas + delta_capacity) as u64)?;
        self.segments.push(PageSegment {
            first: self.pages,
            capacity,
            deltas,
            delta_capacity,
            filled: Arc::default(),
            buffer,
        });
        Ok(())
    }

    /// Words of deltas that a page has taken so far, and a twentieth more.
    fn usual_deltas(&self) -> Option<usize> {
        let sum = |of: fn(&Filled) -> usize| self.segments.iter().map(|s| of(&s.filled)).sum();
        let (words, pages): (usize, usize) = (sum(Filled::words), sum(Filled::pages));
        (words * 21 / 20).checked_div(pages)
    }
}

impl KeyValueCache for Cache {
    fn held(&self) -> CacheBytes {
        let mut held = CacheBytes::default();
        for segment in &self.tokens {
            held.keys += segment.keys.as_ref().map_or(0, Buffer::size);
            held.values += segment.values.size();
        }
        if let Some(compressed) = &self.compressed {
            held.keys += compressed.originals.size() + compressed.carry.size();
            held.keys += compressed.thresholds.size();
            held.keys += compressed.segments.iter().map(|s| s.buffer.size()).sum::<u64>();
        }
        held
    }

    fn rows(&self) -> CacheRows {
        let kv_heads = self.shape.kv_heads;
        let row = |bytes: usize| (kv_heads * bytes) as u64;
        let scale = if self.value_store.quantised().is_some() { 4 } else { 0 };
        let mut rows = CacheRows {
            key: row(self.padded_dim() * self.policy.exact.bytes()),
            value: row(4 * self.value_store.row_words(self.shape.head_dim) + scale),
            ..CacheRows::default()
        };
        if let Some(compressed) = &self.compressed {
            let header = row(4 * compressed.layout.header_words());
            let deltas: usize = compressed.segments.iter().map(|s| s.filled.words()).sum();
            rows.pages = compressed.pages as u64;
            rows.page_bytes = rows.pages * header + 4 * deltas as u64;
        }
        rows
    }
}
