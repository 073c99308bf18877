//! Keys and values of one layer.
//!
//! What one KV head reads lies together. Memory of fixed size is zeroed by the system when it is
//! first touched: it costs what has been written to it, and never more than what is reserved.
//! What has no useful bound, pages and quantised values, grows in pieces that never move.

use std::sync::Arc;

use half::f16;

use super::values::Quantised;
use crate::backend::{
    AttentionShape, CacheBytes, CacheFormat, CacheRows, CacheShape, KeyValueCache,
};
use crate::delta::{AttentionPolicy, CacheImage, Page, PageLayout, Reference, ValueFormat};
use crate::error::Result;

/// Keys and values of one layer.
pub struct Cache {
    pub(super) shape: AttentionShape,
    pub(super) context: usize,
    pub(super) policy: AttentionPolicy,
    /// Tokens in it.
    pub(super) length: usize,
    pub(super) keys: Keys,
    pub(super) values: Values,
}

pub(super) enum Keys {
    /// `[G, context, D]`.
    Plain(Store),
    Compressed(Compressed),
}

/// Pages, and the original keys that are still needed.
pub(super) struct Compressed {
    pub(super) layout: PageLayout,
    /// Of each KV head, in place of the layout's.
    pub(super) thresholds: Option<Arc<[f32]>>,
    /// The first keys of the text, `[G, sinks, D]`.
    sink: Store,
    sinks: usize,
    /// The last keys of the text, `[G, slots, D]`: key `n` in slot `n % slots`.
    recent: Store,
    slots: usize,
    /// `[G]`, each of the full pages.
    pub(super) pages: Vec<Vec<Page>>,
    /// For a chain through the whole text, the last key that each head's pages stand for, `[D]`;
    /// meaningless before the first page.
    pub(super) ends: Vec<Vec<f32>>,
}

pub(super) enum Values {
    /// `[G, context, D]`.
    Plain(Store),
    Quantised(Quantised),
}

/// Rows of floats `[N, D]`.
pub(super) enum Store {
    F32(Vec<f32>),
    /// Bits of `f16`.
    F16(Vec<u16>),
}

/// Rows of one head that are being written.
pub(super) enum StoreMut<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [u16]),
}

/// Where a step's keys or values of one head go.
pub(super) enum Place<'a> {
    /// The row of position `n` to slot `n % slots`, of positions below `end`.
    Rows { rows: StoreMut<'a>, slots: usize, end: usize },
    /// Each row to its bytes.
    Quantised(ValueFormat, Vec<&'a mut [u8]>),
}

impl Store {
    fn new(len: usize, format: CacheFormat) -> Self {
        match format {
            CacheFormat::F32 => Self::F32(vec![0.0; len]),
            CacheFormat::F16 => Self::F16(vec![0; len]),
        }
    }

    /// All of it as bytes; little-endian, as the machine is.
    fn bytes(&self) -> &[u8] {
        match self {
            Self::F32(all) => bytemuck::cast_slice(all),
            Self::F16(all) => bytemuck::cast_slice(all),
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::F32(all) => bytemuck::cast_slice_mut(all),
            Self::F16(all) => bytemuck::cast_slice_mut(all),
        }
    }

    fn held(&self) -> u64 {
        self.bytes().len() as u64
    }

    /// Adds the places of all heads to `places`, of `slots` rows `[head_dim]` each, for positions
    /// below `end`; the first head is counted as `first`.
    fn places<'a>(
        &'a mut self,
        slots: usize,
        head_dim: usize,
        end: usize,
        first: usize,
        places: &mut Vec<(usize, Place<'a>)>,
    ) {
        let len = (slots * head_dim).max(1);
        let mut add = |head, rows| places.push((first + head, Place::Rows { rows, slots, end }));
        match self {
            Self::F32(all) => {
                let heads = all.chunks_exact_mut(len).map(StoreMut::F32).enumerate();
                heads.for_each(|(head, rows)| add(head, rows));
            }
            Self::F16(all) => {
                let heads = all.chunks_exact_mut(len).map(StoreMut::F16).enumerate();
                heads.for_each(|(head, rows)| add(head, rows));
            }
        }
    }
}

impl Compressed {
    fn new(shape: &CacheShape, layout: PageLayout) -> Self {
        let AttentionShape { kv_heads, head_dim, .. } = shape.attention;
        let CacheShape { context, rows, policy, thresholds, .. } = shape;
        let (sinks, slots) = (policy.sink.min(*context), policy.recent_slots(*context, *rows));
        let store = |rows| Store::new(kv_heads * rows * head_dim, policy.exact);
        let (sink, recent) = (store(sinks), store(slots));
        let pages = (0..kv_heads).map(|_| Vec::new()).collect();
        let ends = match layout.delta().map(|delta| delta.reference) {
            Some(Reference::Continuous) => vec![vec![0.0; head_dim]; kv_heads],
            _ => vec![Vec::new(); kv_heads],
        };
        let thresholds = thresholds.clone();
        Self { layout, thresholds, sink, sinks, recent, slots, pages, ends }
    }

    /// Where original key `n` lies, which must be one of the sink or not yet overwritten: a store
    /// and a row in it. Up to `count` keys from there on are neighbours.
    pub(super) fn original(&self, head: usize, n: usize) -> (&Store, usize, usize) {
        if n < self.sinks {
            (&self.sink, head * self.sinks + n, self.sinks - n)
        } else {
            let slot = n % self.slots;
            (&self.recent, head * self.slots + slot, self.slots - slot)
        }
    }

    /// The original keys of a page, `[C, D]`, which must not be overwritten yet.
    pub(super) fn page_keys(&self, head: usize, page: usize) -> Vec<f32> {
        let PageLayout { tokens, head_dim, .. } = self.layout;
        let mut keys = Vec::with_capacity(tokens * head_dim);
        let (mut n, end) = (page * tokens, (page + 1) * tokens);
        while n < end {
            let (store, row, neighbours) = self.original(head, n);
            let count = neighbours.min(end - n);
            let range = row * head_dim..(row + count) * head_dim;
            match store {
                Store::F32(all) => keys.extend_from_slice(&all[range]),
                Store::F16(all) => {
                    keys.extend(all[range].iter().map(|&bits| f16::from_bits(bits).to_f32()));
                }
            }
            n += count;
        }
        keys
    }

    /// Drops pages beyond the first `count` of each head.
    fn truncate(&mut self, count: usize) {
        for (pages, end) in self.pages.iter_mut().zip(&mut self.ends) {
            if pages.len() > count {
                pages.truncate(count);
                pages.shrink_to(2 * count);
                find_end(&self.layout, pages, end);
            }
        }
    }

    fn held(&self) -> u64 {
        let pages = self.pages.iter().map(|pages| {
            let list = (pages.capacity() * size_of::<Page>()) as u64;
            list + pages.iter().map(Page::bytes).sum::<u64>()
        });
        let ends = self.ends.iter().map(|end| size_of_val(&end[..]) as u64);
        self.sink.held() + self.recent.held() + pages.sum::<u64>() + ends.sum::<u64>()
    }
}

/// Finds the last key that `pages` stand for, if there is a place for it.
pub(super) fn find_end(layout: &PageLayout, pages: &[Page], end: &mut [f32]) {
    if let (false, Some(page)) = (end.is_empty(), pages.last()) {
        let keys = page.reconstruct(layout);
        end.copy_from_slice(&keys[keys.len() - end.len()..]);
    }
}

impl Cache {
    pub(super) fn new(shape: &CacheShape) -> Result<Self> {
        let CacheShape { attention, context, policy, .. } = *shape;
        let plain = || Store::new(attention.kv_heads * context * attention.head_dim, policy.exact);
        let keys = match PageLayout::new(&policy, attention.head_dim)? {
            None => Keys::Plain(plain()),
            Some(layout) => Keys::Compressed(Compressed::new(shape, layout)),
        };
        let values = match policy.values {
            ValueFormat::Plain => Values::Plain(plain()),
            _ => Values::Quantised(Quantised::new(shape)),
        };
        Ok(Self { shape: attention, context, policy, length: 0, keys, values })
    }

    /// Takes note of `rows` more tokens at `position`, and gives the places of their keys and
    /// values, each with the head that goes there: keys first, then values, `0..2 G`.
    pub(super) fn append(&mut self, position: usize, rows: usize) -> Vec<(usize, Place<'_>)> {
        let AttentionShape { kv_heads, head_dim, .. } = self.shape;
        assert!(position + rows <= self.context, "context");
        self.length = position + rows;
        let mut places = Vec::with_capacity(3 * kv_heads);
        match &mut self.keys {
            Keys::Plain(store) => {
                store.places(self.context, head_dim, usize::MAX, 0, &mut places);
            }
            Keys::Compressed(Compressed { sink, sinks, recent, slots, .. }) => {
                recent.places(*slots, head_dim, usize::MAX, 0, &mut places);
                if position < *sinks {
                    sink.places(*sinks, head_dim, *sinks, 0, &mut places);
                }
            }
        }
        match &mut self.values {
            Values::Plain(store) => {
                store.places(self.context, head_dim, usize::MAX, kv_heads, &mut places);
            }
            Values::Quantised(values) => {
                let format = values.format;
                let heads = values.append(position, rows).into_iter().enumerate();
                let place = |(head, rows)| (kv_heads + head, Place::Quantised(format, rows));
                places.extend(heads.map(place));
            }
        }
        places
    }

    pub(super) fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        if let Keys::Compressed(keys) = &mut self.keys {
            keys.truncate(self.length / keys.layout.tokens);
        }
        if let Values::Quantised(values) = &mut self.values {
            values.truncate(self.length);
        }
    }

    pub(super) fn pages(&self) -> Vec<Vec<Page>> {
        match &self.keys {
            Keys::Plain(_) => vec![Vec::new(); self.shape.kv_heads],
            Keys::Compressed(keys) => keys.pages.clone(),
        }
    }

    /// The positions of a head's rows in [`CacheImage::exact`].
    fn exact_rows(&self, exact_from: usize) -> impl Iterator<Item = usize> + use<> {
        let sinks = match &self.keys {
            Keys::Plain(_) => 0,
            Keys::Compressed(keys) => keys.sinks.min(self.length),
        };
        (0..sinks).chain(exact_from..self.length)
    }

    pub(super) fn save(&self, exact_from: usize) -> CacheImage {
        let AttentionShape { kv_heads, head_dim, .. } = self.shape;
        let row = head_dim * self.policy.exact.bytes();
        let mut exact = Vec::new();
        let mut values = Vec::new();
        for head in 0..kv_heads {
            for n in self.exact_rows(exact_from) {
                let (store, at) = match &self.keys {
                    Keys::Plain(store) => (store, head * self.context + n),
                    Keys::Compressed(keys) => {
                        let (store, at, _) = keys.original(head, n);
                        (store, at)
                    }
                };
                exact.extend_from_slice(&store.bytes()[at * row..][..row]);
            }
            match &self.values {
                Values::Plain(store) => {
                    let rows = head * self.context..head * self.context + self.length;
                    values.extend_from_slice(&store.bytes()[rows.start * row..rows.end * row]);
                }
                Values::Quantised(all) => {
                    (0..self.length).for_each(|n| values.extend_from_slice(all.row(head, n)));
                }
            }
        }
        CacheImage { length: self.length, pages: self.pages(), exact_from, exact, values }
    }

    pub(super) fn restore(&mut self, image: &CacheImage) {
        let AttentionShape { kv_heads, head_dim, .. } = self.shape;
        let row = head_dim * self.policy.exact.bytes();
        assert!(image.length <= self.context, "context");
        self.length = image.length;
        let mut exact = image.exact.chunks_exact(row);
        for head in 0..kv_heads {
            let sinks = match &self.keys {
                Keys::Plain(_) => 0,
                Keys::Compressed(keys) => keys.sinks.min(image.length),
            };
            for (index, n) in self.exact_rows(image.exact_from).enumerate() {
                let bytes = exact.next().expect("the image has been checked");
                let (store, at) = match &mut self.keys {
                    Keys::Plain(store) => (store, head * self.context + n),
                    Keys::Compressed(keys) if index < sinks => {
                        (&mut keys.sink, head * keys.sinks + n)
                    }
                    Keys::Compressed(keys) => {
                        (&mut keys.recent, head * keys.slots + n % keys.slots)
                    }
                };
                store.bytes_mut()[at * row..][..row].copy_from_slice(bytes);
            }
        }
        if let Keys::Compressed(keys) = &mut self.keys {
            keys.pages.clone_from(&image.pages);
            for (pages, end) in keys.pages.iter().zip(&mut keys.ends) {
                find_end(&keys.layout, pages, end);
            }
        }
        let row = self.policy.value_row_bytes(head_dim);
        let heads = image.values.chunks_exact((image.length * row).max(1)).enumerate();
        match &mut self.values {
            Values::Plain(store) => {
                for (head, bytes) in heads {
                    let at = head * self.context * row;
                    store.bytes_mut()[at..][..bytes.len()].copy_from_slice(bytes);
                }
            }
            Values::Quantised(values) => {
                for ((_, bytes), places) in heads.zip(values.append(0, image.length)) {
                    for (bytes, place) in bytes.chunks_exact(row).zip(places) {
                        place.copy_from_slice(bytes);
                    }
                }
            }
        }
    }
}

impl KeyValueCache for Cache {
    fn held(&self) -> CacheBytes {
        CacheBytes {
            keys: match &self.keys {
                Keys::Plain(store) => store.held(),
                Keys::Compressed(keys) => keys.held(),
            },
            values: match &self.values {
                Values::Plain(store) => store.held(),
                Values::Quantised(values) => values.held(),
            },
        }
    }

    fn rows(&self) -> CacheRows {
        let AttentionShape { kv_heads, head_dim, .. } = self.shape;
        let row = |bytes: usize| (kv_heads * bytes) as u64;
        let pages = match &self.keys {
            Keys::Plain(_) => &[][..],
            Keys::Compressed(keys) => &keys.pages,
        };
        CacheRows {
            key: row(head_dim * self.policy.exact.bytes()),
            value: row(self.policy.value_row_bytes(head_dim)),
            pages: pages.first().map_or(0, |pages| pages.len() as u64),
            page_bytes: pages.iter().flatten().map(Page::bytes).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cpu, Kernels, Rope, Stream, Tensor};
    use super::*;
    use crate::backend::{Backend, Input, Operations, Step, StreamShape, TensorFormat};
    use crate::delta::{Phase, decode_value, encode_page, encode_value};
    use crate::sampler::Draws;

    /// One layer over a text whose keys and values are known.
    struct Layer {
        shape: CacheShape,
        stream: Stream,
        rope: Rope,
        cache: Cache,
        qkv: Tensor,
        out: Tensor,
        length: usize,
        /// `[context, (H + 2 G) D]`.
        text: Vec<f32>,
    }

    impl Layer {
        fn new(cpu: &Cpu, shape: CacheShape, seed: u64) -> Self {
            let CacheShape { attention, context, rows, .. } = shape;
            let head_dim = attention.head_dim;
            let stream = StreamShape { rows, context, attention, vocabulary: 32 };
            // Keys stay as they are.
            let table = vec![[1.0, 0.0]; context * head_dim / 2];
            let mut draws = Draws::new(seed);
            // Keys that drift, about a mean that differs from channel to channel.
            let width = attention.qkv_width();
            let mut now: Vec<f32> = (0..width).map(|c| (c % 5) as f32 - 2.0).collect();
            let mut text = Vec::new();
            for _ in 0..context {
                now.iter_mut().for_each(|x| *x += 0.6 * (draws.draw() - 0.5));
                text.extend(now.iter().map(|&x| f16::from_f32(x).to_f32()));
            }
            let cache = cpu.cache(&shape).expect("a cache");
            Self {
                shape,
                stream: cpu.stream(&stream).expect("a stream"),
                rope: cpu.rope(&table, head_dim).expect("a table"),
                cache,
                qkv: cpu.tensor(rows, width, TensorFormat::F32).expect("a tensor"),
                out: cpu.tensor(rows, attention.width(), TensorFormat::F32).expect("a tensor"),
                length: 0,
                text,
            }
        }

        /// Appends the next `rows` tokens of the text and gives their attention.
        fn step(&mut self, cpu: &Cpu, rows: usize, phase: Phase) -> Vec<f32> {
            let (position, width) = (self.length, self.shape.attention.qkv_width());
            let chunk = &self.text[position * width..(position + rows) * width];
            cpu.write(&mut self.qkv, chunk).expect("written");
            let tokens = vec![0; rows];
            let Self { stream, rope, cache, qkv, out, .. } = self;
            stream.begin(&Step { input: Input::Tokens(&tokens), position, phase }).expect("begun");
            stream.rope_append(qkv, rope, cache).expect("appended");
            stream.encode_keys(cache).expect("encoded");
            stream.attention(qkv, cache, out).expect("attended");
            self.length += rows;
            stream.read(out).expect("read")
        }

        /// Key (`part` 0) or value (1) of a head.
        fn row(&self, part: usize, head: usize, n: usize) -> &[f32] {
            let AttentionShape { heads, kv_heads, head_dim } = self.shape.attention;
            let column = heads + part * kv_heads + head;
            &self.text[n * self.shape.attention.qkv_width()..][column * head_dim..][..head_dim]
        }

        /// The pages of a head, from the keys.
        fn pages(&self, head: usize) -> Vec<Page> {
            let Some(layout) = PageLayout::new(&self.shape.policy, self.shape.attention.head_dim)
                .expect("a layout")
            else {
                return Vec::new();
            };
            let mut pages: Vec<Page> = Vec::new();
            let mut end: Option<Vec<f32>> = None;
            for page in 0..self.length / layout.tokens {
                let tokens = page * layout.tokens..(page + 1) * layout.tokens;
                let keys: Vec<f32> = tokens.flat_map(|n| self.row(0, head, n)).copied().collect();
                let page = encode_page(&layout, &keys, end.as_deref());
                end =
                    page.reconstruct(&layout).chunks_exact(layout.head_dim).last().map(Into::into);
                pages.push(page);
            }
            pages
        }

        /// Attention of the last `rows` tokens in f64, `[rows, H D]`.
        fn naive(&self, rows: usize, phase: Phase) -> Vec<f64> {
            let CacheShape { attention, policy, .. } = self.shape.clone();
            let AttentionShape { heads, kv_heads, head_dim } = attention;
            let rule = policy.rule(phase);
            let layout = PageLayout::new(&policy, head_dim).expect("a layout");
            let mut out = vec![0.0; rows * heads * head_dim];
            for head in 0..kv_heads {
                let pages = self.pages(head);
                let stands_for = |page: &Page| page.reconstruct(&layout.expect("pages"));
                let far: Vec<f32> = pages.iter().flat_map(stands_for).collect();
                let value = |n| {
                    let (mut bytes, mut row) = (Vec::new(), vec![0.0; head_dim]);
                    encode_value(policy.values, policy.exact, self.row(1, head, n), &mut bytes);
                    decode_value(policy.values, policy.exact, &bytes, &mut row);
                    row
                };
                let values: Vec<Vec<f32>> = (0..self.length).map(value).collect();
                for (row, q) in (0..rows).flat_map(|row| {
                    let group = heads / kv_heads;
                    (head * group..(head + 1) * group).map(move |q| (row, q))
                }) {
                    let position = self.length - rows + row;
                    let start = position * attention.qkv_width() + q * head_dim;
                    let query = &self.text[start..start + head_dim];
                    let score = |n: usize| {
                        let key = match rule.is_exact(position, n) {
                            true => self.row(0, head, n),
                            false => &far[n * head_dim..][..head_dim],
                        };
                        let products =
                            query.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k));
                        products.sum::<f64>() / (head_dim as f64).sqrt()
                    };
                    let scores: Vec<f64> = (0..=position).map(score).collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                    let out = &mut out[(row * heads + q) * head_dim..][..head_dim];
                    for (s, values) in scores.iter().zip(&values) {
                        let weight = (s - max).exp() / total;
                        out.iter_mut().zip(values).for_each(|(o, &v)| *o += weight * f64::from(v));
                    }
                }
            }
            out
        }

        fn check(&mut self, cpu: &Cpu, rows: usize, phase: Phase, case: &str) {
            let found = self.step(cpu, rows, phase);
            let want = self.naive(rows, phase);
            for (i, (found, want)) in found.iter().zip(&want).enumerate() {
                let error = (f64::from(*found) - want).abs();
                let (device, length) = (&cpu.device().driver, self.length);
                assert!(error < 3e-5, "{case}, {device}, {length}: {found} for {want} at {i}");
            }
        }
    }

    const POLICIES: [&str; 11] = [
        "keys=plain values=int8",
        "keys=int8 values=int4",
        "keys=channel4 sink=0",
        "keys=channel2 values=int8 exact=f32",
        "delta",
        "delta theta=0.4 deltas=int4 sink=40 values=int4",
        "delta theta=0.3 deltas=f16 sink=0",
        "paper theta=0.4 sink=3",
        "paper theta=0.2 deltas=int8 sink=20",
        "paper theta=0.5 deltas=int4 exact=f32 shape=sliding",
        "delta theta=0.3 reference=anchored deltas=f16 shape=block alpha=0.3",
    ];

    fn shapes() -> impl Iterator<Item = AttentionShape> {
        [(1, 1, 2), (4, 1, 80), (10, 2, 128), (2, 2, 256)]
            .into_iter()
            .map(|(heads, kv_heads, head_dim)| AttentionShape { heads, kv_heads, head_dim })
    }

    #[test]
    fn attention_over_pages_is_attention_over_what_they_stand_for() {
        for kernels in Kernels::available() {
            for threads in [1, 3] {
                let cpu = Cpu::with_kernels(Some(threads), kernels).expect("available");
                for (index, attention) in shapes().enumerate() {
                    for (policy, page) in POLICIES.into_iter().zip([16, 64, 32].into_iter().cycle())
                    {
                        let text = match policy.starts_with("keys=plain") {
                            true => policy.to_owned(),
                            false => format!("{policy} page={page} window=20"),
                        };
                        let policy: AttentionPolicy = text.parse().expect(&text);
                        let shape = CacheShape {
                            attention,
                            context: 601,
                            rows: 64,
                            policy,
                            thresholds: None,
                        };
                        let mut layer = Layer::new(&cpu, shape, index as u64);
                        let case = format!("{text} {attention:?}");
                        let prompt = Phase::Prefill { length: 500 };
                        for rows in [1, 37] {
                            layer.check(&cpu, rows, prompt, &case);
                        }
                        // The ring comes round.
                        for _ in 0..7 {
                            layer.step(&cpu, 64, prompt);
                        }
                        layer.check(&cpu, 14, prompt, &case);
                        layer.check(&cpu, 1, Phase::Decode, &case);
                        layer.step(&cpu, 26, Phase::Decode);
                        layer.check(&cpu, 3, Phase::Decode, &case);
                        for head in 0..attention.kv_heads {
                            assert_eq!(layer.cache.pages()[head], layer.pages(head), "{case}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn without_a_threshold_it_is_dense_attention() {
        let cpu = Cpu::new(Some(2)).expect("threads");
        for attention in shapes() {
            let run = |text: &str| {
                let policy: AttentionPolicy = text.parse().expect(text);
                let shape =
                    CacheShape { attention, context: 300, rows: 100, policy, thresholds: None };
                let mut layer = Layer::new(&cpu, shape, 9);
                let mut out = layer.step(&cpu, 100, Phase::Prefill { length: 190 });
                out.extend(layer.step(&cpu, 90, Phase::Prefill { length: 190 }));
                (0..30).for_each(|_| out.extend(layer.step(&cpu, 1, Phase::Decode)));
                out
            };
            let dense = run("dense");
            for reference in ["continuous", "anchored", "mean"] {
                let text =
                    format!("delta theta=0 deltas=f16 reference={reference} page=16 window=1");
                for (found, dense) in run(&text).iter().zip(&dense) {
                    // Keys are within a rounding to f16.
                    assert!((found - dense).abs() < 0.02, "{text}: {found} for {dense}");
                }
            }
        }
    }

    #[test]
    fn what_is_saved_goes_on_as_if_nothing_had_happened() {
        let cpu = Cpu::new(Some(2)).expect("threads");
        for (attention, text) in shapes().flat_map(|shape| POLICIES.map(|text| (shape, text))) {
            let policy: AttentionPolicy = text.parse().expect(text);
            let policy = AttentionPolicy { page: 32, window: 40, ..policy };
            let shape = CacheShape { attention, context: 500, rows: 60, policy, thresholds: None };
            let mut layer = Layer::new(&cpu, shape.clone(), 3);
            let prompt = Phase::Prefill { length: 300 };
            (0..5).for_each(|_| drop(layer.step(&cpu, 60, prompt)));
            let slots = policy.recent_slots(500, 60);
            let exact_from = if policy.is_dense() { 0 } else { 300usize.saturating_sub(slots) };
            // Cut back to within a page, and continued.
            layer.stream.truncate(&mut layer.cache, 290).expect("cut");
            layer.length = 290;
            let image = layer.stream.save(&layer.cache, exact_from).expect("saved");
            assert_eq!(image.length, 290);
            assert_eq!(
                image.values.len(),
                290 * attention.kv_heads * policy.value_row_bytes(attention.head_dim)
            );
            let mut other = Layer::new(&cpu, shape, 3);
            other.stream.restore(&mut other.cache, &image).expect("restored");
            other.length = 290;
            for rows in [1, 60, 3] {
                let phase = Phase::Decode;
                assert_eq!(other.step(&cpu, rows, phase), layer.step(&cpu, rows, phase), "{text}");
            }
            let pages: Vec<_> = (0..attention.kv_heads).map(|head| layer.pages(head)).collect();
            assert_eq!(layer.cache.pages(), pages, "{text}");
            assert_eq!(other.cache.pages(), pages, "{text}");
        }
    }

    #[test]
    fn what_is_held_is_what_was_made() {
        let cpu = Cpu::new(Some(1)).expect("threads");
        let attention = AttentionShape { heads: 4, kv_heads: 2, head_dim: 64 };
        let policy: AttentionPolicy = "delta values=int4".parse().expect("a policy");
        let (context, rows) = (100_000, 64);
        let shape = CacheShape { attention, context, rows, policy, thresholds: None };
        let mut layer = Layer::new(&cpu, CacheShape { context: 2000, ..shape.clone() }, 1);
        layer.cache = cpu.cache(&shape).expect("a cache");
        let empty = layer.cache.held();
        assert_eq!(empty.values, 0);
        (0..20).for_each(|_| drop(layer.step(&cpu, 64, Phase::Prefill { length: 1280 })));
        let held = layer.cache.held();
        let pages: u64 = layer.cache.pages().iter().flatten().map(Page::bytes).sum();
        assert!((pages..pages + 8192).contains(&(held.keys - empty.keys)), "{held:?} for {pages}");
        // 1280 tokens in pieces of 256.
        assert!((0..512).contains(&(held.values - 2 * 1280 * (32 + 4))), "{held:?}");
    }
}
