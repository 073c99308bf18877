//! `linear` on the GPU at the layer shapes of BitNet-b1.58-2B-4T and Llama-3.2-1B.
//!
//! Throughput is bytes of weights, each counted once, for one token; beside it stands the rate at
//! which a kernel that does nothing but read gets through a buffer, which no product can beat. For
//! many tokens it is multiply-adds. Ternary weights are measured in both packings, which have different
//! bytes: of them times tell more.
//!
//! Takes the fastest adapter, a software one where there is no other.

mod reading;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use deltallm::backend::{
    AttentionShape, Backend, Footprint, Input, MatrixFormat, Operations, Step, StreamShape,
    TensorFormat,
};
use deltallm::checkpoint::{FloatType, MatrixSource};
use deltallm::delta::Phase;
use deltallm::gpu::{Gpu, GpuOptions, Packing, Select, Tuning, Tunings};
use reading::Reader;

/// Repetitions in one submission.
const BATCH: u64 = 8;

struct Shape {
    name: &'static str,
    rows: usize,
    cols: usize,
    format: MatrixFormat,
}

const fn shape(name: &'static str, rows: usize, cols: usize, format: MatrixFormat) -> Shape {
    Shape { name, rows, cols, format }
}

const SHAPES: [Shape; 10] = [
    shape("bitnet qkv", 3840, 2560, MatrixFormat::Ternary),
    shape("bitnet o", 2560, 2560, MatrixFormat::Ternary),
    shape("bitnet gate_up", 13824, 2560, MatrixFormat::Ternary),
    shape("bitnet down", 2560, 6912, MatrixFormat::Ternary),
    // An eighth of the head.
    shape("bitnet head / 8", 16032, 2560, MatrixFormat::BF16),
    shape("bitnet head / 8", 16032, 2560, MatrixFormat::Q8),
    shape("bitnet head / 8", 16032, 2560, MatrixFormat::Q4),
    shape("llama qkv", 3072, 2048, MatrixFormat::BF16),
    shape("llama gate_up", 16384, 2048, MatrixFormat::F16),
    shape("llama down", 2048, 8192, MatrixFormat::Q8),
];

fn matrix(shape: &Shape) -> MatrixSource {
    let &Shape { name, rows, cols, format } = shape;
    // Small numbers of every format; what they are does not matter, but subnormals would.
    let byte = |i: usize| (i * 7 % 11) as u8;
    let halves = |high: u8| -> Vec<u8> {
        (0..rows * cols).flat_map(|i| [byte(i), high | byte(i) & 1]).collect()
    };
    match format {
        MatrixFormat::Ternary => {
            let trits = |i: usize| [0, 2, 4, 6].map(|at| (i * 7 / (1 + at) % 3) << at);
            let bytes = (0..rows.div_ceil(4) * cols).map(|i| trits(i).iter().sum::<usize>() as u8);
            MatrixSource::packed(name, rows, cols, bytes.collect::<Vec<_>>().into(), 1.0)
        }
        MatrixFormat::F16 => {
            MatrixSource::float(name, rows, cols, FloatType::F16, halves(0x2c).into())
        }
        MatrixFormat::BF16 | MatrixFormat::Q8 | MatrixFormat::Q4 | MatrixFormat::F32 => {
            let matrix =
                MatrixSource::float(name, rows, cols, FloatType::BF16, halves(0x3c).into());
            match format {
                MatrixFormat::Q8 => matrix.into_q8(),
                MatrixFormat::Q4 => matrix.into_q4(),
                _ => matrix,
            }
        }
    }
}

/// The same adapter with both packings of ternary weights.
fn gpus() -> [(Packing, Gpu); 2] {
    let options = GpuOptions { select: Select::Named(String::new()), ..GpuOptions::default() };
    let device = Gpu::open(&options).expect("an adapter").info().clone();
    Packing::ALL.map(|packing| {
        let mut tunings = Tunings::default();
        tunings.insert(&device, Tuning { packing, ..Tuning::default_of(device.kind) });
        let options = GpuOptions { tunings, ..options.clone() };
        (packing, Gpu::open(&options).expect("an adapter"))
    })
}

/// A product's name and device; of ternary weights in every packing.
fn each(gpus: &[(Packing, Gpu)]) -> Vec<(String, &Shape, &Gpu)> {
    let mut all = Vec::new();
    for shape in &SHAPES {
        let name = format!("{} {}", shape.name, shape.format.name());
        if shape.format == MatrixFormat::Ternary {
            let packed = |(packing, gpu)| (format!("{name}, {packing} in a byte"), shape, gpu);
            all.extend(gpus.iter().map(|(packing, gpu)| packed((packing, gpu))));
        } else {
            all.push((name, shape, &gpus[0].1));
        }
    }
    all
}

/// Times `count` products with `tokens` rows.
fn products(gpu: &Gpu, shape: &Shape, tokens: usize, count: u64) -> Duration {
    let weight = gpu.linear(&[matrix(shape)]).expect("the matrix fits");
    let attention = AttentionShape { heads: 2, kv_heads: 1, head_dim: 16 };
    let stream = StreamShape { rows: tokens, context: tokens, attention, vocabulary: 32 };
    let mut stream = gpu.stream(&stream).expect("a stream");
    let ternary = shape.format == MatrixFormat::Ternary;
    let format = if ternary { TensorFormat::Int8 } else { TensorFormat::F32 };
    let mut x = gpu.tensor(tokens, shape.cols, format).expect("a tensor");
    let mut y = gpu.tensor(tokens, shape.rows, TensorFormat::F32).expect("a tensor");
    let count_x = tokens * shape.cols;
    if ternary {
        gpu.write_int8(&mut x, &vec![1; count_x], &vec![1.0; tokens]).expect("written");
    } else {
        gpu.write(&mut x, &vec![1.0; count_x]).expect("written");
    }
    let probe = gpu.tensor(1, 1, TensorFormat::F32).expect("a tensor");
    stream
        .begin(&Step { input: Input::Tokens(&vec![0; tokens]), position: 0, phase: Phase::Decode })
        .expect("a step");
    stream.linear(&x, &weight, &mut y).expect("recorded");
    stream.read(&y).expect("warm");

    let start = Instant::now();
    for i in 0..count {
        stream.linear(&x, &weight, &mut y).expect("recorded");
        if i % BATCH == BATCH - 1 {
            stream.submit().expect("submitted");
        }
    }
    stream.submit().expect("submitted");
    black_box(stream.read(&probe).expect("waited"));
    start.elapsed()
}

fn one_token(criterion: &mut Criterion) {
    let gpus = gpus();
    let mut group = criterion.benchmark_group(format!("one token, {}", gpus[0].1.info().name));
    for (name, shape, gpu) in each(&gpus) {
        let bytes = gpu.linear(&[matrix(shape)]).expect("the matrix fits").bytes();
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function(name, |b| b.iter_custom(|count| products(gpu, shape, 1, count)));
    }
    drop(gpus);
    let bytes = 64 << 20;
    group.throughput(Throughput::Bytes(bytes));
    let reader = Reader::new(bytes);
    group.bench_function("reading alone", |b| b.iter_custom(|count| reader.time(count)));
}

fn many_tokens(criterion: &mut Criterion) {
    let gpus = gpus();
    let mut group = criterion.benchmark_group(format!("64 tokens, {}", gpus[0].1.info().name));
    group.sample_size(10);
    for (name, shape, gpu) in each(&gpus) {
        group.throughput(Throughput::Elements((shape.rows * shape.cols * 64) as u64));
        group.bench_function(name, |b| b.iter_custom(|count| products(gpu, shape, 64, count)));
    }
}

criterion_group!(benches, one_token, many_tokens);
criterion_main!(benches);
