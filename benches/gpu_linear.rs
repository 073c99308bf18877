//! `linear` on the GPU at the layer shapes of BitNet-b1.58-2B-4T and Llama-3.2-1B.
//!
//! Throughput is bytes of weights, each counted once, for one token; beside it stands the rate at
//! which a kernel that does nothing but read gets through a buffer, which no product can beat. For
//! many tokens it is multiply-adds.
//!
//! Takes the fastest adapter, a software one where there is no other.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use deltallm::backend::{
    AttentionShape, Backend, Footprint, MatrixFormat, Operations, Step, StreamShape, TensorFormat,
};
use deltallm::checkpoint::{FloatType, MatrixSource};
use deltallm::delta::Phase;
use deltallm::gpu::{Gpu, GpuOptions, Select};

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

const SHAPES: [Shape; 9] = [
    shape("bitnet qkv", 3840, 2560, MatrixFormat::Ternary),
    shape("bitnet o", 2560, 2560, MatrixFormat::Ternary),
    shape("bitnet gate_up", 13824, 2560, MatrixFormat::Ternary),
    shape("bitnet down", 2560, 6912, MatrixFormat::Ternary),
    // An eighth of the head.
    shape("bitnet head / 8", 16032, 2560, MatrixFormat::BF16),
    shape("bitnet head / 8", 16032, 2560, MatrixFormat::Q8),
    shape("llama qkv", 3072, 2048, MatrixFormat::BF16),
    shape("llama gate_up", 16384, 2048, MatrixFormat::F16),
    shape("llama down", 2048, 8192, MatrixFormat::Q8),
];

fn matrix(shape: &Shape) -> MatrixSource {
    let &Shape { name, rows, cols, format } = shape;
    // Small numbers of every format; what they are does not matter, but subnormals would.
    let byte = |i: usize| (i * 7 % 11) as u8;
    let fill = |bytes: usize| -> Vec<u8> { (0..bytes).map(byte).collect() };
    let halves = |high: u8| -> Vec<u8> {
        (0..rows * cols).flat_map(|i| [byte(i), high | byte(i) & 1]).collect()
    };
    match format {
        MatrixFormat::Ternary => {
            MatrixSource::packed(name, rows, cols, fill(rows.div_ceil(4) * cols).into(), 1.0)
        }
        MatrixFormat::F16 => {
            MatrixSource::float(name, rows, cols, FloatType::F16, halves(0x2c).into())
        }
        MatrixFormat::BF16 | MatrixFormat::Q8 | MatrixFormat::F32 => {
            let matrix =
                MatrixSource::float(name, rows, cols, FloatType::BF16, halves(0x3c).into());
            if format == MatrixFormat::Q8 { matrix.into_q8() } else { matrix }
        }
    }
}

fn options() -> GpuOptions {
    GpuOptions { select: Select::Named(String::new()), ..GpuOptions::default() }
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
        .begin(&Step { tokens: &vec![0; tokens], position: 0, phase: Phase::Decode })
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
    let gpu = Gpu::open(&options()).expect("an adapter");
    let mut group = criterion.benchmark_group(format!("one token, {}", gpu.info().name));
    for shape in &SHAPES {
        let bytes = gpu.linear(&[matrix(shape)]).expect("the matrix fits").bytes();
        group.throughput(Throughput::Bytes(bytes));
        let name = format!("{} {}", shape.name, shape.format.name());
        group.bench_function(name, |b| b.iter_custom(|count| products(&gpu, shape, 1, count)));
    }
    drop(gpu);
    let bytes = 64 << 20;
    group.throughput(Throughput::Bytes(bytes));
    let reader = Reader::new(bytes);
    group.bench_function("reading alone", |b| b.iter_custom(|count| reader.time(count)));
}

fn many_tokens(criterion: &mut Criterion) {
    let gpu = Gpu::open(&options()).expect("an adapter");
    let mut group = criterion.benchmark_group(format!("64 tokens, {}", gpu.info().name));
    group.sample_size(10);
    for shape in &SHAPES {
        group.throughput(Throughput::Elements((shape.rows * shape.cols * 64) as u64));
        let name = format!("{} {}", shape.name, shape.format.name());
        group.bench_function(name, |b| b.iter_custom(|count| products(&gpu, shape, 64, count)));
    }
}

/// A kernel that reads a buffer and does nothing else.
struct Reader {
    device: wgpu::Device,
    queue: wgpu::Queue,
    pipeline: wgpu::ComputePipeline,
    bind_group: wgpu::BindGroup,
    workgroups: u32,
}

const READ: &str = "
@group(0) @binding(0) var<storage, read> data: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;

@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
    var all = vec4<u32>();
    for (var i = 0u; i < 16u; i++) {
        all ^= data[(group.x * 16u + i) * 64u + lane];
    }
    // Never true of what is there, but a compiler cannot know.
    if (all.x == 1u && all.y == 2u && all.z == 3u && all.w == 4u) {
        out[0] = all.x;
    }
}
";

impl Reader {
    fn new(bytes: u64) -> Self {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.flags = wgpu::InstanceFlags::empty();
        let instance = wgpu::Instance::new(descriptor);
        let name = deltallm::gpu::adapters()[0].name.clone();
        let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
        let adapter = adapters.iter().find(|a| a.get_info().name == name).expect("the adapter");
        let request = adapter.request_device(&wgpu::DeviceDescriptor::default());
        let (device, queue) = pollster::block_on(request).expect("a device");
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: None,
            source: wgpu::ShaderSource::Wgsl(READ.into()),
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: Default::default(),
            cache: None,
        });
        let buffer = |size| {
            let usage = wgpu::BufferUsages::STORAGE;
            let mapped_at_creation = false;
            device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size,
                usage,
                mapped_at_creation,
            })
        };
        let (data, out) = (buffer(bytes), buffer(16));
        let bind_group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &[
                wgpu::BindGroupEntry { binding: 0, resource: data.as_entire_binding() },
                wgpu::BindGroupEntry { binding: 1, resource: out.as_entire_binding() },
            ],
        });
        let workgroups = (bytes / (16 * 64 * 16)) as u32;
        Self { device, queue, pipeline, bind_group, workgroups }
    }

    fn time(&self, count: u64) -> Duration {
        let start = Instant::now();
        let mut left = count;
        while left > 0 {
            let batch = left.min(BATCH);
            let mut encoder = self.device.create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&Default::default());
            pass.set_pipeline(&self.pipeline);
            pass.set_bind_group(0, &self.bind_group, &[]);
            for _ in 0..batch {
                pass.dispatch_workgroups(self.workgroups, 1, 1);
            }
            drop(pass);
            self.queue.submit([encoder.finish()]);
            left -= batch;
        }
        self.device.poll(wgpu::PollType::wait_indefinitely()).expect("done");
        start.elapsed()
    }
}

criterion_group!(benches, one_token, many_tokens);
criterion_main!(benches);
