//! Decode attention over dense, quantised and delta caches, side by side: bytes held, bytes read
//! for a token, error, and the time of one token's attention in all layers.
//!
//! `cargo bench --bench attention -- [--device cpu|gpu] [--tokens 1024,4096,16384,32768]
//!  [--model bitnet-2b,llama-1b] [--megabytes 256] [--seconds 0.5]`
//!
//! Keys are made up: each channel drifts around a mean of its own, so that a delta page keeps
//! whatever share of its deltas the threshold asks for. That is all that time and bytes depend on;
//! the errors of real keys are the business of `deltallm inspect --prompt`.
//!
//! Each policy runs in turn with dense f16 attention, and the ratio is that of their medians: a
//! noisy machine is noisy for both. Layers are repeated up to `--megabytes` of dense cache, so that
//! no cache of the processor holds them, up to the model's own number.

mod reading;

use std::time::Instant;

use deltallm::backend::{
    AttentionShape, Backend, CacheBytes, CacheShape, Input, KeyValueCache, Operations, Step,
    StreamShape, TensorFormat,
};
use deltallm::cpu::Cpu;
use deltallm::delta::{
    AttentionPolicy, CacheImage, KeyFormat, Page, PageLayout, Phase, Threshold, encode_page,
    encode_value,
};
use deltallm::gpu::{Gpu, GpuOptions, Select};
use deltallm::sampler::Draws;

/// Tokens after which the made-up text repeats itself; a multiple of every page.
const PERIOD: usize = 1024;

/// What stands against dense f16, which comes first.
const POLICIES: [&str; 8] = [
    "dense",
    "keys=int8",
    "keys=channel4",
    "keys=channel2",
    "delta reference=mean deltas=f16",
    "delta reference=mean deltas=int8",
    "delta reference=mean deltas=int4",
    "delta reference=continuous deltas=int8",
];

/// Shares of zeros that delta pages are made to have.
const ZEROS: [f64; 4] = [0.0, 0.4, 0.6, 0.8];

struct Options {
    device: String,
    tokens: Vec<usize>,
    models: Vec<String>,
    megabytes: usize,
    seconds: f64,
}

impl Options {
    fn parse() -> Self {
        let mut options = Self {
            device: "cpu,gpu".into(),
            tokens: vec![1024, 4096, 16384, 32768],
            models: vec!["bitnet-2b".into(), "llama-1b".into()],
            megabytes: 256,
            seconds: 0.5,
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().unwrap_or_else(|| panic!("{word} needs a value"));
            match word.as_str() {
                "--bench" => {}
                "--device" => options.device = value(),
                "--tokens" => {
                    let numbers = value();
                    options.tokens =
                        numbers.split(',').map(|n| n.parse().expect("a number")).collect();
                }
                "--model" => options.models = value().split(',').map(str::to_owned).collect(),
                "--megabytes" => options.megabytes = value().parse().expect("a number"),
                "--seconds" => options.seconds = value().parse().expect("a number"),
                other => panic!("{other}: there is no such option; see benches/attention.rs"),
            }
        }
        options
    }
}

/// A model as far as attention sees it.
struct Shape {
    name: &'static str,
    attention: AttentionShape,
    layers: usize,
}

const SHAPES: [Shape; 2] = [
    Shape {
        name: "bitnet-2b",
        attention: AttentionShape { heads: 20, kv_heads: 5, head_dim: 128 },
        layers: 30,
    },
    Shape {
        name: "llama-1b",
        attention: AttentionShape { heads: 32, kv_heads: 8, head_dim: 64 },
        layers: 16,
    },
];

/// Keys or values of one KV head over a period, `[PERIOD, D]`: channels that drift around a mean.
fn drifting(head_dim: usize, seed: u64) -> Vec<f32> {
    let mut draws = Draws::new(seed);
    let mut normal = || (0..12).map(|_| draws.draw()).sum::<f32>() - 6.0;
    let means: Vec<f32> = (0..head_dim).map(|_| 2.0 * normal()).collect();
    let mut state = vec![0.0; head_dim];
    let mut rows = Vec::with_capacity(PERIOD * head_dim);
    for _ in 0..PERIOD {
        for (mean, state) in means.iter().zip(&mut state) {
            *state = 0.8 * *state + 0.6 * normal();
            rows.push(half::f16::from_f32(mean + *state).to_f32());
        }
    }
    rows
}

/// The pages of a period of one KV head.
fn pages(layout: &PageLayout, keys: &[f32]) -> Vec<Page> {
    let mut previous: Option<Vec<f32>> = None;
    let rows = keys.chunks_exact(layout.tokens * layout.head_dim);
    rows.map(|keys| {
        let page = encode_page(layout, keys, previous.as_deref());
        let found = page.reconstruct(layout);
        previous = Some(found[found.len() - layout.head_dim..].to_vec());
        page
    })
    .collect()
}

/// The share of deltas that is not kept.
fn zeros(layout: &PageLayout, pages: &[Page]) -> f64 {
    let kept: usize = pages.iter().map(|page| page.deltas(layout)).sum();
    1.0 - kept as f64 / (pages.len() * layout.tokens * layout.head_dim) as f64
}

/// Sets the threshold at which pages have this share of zeros.
fn with_zeros(
    policy: AttentionPolicy,
    keys: &[f32],
    head_dim: usize,
    share: f64,
) -> AttentionPolicy {
    let at = |theta: f32| match policy.keys {
        KeyFormat::Delta(delta) => {
            let keys = KeyFormat::Delta(deltallm::delta::DeltaKeys {
                threshold: Threshold::Absolute(theta),
                ..delta
            });
            AttentionPolicy { keys, ..policy }
        }
        _ => policy,
    };
    let (mut low, mut high) = (0.0, 10.0);
    if share > 0.0 {
        for _ in 0..20 {
            let middle = 0.5 * (low + high);
            let layout = layout(&at(middle), head_dim).expect("a delta policy");
            let part = &keys[..PERIOD / 4 * head_dim];
            if zeros(&layout, &pages(&layout, part)) < share {
                low = middle;
            } else {
                high = middle;
            }
        }
    }
    at(low)
}

fn layout(policy: &AttentionPolicy, head_dim: usize) -> Option<PageLayout> {
    PageLayout::new(policy, head_dim).expect("pages of usual sizes")
}

/// What one layer's cache holds, and what a token reads of it.
struct Content {
    image: CacheImage,
    zeros: Option<f64>,
    /// Bits of a compressed key element.
    key_bits: f64,
    key_bytes_read: usize,
    value_bytes_read: usize,
}

fn content(policy: &AttentionPolicy, at: &AttentionShape, tokens: usize) -> Content {
    let AttentionShape { kv_heads, head_dim, .. } = *at;
    let start = policy.rule(Phase::Decode).start(tokens - 1);
    // As many original keys as a window can need.
    let exact_from = if policy.is_dense() { 0 } else { start };
    let layout = layout(policy, head_dim);
    let mut image = CacheImage {
        length: tokens,
        pages: Vec::new(),
        exact_from,
        exact: Vec::new(),
        values: Vec::new(),
    };
    let (mut kept, mut key_bits, mut key_bytes_read) = (Vec::new(), 0.0, 0);
    let plain = deltallm::delta::ValueFormat::Plain;
    for kv_head in 0..kv_heads {
        let keys = drifting(head_dim, kv_head as u64);
        let values = drifting(head_dim, 1000 + kv_head as u64);
        let row = |rows: &[f32], n: usize| rows[n % PERIOD * head_dim..][..head_dim].to_vec();
        let mut all = Vec::new();
        if let Some(layout) = &layout {
            let period = pages(layout, &keys);
            if layout.delta().is_some() {
                kept.push(zeros(layout, &period));
            }
            all = (0..tokens / layout.tokens).map(|p| period[p % period.len()].clone()).collect();
            let read = start / layout.tokens;
            let bytes: u64 = all[..read].iter().map(Page::bytes).sum();
            key_bytes_read += bytes as usize;
            key_bits += 8.0 * bytes as f64 / (read * layout.tokens * head_dim) as f64;
        }
        image.pages.push(all);
        let sink = if policy.is_dense() { 0 } else { policy.sink };
        for n in (0..sink).chain(exact_from..tokens) {
            encode_value(plain, policy.exact, &row(&keys, n), &mut image.exact);
        }
        for n in 0..tokens {
            encode_value(policy.values, policy.exact, &row(&values, n), &mut image.values);
        }
    }
    if layout.is_none() {
        image.pages.clear();
        key_bits = 8.0 * policy.exact.bytes() as f64 * kv_heads as f64;
    }
    key_bytes_read += image.exact.len();
    Content {
        zeros: (!kept.is_empty()).then(|| kept.iter().sum::<f64>() / kept.len() as f64),
        key_bits: key_bits / kv_heads as f64,
        key_bytes_read,
        value_bytes_read: image.values.len(),
        image,
    }
}

/// A step of one token after a filled cache, in all layers.
struct Run<B: Backend> {
    stream: B::Stream,
    caches: Vec<B::Cache>,
    qkv: B::Tensor,
    out: B::Tensor,
    tokens: usize,
}

impl<B: Backend> Run<B> {
    fn new(
        backend: &B,
        at: AttentionShape,
        layers: usize,
        policy: AttentionPolicy,
        image: &CacheImage,
    ) -> Self {
        let (tokens, rows) = (image.length, 256);
        let shape = StreamShape { rows, context: tokens, attention: at, vocabulary: 32 };
        let mut stream = backend.stream(&shape).expect("a stream");
        let shape = CacheShape { attention: at, context: tokens, rows, policy, thresholds: None };
        let caches = (0..layers)
            .map(|_| {
                let mut cache = backend.cache(&shape).expect("a cache");
                stream.restore(&mut cache, image).expect("restored");
                stream.wait().expect("done");
                cache
            })
            .collect();
        let mut qkv = backend.tensor(1, at.qkv_width(), TensorFormat::F32).expect("a tensor");
        let mut draws = Draws::new(9);
        let queries: Vec<f32> = (0..at.qkv_width()).map(|_| draws.draw() - 0.5).collect();
        backend.write(&mut qkv, &queries).expect("written");
        let out = backend.tensor(1, at.width(), TensorFormat::F32).expect("a tensor");
        Self { stream, caches, qkv, out, tokens }
    }

    /// Seconds of `count` steps.
    fn time(&mut self, count: usize) -> f64 {
        let start = Instant::now();
        for _ in 0..count {
            let step = Step {
                input: Input::Tokens(&[0]),
                position: self.tokens - 1,
                phase: Phase::Decode,
            };
            self.stream.begin(&step).expect("begun");
            for cache in &self.caches {
                self.stream.attention(&self.qkv, cache, &mut self.out).expect("recorded");
            }
            self.stream.submit().expect("submitted");
        }
        self.stream.wait().expect("done");
        start.elapsed().as_secs_f64()
    }

    fn held(&self) -> CacheBytes {
        self.caches[0].held()
    }
}

/// Median seconds of a step of each of two runs, timed in turn.
fn in_turn<B: Backend>(a: &mut Run<B>, b: &mut Run<B>, seconds: f64) -> (f64, f64) {
    let rounds = 7;
    let mut times = [Vec::new(), Vec::new()];
    let counts = [&mut *a, &mut *b].map(|run| {
        run.time(1);
        (seconds / rounds as f64 / run.time(1)).ceil().max(1.0) as usize
    });
    for _ in 0..rounds {
        times[0].push(a.time(counts[0]) / counts[0] as f64);
        times[1].push(b.time(counts[1]) / counts[1] as f64);
    }
    let [first, second] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[rounds / 2]
    });
    (first, second)
}

fn table<B: Backend>(backend: &B, shape: &Shape, tokens: usize, options: &Options, read: f64) {
    let at = shape.attention;
    let dense = AttentionPolicy::dense();
    let dense_content = content(&dense, &at, tokens);
    let dense_bytes = dense_content.key_bytes_read + dense_content.value_bytes_read;
    let layers = (options.megabytes << 20).div_ceil(dense_bytes).clamp(1, shape.layers);
    println!("\n### {}, {tokens} tokens, {layers} layers\n", shape.name);
    println!(
        "| keys | values | zeros | bits a key element | held, of dense | keys held, of dense | \
         read a token and layer | µs a layer | GB/s | of reading alone | speed, of dense |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    let mut baseline = Run::new(backend, at, layers, dense, &dense_content.image);
    let keys = drifting(at.head_dim, 0);
    let mut wanted = Vec::new();
    for text in POLICIES {
        let policy: AttentionPolicy = text.parse().expect("a policy");
        if !matches!(policy.keys, KeyFormat::Delta(_)) {
            wanted.push(policy);
            continue;
        }
        // The chain only for comparison.
        let shares = if text.contains("continuous") { &ZEROS[2..3] } else { &ZEROS[..] };
        for &share in shares {
            wanted.push(with_zeros(policy, &keys, at.head_dim, share));
        }
    }
    for values in ["plain", "int4"] {
        for policy in &wanted {
            let values = deltallm::delta::ValueFormat::named(values).expect("a format");
            let policy = AttentionPolicy { values, ..*policy };
            let content = content(&policy, &at, tokens);
            let mut run = Run::new(backend, at, layers, policy, &content.image);
            let (dense, own) = in_turn(&mut baseline, &mut run, options.seconds);
            let (held, dense_held) = (run.held(), baseline.held());
            let bytes = content.key_bytes_read + content.value_bytes_read;
            let rate = bytes as f64 * layers as f64 / own;
            println!(
                "| {} | {} | {} | {:.2} | {:.0} % | {:.0} % | {} kB | {:.0} | {:.1} | {:.0} % | {:.2} |",
                keys_in_words(&policy),
                values.name(),
                content.zeros.map_or("-".into(), |zeros| format!("{:.0} %", 100.0 * zeros)),
                content.key_bits,
                100.0 * (held.keys + held.values) as f64
                    / (dense_held.keys + dense_held.values) as f64,
                100.0 * held.keys as f64 / dense_held.keys as f64,
                bytes / 1000,
                1e6 * own / layers as f64,
                rate / 1e9,
                100.0 * rate / read,
                dense / own,
            );
        }
    }
}

fn keys_in_words(policy: &AttentionPolicy) -> String {
    match policy.keys {
        KeyFormat::Plain => policy.exact.name().to_owned(),
        KeyFormat::Int8 => "int8 a token".to_owned(),
        KeyFormat::Channel(bits) => format!("{} bits a channel", bits.bits()),
        KeyFormat::Delta(delta) => {
            format!("delta, {}, {}", delta.reference.name(), delta.deltas.name())
        }
    }
}

fn tables<B: Backend>(backend: &B, options: &Options, read: f64) {
    let device = backend.device();
    println!("\n## {} ({}, {})\n", device.name, device.backend, device.driver);
    println!("Reading alone: {:.1} GB/s.", read / 1e9);
    for shape in SHAPES.iter().filter(|shape| options.models.iter().any(|m| m == shape.name)) {
        for &tokens in &options.tokens {
            table(backend, shape, tokens, options, read);
        }
    }
}

fn main() {
    let options = Options::parse();
    if options.device.contains("cpu") {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        tables(&Cpu::new(None).expect("threads start"), &options, reading::cpu(threads));
    }
    if options.device.contains("gpu") {
        let gpu = GpuOptions { select: Select::Named(String::new()), ..GpuOptions::default() };
        let gpu = Gpu::open(&gpu).expect("an adapter");
        tables(&gpu, &options, reading::gpu(64 << 20));
    }
}
