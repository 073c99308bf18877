//! Matrix products of the CPU backend at the shapes of BitNet-b1.58-2B-4T and Llama-3.2-1B.
//!
//! `cargo bench --no-default-features --bench cpu_linear`
//!
//! Each runs with one thread and with all. The first group reads memory and does nothing else: it
//! is the floor of a product with one token, which reads each weight once. One-token products
//! sweep over enough layers that no cache holds them, as decoding does. Products with many tokens
//! count operations instead of bytes.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use deltallm::backend::{
    AttentionShape, Backend, Footprint, Input, MatrixFormat, Operations, Step, StreamShape,
    TensorFormat,
};
use deltallm::checkpoint::{FloatType, MatrixSource};
use deltallm::cpu::Cpu;
use deltallm::delta::Phase;
use deltallm::sampler::Draws;

/// Bytes of weights in a sweep.
const SWEEP: usize = 256 << 20;

/// (model, layer, output width, input width)
const SHAPES: [(&str, &str, usize, usize); 6] = [
    ("bitnet-2b", "qkv", 3840, 2560),
    ("bitnet-2b", "gate_up", 13824, 2560),
    ("bitnet-2b", "down", 2560, 6912),
    ("llama-1b", "qkv", 3072, 2048),
    ("llama-1b", "gate_up", 16384, 2048),
    ("llama-1b", "down", 2048, 8192),
];

fn random_bytes(len: usize) -> Vec<u8> {
    let mut draws = Draws::new(1);
    (0..len).map(|_| (draws.draw() * 256.0) as u8).collect()
}

fn matrix(format: MatrixFormat, rows: usize, cols: usize) -> MatrixSource {
    match format {
        MatrixFormat::Ternary => {
            // Two random bits a field, 3 made 1.
            let trits = |b: u8| b & !((b & b >> 1 & 0x55) << 1);
            let data: Vec<u8> = random_bytes(rows / 4 * cols).into_iter().map(trits).collect();
            MatrixSource::packed("bench", rows, cols, data.into(), 1.0)
        }
        MatrixFormat::BF16 | MatrixFormat::Q8 | MatrixFormat::Q4 => {
            // Exponents around zero: high bytes of small magnitude.
            let mut data = random_bytes(rows * cols * 2);
            data.chunks_exact_mut(2).for_each(|b| b[1] = 0x3c | b[1] & 0x80);
            let source = MatrixSource::float("bench", rows, cols, FloatType::BF16, data.into());
            match format {
                MatrixFormat::Q8 => source.into_q8(),
                MatrixFormat::Q4 => source.into_q4(),
                _ => source,
            }
        }
        _ => unreachable!("not benchmarked"),
    }
}

/// A product with `tokens` tokens over a few layers.
struct Product {
    layers: Vec<<Cpu as Backend>::Linear>,
    x: <Cpu as Backend>::Tensor,
    out: <Cpu as Backend>::Tensor,
    stream: <Cpu as Backend>::Stream,
}

impl Product {
    fn new(
        cpu: &Cpu,
        format: MatrixFormat,
        (rows, cols): (usize, usize),
        tokens: usize,
        bytes: usize,
    ) -> Self {
        let made = "the CPU backend has no limits";
        let source = matrix(format, rows, cols);
        let count = bytes.div_ceil(source.storage_rows() * source.row_bytes());
        let layer = |_| cpu.linear(&[fresh(&source)]).expect(made);
        let layers = (0..count).map(layer).collect();
        let mut x;
        if format == MatrixFormat::Ternary {
            x = cpu.tensor(tokens, cols, TensorFormat::Int8).expect(made);
            let values: Vec<i8> =
                random_bytes(tokens * cols).into_iter().map(|b| b as i8).collect();
            cpu.write_int8(&mut x, &values, &vec![1.0; tokens]).expect(made);
        } else {
            x = cpu.tensor(tokens, cols, TensorFormat::F32).expect(made);
            let values: Vec<f32> =
                random_bytes(tokens * cols).into_iter().map(|b| f32::from(b) / 256.0).collect();
            cpu.write(&mut x, &values).expect(made);
        }
        let out = cpu.tensor(tokens, rows, TensorFormat::F32).expect(made);
        let attention = AttentionShape { heads: 1, kv_heads: 1, head_dim: 64 };
        let shape = StreamShape { rows: tokens, context: tokens, attention, vocabulary: 32 };
        let mut stream = cpu.stream(&shape).expect(made);
        stream
            .begin(&Step {
                input: Input::Tokens(&vec![0; tokens]),
                position: 0,
                phase: Phase::Decode,
            })
            .expect(made);
        Self { layers, x, out, stream }
    }

    fn bytes(&self) -> u64 {
        self.layers.iter().map(Footprint::bytes).sum()
    }

    fn run(&mut self) {
        for layer in &self.layers {
            self.stream.linear(&self.x, layer, &mut self.out).expect("the product is computed");
        }
        black_box(&self.out);
    }
}

/// The matrix with bytes of its own, so that layers do not share the cache.
fn fresh(source: &MatrixSource) -> MatrixSource {
    let (mut values, mut scales) = (Vec::new(), Vec::new());
    let (rows, cols) = (source.rows(), source.cols());
    match source.format() {
        // Encoded anew by each backend.
        MatrixFormat::Q8 | MatrixFormat::Q4 => source.clone(),
        MatrixFormat::Ternary => {
            source.encode(0..source.storage_rows(), cols, 0, &mut values, &mut scales);
            MatrixSource::packed("bench", rows, cols, values.into(), 1.0)
        }
        _ => {
            source.encode(0..rows, 2 * cols, 0, &mut values, &mut scales);
            MatrixSource::float("bench", rows, cols, FloatType::BF16, values.into())
        }
    }
}

/// One thread, and one for each core.
fn thread_counts() -> Vec<usize> {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    let mut counts = vec![1, all];
    counts.dedup();
    counts
}

/// Reads memory with as many threads as the backend has, and adds it up so that it is read.
fn floor(c: &mut Criterion) {
    let words: Vec<u64> = vec![1; SWEEP / 8];
    let mut group = c.benchmark_group("floor");
    group.throughput(Throughput::Bytes(SWEEP as u64));
    for threads in thread_counts() {
        group.bench_function(BenchmarkId::new("read", format!("{threads} threads")), |b| {
            b.iter(|| {
                std::thread::scope(|scope| {
                    for part in words.chunks(words.len().div_ceil(threads)) {
                        let sum = move || part.iter().copied().fold(0, u64::wrapping_add);
                        scope.spawn(move || black_box(sum()));
                    }
                });
            });
        });
    }
    group.finish();
}

fn formats(model: &str) -> &'static [(&'static str, MatrixFormat)] {
    match model {
        "bitnet-2b" => &[("ternary", MatrixFormat::Ternary)],
        _ => &[("bf16", MatrixFormat::BF16), ("q8", MatrixFormat::Q8), ("q4", MatrixFormat::Q4)],
    }
}

fn one_token(c: &mut Criterion) {
    let mut group = c.benchmark_group("one_token");
    for threads in thread_counts() {
        let cpu = Cpu::new(Some(threads)).expect("threads start");
        for (model, layer, rows, cols) in SHAPES {
            for &(name, format) in formats(model) {
                let mut product = Product::new(&cpu, format, (rows, cols), 1, SWEEP);
                group.throughput(Throughput::Bytes(product.bytes()));
                let id = format!("{model} {layer} {name}");
                let id = BenchmarkId::new(id, format!("{threads} threads"));
                group.bench_function(id, |b| b.iter(|| product.run()));
            }
        }
    }
    group.finish();
}

fn many_tokens(c: &mut Criterion) {
    for tokens in [4, 64, 256] {
        let mut group = c.benchmark_group(format!("{tokens}_tokens"));
        for threads in thread_counts() {
            let cpu = Cpu::new(Some(threads)).expect("threads start");
            for (model, layer, rows, cols) in SHAPES {
                for &(name, format) in formats(model) {
                    let mut product = Product::new(&cpu, format, (rows, cols), tokens, 1);
                    // A multiplication and an addition each.
                    group.throughput(Throughput::Elements((2 * rows * cols * tokens) as u64));
                    let id = format!("{model} {layer} {name}");
                    let id = BenchmarkId::new(id, format!("{threads} threads"));
                    group.bench_function(id, |b| b.iter(|| product.run()));
                }
            }
        }
        group.finish();
    }
}

fn configured() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! {
    name = benches;
    config = configured();
    targets = floor, one_token, many_tokens
}
criterion_main!(benches);
