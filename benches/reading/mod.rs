//! How fast a device reads memory: the floor of whatever is bound by it.
#![allow(dead_code, reason = "each bench uses its own part")]

use std::hint::black_box;
use std::time::{Duration, Instant};

/// Repetitions in one submission.
const BATCH: u64 = 8;

/// Bytes a second that `threads` threads of the CPU read, of 256 MiB that no cache holds.
pub fn cpu(threads: usize) -> f64 {
    let words = vec![1u64; (256 << 20) / 8];
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks(words.len().div_ceil(threads)) {
                scope.spawn(|| black_box(part.iter().fold(0, |sum: u64, x| sum.wrapping_add(*x))));
            }
        });
        start.elapsed().as_secs_f64()
    };
    let best = (0..7).map(|_| pass()).fold(f64::INFINITY, f64::min);
    (8 * words.len()) as f64 / best
}

/// Bytes a second that the GPU reads.
pub fn gpu(bytes: u64) -> f64 {
    let reader = Reader::new(bytes);
    reader.time(1);
    let best = (0..5).map(|_| reader.time(4)).min().unwrap_or_default();
    4.0 * bytes as f64 / best.as_secs_f64()
}

/// A kernel that reads a buffer and does nothing else.
pub struct Reader {
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
    /// Takes the adapter that the benches take, and a buffer of `bytes`.
    pub fn new(bytes: u64) -> Self {
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

    /// Time of reading the buffer `count` times.
    pub fn time(&self, count: u64) -> Duration {
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
