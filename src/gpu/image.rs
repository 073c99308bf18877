//! A cache read back to the host, cut, and restored.

use super::cache::{Cache, Compressed, PageSegment, TokenSegment, ValueStore};
use super::stream::Stream;
use crate::delta::{CacheImage, Page, Reference};
use crate::error::Result;

impl Stream {
    /// See [`crate::backend::Operations::truncate`].
    pub(super) fn truncate_cache(&mut self, cache: &mut Cache, length: usize) -> Result<()> {
        if length >= cache.length {
            return Ok(());
        }
        self.recorder.submit()?;
        self.usage.settle(&mut self.recorder)?;
        cache.length = length;
        let kv_heads = cache.shape.kv_heads;
        let segments = cache.tokens.len();
        cache.tokens.retain(|segment| segment.first == 0 || segment.first < length);
        let mut dropped = cache.tokens.len() < segments;
        if let Some(compressed) = &mut cache.compressed {
            let keep = length / compressed.layout.tokens;
            if keep < compressed.pages {
                let segments = compressed.segments.len();
                compressed.segments.retain(|segment| segment.first == 0 || segment.first < keep);
                dropped |= compressed.segments.len() < segments;
                compressed.pages = keep;
                self.recount(compressed, kv_heads)?;
                self.rewind_chain(compressed, kv_heads)?;
            }
        }
        if dropped {
            self.recorder.forget();
        }
        Ok(())
    }

    /// Counts what the last segment's remaining pages use of it.
    fn recount(&mut self, compressed: &Compressed, kv_heads: usize) -> Result<()> {
        let Some(segment) = compressed.segments.last() else {
            return Ok(());
        };
        let headers = self.headers(compressed, segment, kv_heads)?;
        let layout = &compressed.layout;
        let end = |header: &[u32]| match layout.delta() {
            // Pages of one dispatch lie in any order.
            Some(_) => {
                let (deltas, start) = (header[layout.total()], header[layout.total() + 2]);
                start + layout.delta_words(deltas as usize) as u32
            }
            None => 0,
        };
        let used = headers.chunks_exact(layout.header_words()).map(end).max().unwrap_or(0);
        segment.filled.set(compressed.pages - segment.first, used);
        self.device.write(&segment.buffer, 0, &used.to_le_bytes())
    }

    /// Sets a continuous chain back to where the last page ends.
    fn rewind_chain(&mut self, compressed: &Compressed, kv_heads: usize) -> Result<()> {
        let continuous =
            compressed.layout.delta().is_some_and(|d| d.reference == Reference::Continuous);
        let Some(segment) = compressed.segments.last().filter(|_| continuous) else {
            return Ok(());
        };
        if compressed.pages == 0 {
            return Ok(());
        }
        let mut last = Vec::new();
        for pages in self.segment_pages(compressed, segment, kv_heads)? {
            let Some(page) = pages.last() else { continue };
            let keys = page.reconstruct(&compressed.layout);
            last.extend_from_slice(&keys[keys.len() - compressed.layout.head_dim..]);
        }
        self.device.write(&compressed.carry, 0, bytemuck::cast_slice(&last))
    }

    /// The headers of a segment's pages, `[page][G]`.
    fn headers(
        &mut self,
        compressed: &Compressed,
        segment: &PageSegment,
        kv_heads: usize,
    ) -> Result<Vec<u32>> {
        let pages = compressed.pages.min(segment.first + segment.capacity) - segment.first;
        let words = pages * kv_heads * compressed.layout.header_words();
        Ok(bytemuck::pod_collect_to_vec(&self.read_at(&segment.buffer, 4, 4 * words)?))
    }

    /// The pages of a segment, `[G][pages]`.
    fn segment_pages(
        &mut self,
        compressed: &Compressed,
        segment: &PageSegment,
        kv_heads: usize,
    ) -> Result<Vec<Vec<Page>>> {
        let layout = &compressed.layout;
        let next = compressed.segments.iter().find(|other| other.first > segment.first);
        let end = next.map_or(compressed.pages, |next| next.first).min(compressed.pages);
        let headers = self.headers(compressed, segment, kv_heads)?;
        let used = self.read_at(&segment.buffer, 0, 4)?;
        let used: Vec<u32> = bytemuck::pod_collect_to_vec(&used);
        let bytes = 4 * used[0] as usize;
        let deltas = self.read_at(&segment.buffer, 4 * segment.deltas, bytes)?;
        let deltas: Vec<u32> = bytemuck::pod_collect_to_vec(&deltas);

        let mut pages = vec![Vec::new(); kv_heads];
        let headers = headers.chunks_exact(layout.header_words());
        for (index, header) in headers.take((end - segment.first) * kv_heads).enumerate() {
            let mut words = header.to_vec();
            if layout.delta().is_some() {
                let start = std::mem::take(&mut words[layout.total() + 2]) as usize;
                let count = layout.delta_words(words[layout.total()] as usize);
                let Some(own) = deltas.get(start..start + count) else {
                    return Err(self.fault("reading pages", "deltas lie outside of their segment"));
                };
                words.extend_from_slice(own);
            }
            pages[index % kv_heads].push(Page { words: words.into() });
        }
        Ok(pages)
    }

    /// See [`crate::backend::Operations::pages`].
    pub(super) fn read_pages(&mut self, cache: &Cache) -> Result<Vec<Vec<Page>>> {
        let kv_heads = cache.shape.kv_heads;
        let mut all = vec![Vec::new(); kv_heads];
        if let Some(compressed) = &cache.compressed {
            for segment in &compressed.segments {
                let pages = self.segment_pages(compressed, segment, kv_heads)?;
                for (all, pages) in all.iter_mut().zip(pages) {
                    all.extend(pages);
                }
            }
        }
        Ok(all)
    }

    /// See [`crate::backend::Operations::save`].
    pub(super) fn save_cache(&mut self, cache: &Cache, exact_from: usize) -> Result<CacheImage> {
        let pages = self.read_pages(cache)?;
        let kv_heads = cache.shape.kv_heads;
        let key_bytes = cache.shape.head_dim * cache.policy.exact.bytes();
        let mut exact = Vec::new();
        let slots = original_slots(cache, exact_from);
        match &cache.compressed {
            Some(compressed) => {
                let originals = &compressed.originals;
                let data = self.read_at(originals, 0, originals.size() as usize)?;
                let stride = cache.padded_dim() * cache.policy.exact.bytes();
                for kv_head in 0..kv_heads {
                    let head = &data[kv_head * (cache.sink() + cache.recent()) * stride..];
                    for &slot in &slots {
                        exact.extend_from_slice(&head[slot * stride..][..key_bytes]);
                    }
                }
            }
            None => {
                let mut rows = vec![Vec::new(); kv_heads];
                for segment in &cache.tokens {
                    if let Some(keys) = &segment.keys {
                        let stride = cache.padded_dim() * cache.policy.exact.bytes();
                        let data = self.read_at(keys, 0, kv_heads * segment.capacity * stride)?;
                        for (kv_head, rows) in rows.iter_mut().enumerate() {
                            let head = &data[kv_head * segment.capacity * stride..];
                            for row in head.chunks_exact(stride).take(live(cache, segment)) {
                                rows.extend_from_slice(&row[..key_bytes]);
                            }
                        }
                    }
                }
                for rows in rows {
                    exact.extend_from_slice(&rows[exact_from * key_bytes..]);
                }
            }
        }

        let row_bytes = cache.policy.value_row_bytes(cache.shape.head_dim);
        let mut values = vec![Vec::new(); kv_heads];
        for segment in &cache.tokens {
            let stride = 4 * cache.value_store.row_words(cache.shape.head_dim);
            let data = self.read_at(&segment.values, 0, segment.values.size() as usize)?;
            let (rows, scales) = data.split_at(kv_heads * segment.capacity * stride);
            let scale_bytes = scale_bytes(cache.value_store);
            for (kv_head, out) in values.iter_mut().enumerate() {
                for token in 0..live(cache, segment) {
                    let row = kv_head * segment.capacity + token;
                    out.extend_from_slice(&rows[row * stride..][..row_bytes - scale_bytes]);
                    if scale_bytes > 0 {
                        out.extend_from_slice(&scales[4 * row..][..scale_bytes]);
                    }
                }
            }
        }
        Ok(CacheImage { length: cache.length, pages, exact_from, exact, values: values.concat() })
    }

    /// See [`crate::backend::Operations::restore`].
    pub(super) fn restore_cache(&mut self, cache: &mut Cache, image: &CacheImage) -> Result<()> {
        self.recorder.submit()?;
        self.usage.settle(&mut self.recorder)?;
        cache.reserve(image.length)?;
        cache.length = image.length;
        let (kv_heads, context) = (cache.shape.kv_heads, cache.context);
        let key_bytes = cache.shape.head_dim * cache.policy.exact.bytes();
        let key_stride = cache.padded_dim() * cache.policy.exact.bytes();
        let slots = original_slots(cache, image.exact_from);
        if let Some(compressed) = &cache.compressed {
            let per_head = cache.sink() + compressed.recent;
            let mut data = vec![0; compressed.originals.size() as usize];
            let heads = image.exact.chunks_exact((slots.len() * key_bytes).max(1));
            for (kv_head, rows) in heads.enumerate().take(kv_heads) {
                for (row, &slot) in rows.chunks_exact(key_bytes).zip(&slots) {
                    let at = (kv_head * per_head + slot) * key_stride;
                    data[at..at + key_bytes].copy_from_slice(row);
                }
            }
            self.device.write(&compressed.originals, 0, &data)?;
        }
        let row_bytes = cache.policy.value_row_bytes(cache.shape.head_dim);
        let stride = 4 * cache.value_store.row_words(cache.shape.head_dim);
        let scale_bytes = scale_bytes(cache.value_store);
        for segment in &cache.tokens {
            let mut data = vec![0; segment.values.size() as usize];
            let (rows, scales) = data.split_at_mut(kv_heads * segment.capacity * stride);
            let mut keys = vec![0; kv_heads * segment.capacity * key_stride];
            for kv_head in 0..kv_heads {
                for token in 0..live(cache, segment) {
                    let from = kv_head * image.length + segment.first + token;
                    let (levels, scale) = image.values[from * row_bytes..][..row_bytes]
                        .split_at(row_bytes - scale_bytes);
                    let row = kv_head * segment.capacity + token;
                    rows[row * stride..][..levels.len()].copy_from_slice(levels);
                    if scale_bytes > 0 {
                        scales[4 * row..][..scale_bytes].copy_from_slice(scale);
                    }
                    if segment.keys.is_some() {
                        let key = &image.exact[from * key_bytes..][..key_bytes];
                        keys[row * key_stride..][..key_bytes].copy_from_slice(key);
                    }
                }
            }
            self.device.write(&segment.values, 0, &data)?;
            if let Some(buffer) = &segment.keys {
                self.device.write(buffer, 0, &keys)?;
            }
        }
        if let Some(compressed) = &mut cache.compressed {
            self.restore_pages(compressed, image, context)?;
            self.rewind_chain(compressed, kv_heads)?;
        }
        Ok(())
    }

    fn restore_pages(
        &mut self,
        compressed: &mut Compressed,
        image: &CacheImage,
        context: usize,
    ) -> Result<()> {
        let (layout, kv_heads) = (compressed.layout, image.pages.len());
        let pages = image.length / layout.tokens;
        while compressed.pages < pages {
            let wanted = pages - compressed.pages;
            let count = compressed.room(kv_heads, wanted);
            if count == 0 {
                let left = context / layout.tokens - compressed.pages;
                compressed.grow(&self.device, kv_heads, left)?;
                continue;
            }
            let Some(segment) = compressed.segments.last() else {
                return Err(self.fault("restoring pages", "there is no room"));
            };
            let mut used = segment.filled.words();
            let (begin, mut headers, mut deltas) = (used, Vec::new(), Vec::<u32>::new());
            for page in compressed.pages..compressed.pages + count {
                for pages in &image.pages {
                    let (header, own) = pages[page].words.split_at(layout.header_words());
                    headers.extend_from_slice(header);
                    if layout.delta().is_some() {
                        let last = headers.len() - 1;
                        headers[last] = used as u32;
                    }
                    deltas.extend_from_slice(own);
                    used += own.len();
                }
            }
            let header = (compressed.pages - segment.first) * kv_heads * layout.header_words();
            let buffer = &segment.buffer;
            let at = |word: usize| 4 * word as u64;
            self.device.write(buffer, at(1 + header), bytemuck::cast_slice(&headers))?;
            self.device.write(buffer, at(segment.deltas + begin), bytemuck::cast_slice(&deltas))?;
            self.device.write(buffer, 0, &(used as u32).to_le_bytes())?;
            compressed.pages += count;
            segment.filled.set(compressed.pages - segment.first, used as u32);
        }
        Ok(())
    }
}

/// Tokens in a segment.
fn live(cache: &Cache, segment: &TokenSegment) -> usize {
    cache.length.saturating_sub(segment.first).min(segment.capacity)
}

/// Bytes of a row's scale and minimum.
fn scale_bytes(values: ValueStore) -> usize {
    match values {
        ValueStore::F32 | ValueStore::F16 => 0,
        ValueStore::Int8 => 2,
        ValueStore::Int4 => 4,
    }
}

/// The slots of the original keys that an image has, in its order.
fn original_slots(cache: &Cache, exact_from: usize) -> Vec<usize> {
    let Some(compressed) = &cache.compressed else {
        return Vec::new();
    };
    let sink = cache.policy.sink;
    let slot = |position: usize| {
        if position < sink { position } else { sink + position % compressed.recent }
    };
    (0..sink.min(cache.length)).chain(exact_from..cache.length).map(slot).collect()
}
