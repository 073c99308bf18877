//! Collects the dispatches of a step, and submits them in one compute pass.
//!
//! What does not change from token to token is made once: a bind group for each kernel and set of
//! buffers, and one buffer for all parameters. Parameters that occur twice in a step are kept once:
//! the layers of a model share nearly all of theirs, so that a step of hundreds of dispatches
//! writes a few hundred bytes.

use std::collections::HashMap;
use std::sync::Arc;

use super::buffer::Buffer;
use super::device::Device;
use super::pipeline::Pipeline;
use super::shader::Kernel;
use super::timer::{MOST, Timer};
use crate::backend::KernelTime;
use crate::error::Result;

/// Bytes of the largest parameter struct.
pub(super) const PARAMETER_BYTES: usize = 112;

/// Distance of two parameter structs: WebGPU's alignment of a dynamic offset.
const SLOT_BYTES: usize = 256;

/// Different parameters that one submission can hold.
const SLOTS: usize = 512;

/// Buffers that a kernel binds besides its parameters.
const MAX_BUFFERS: usize = 6;

/// Multiply-adds after which a long step is sent off in part, so that no submission holds the GPU
/// for long: 0.1 s of an integrated GPU. A token of decoding stays one submission.
const SUBMISSION_WORK: u64 = 20_000_000_000;

/// Bind groups beyond this many are a sign of a caller that makes buffers all the time: then all
/// are dropped, and with them their hold on buffers that are gone.
const MAX_BIND_GROUPS: usize = 8192;

type Parameters = [u8; PARAMETER_BYTES];
type BindGroupKey = (Kernel, [u64; MAX_BUFFERS]);

struct Dispatch {
    kernel: &'static str,
    pipeline: Arc<Pipeline>,
    bind_group: wgpu::BindGroup,
    parameters: u32,
    grid: [u32; 3],
}

struct Copy {
    from: (wgpu::Buffer, u64),
    to: (wgpu::Buffer, u64),
    bytes: u64,
}

/// The dispatches of a step.
pub(super) struct Recorder {
    device: Arc<Device>,
    dispatches: Vec<Dispatch>,
    copies: Vec<Copy>,
    /// Multiply-adds of the dispatches.
    work: u64,
    pipelines: HashMap<Kernel, Arc<Pipeline>>,
    bind_groups: HashMap<BindGroupKey, wgpu::BindGroup>,
    parameters: HashMap<Parameters, u32>,
    parameter_bytes: Vec<u8>,
    parameter_buffer: Buffer,
    /// The last submission.
    submitted: Option<wgpu::SubmissionIndex>,
    counters: Counters,
    /// While launches are timed.
    timer: Option<Timer>,
}

/// What a stream has made and done: what it makes must stand still once it is warm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bind groups made.
    pub bind_groups: u64,
    /// Pipelines fetched from the device, which compiles each once.
    pub pipelines: u64,
    /// Buffers made for reading results.
    pub readbacks: u64,
    /// Submissions to the queue.
    pub submissions: u64,
    /// Dispatches in all submissions.
    pub dispatches: u64,
    /// Bytes that the host has read back.
    pub readback_bytes: u64,
}

impl Dispatch {
    fn encode(&self, pass: &mut wgpu::ComputePass<'_>) {
        let [x, y, z] = self.grid;
        pass.set_pipeline(&self.pipeline.raw);
        pass.set_bind_group(0, &self.bind_group, &[self.parameters]);
        pass.dispatch_workgroups(x, y, z);
    }
}

impl Recorder {
    pub(super) fn new(device: Arc<Device>) -> Result<Self> {
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let bytes = (SLOTS * SLOT_BYTES) as u64;
        let parameter_buffer = device.buffer("the parameters of a step", bytes, usage)?;
        Ok(Self {
            device,
            dispatches: Vec::new(),
            copies: Vec::new(),
            work: 0,
            pipelines: HashMap::new(),
            bind_groups: HashMap::new(),
            parameters: HashMap::new(),
            parameter_bytes: Vec::new(),
            parameter_buffer,
            submitted: None,
            counters: Counters::default(),
            timer: None,
        })
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    /// Begins, or ceases, to time every launch; says whether the device can.
    pub(super) fn time_kernels(&mut self, on: bool) -> Result<bool> {
        self.submit()?;
        self.timer = if on { Timer::new(&self.device)? } else { None };
        Ok(self.timer.is_some())
    }

    /// The times of all launches that were submitted since the last call.
    pub(super) fn kernel_times(&mut self) -> Vec<KernelTime> {
        self.timer.as_mut().map(Timer::take).unwrap_or_default()
    }

    pub(super) fn count_readback(&mut self) {
        self.counters.readbacks += 1;
    }

    /// Bytes held on the device.
    pub(super) fn bytes(&self) -> u64 {
        self.parameter_buffer.size()
    }

    /// Records one dispatch of `kernel` over a `grid` of workgroups.
    ///
    /// `parameters` is the kernel's `Params`; `buffers` stand in the order of its bindings.
    pub(super) fn dispatch<P: bytemuck::NoUninit>(
        &mut self,
        kernel: Kernel,
        parameters: &P,
        buffers: &[&Buffer],
        grid: [usize; 3],
    ) -> Result<()> {
        let grid = grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        if grid.contains(&0) {
            return Ok(());
        }
        if grid.iter().any(|&n| n > 65_535) {
            let message = format!("a grid of {grid:?} workgroups is beyond 65535 a dimension");
            return Err(self.device.fault(kernel.name(), message));
        }
        if self.timer.is_some() && self.dispatches.len() == MOST {
            self.submit()?;
        }
        let parameters = self.parameters(bytemuck::bytes_of(parameters))?;
        let pipeline = self.pipeline(kernel)?;
        let bind_group = self.bind_group(kernel, &pipeline, buffers)?;
        let kernel = kernel.name();
        self.dispatches.push(Dispatch { kernel, pipeline, bind_group, parameters, grid });
        self.counters.dispatches += 1;
        Ok(())
    }

    /// Announces the multiply-adds of the dispatch that comes next.
    pub(super) fn work(&mut self, multiply_adds: usize) -> Result<()> {
        if self.work >= SUBMISSION_WORK {
            self.submit()?;
        }
        self.work += multiply_adds as u64;
        Ok(())
    }

    /// Copies bytes between buffers, each with an offset, after all dispatches that are submitted
    /// with it.
    pub(super) fn copy(&mut self, from: (&Buffer, u64), to: (&Buffer, u64), bytes: u64) {
        let raw = |(buffer, offset): (&Buffer, u64)| (buffer.raw().clone(), offset);
        self.copies.push(Copy { from: raw(from), to: raw(to), bytes });
    }

    /// Lets go of all bind groups, and with them of buffers that are gone.
    pub(super) fn forget(&mut self) {
        self.bind_groups.clear();
    }

    /// Submits what was recorded, if anything was.
    pub(super) fn submit(&mut self) -> Result<()> {
        self.device.check()?;
        if self.dispatches.is_empty() && self.copies.is_empty() {
            return Ok(());
        }
        self.device.write(&self.parameter_buffer, 0, &self.parameter_bytes)?;
        let mut encoder = self.device.raw.create_command_encoder(&Default::default());
        let mut timed = Vec::new();
        if let Some(timer) = &self.timer {
            for (index, dispatch) in self.dispatches.drain(..).enumerate() {
                let timestamp_writes = Some(timer.writes(index));
                let descriptor = wgpu::ComputePassDescriptor { label: None, timestamp_writes };
                dispatch.encode(&mut encoder.begin_compute_pass(&descriptor));
                timed.push(dispatch.kernel);
            }
            if !timed.is_empty() {
                timer.resolve(&mut encoder, timed.len());
            }
        } else if !self.dispatches.is_empty() {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            self.dispatches.drain(..).for_each(|dispatch| dispatch.encode(&mut pass));
        }
        for copy in self.copies.drain(..) {
            let ((from, from_at), (to, to_at)) = (&copy.from, &copy.to);
            encoder.copy_buffer_to_buffer(from, *from_at, to, *to_at, copy.bytes);
        }
        let submission = self.device.submit(Some(encoder));
        self.work = 0;
        self.parameters.clear();
        self.parameter_bytes.clear();
        let submission = submission?;
        self.submitted = Some(submission.clone());
        self.counters.submissions += 1;
        if let Some(timer) = self.timer.as_mut().filter(|_| !timed.is_empty()) {
            timer.collect(&self.device, submission, &timed)?;
        }
        self.device.check()
    }

    /// The last submission.
    pub(super) fn submitted(&self) -> Option<wgpu::SubmissionIndex> {
        self.submitted.clone()
    }

    /// Submits what was recorded, waits for it, and reads a buffer that it has copied to.
    pub(super) fn read(&mut self, buffer: &Buffer, bytes: u64) -> Result<Vec<u8>> {
        self.submit()?;
        self.read_after(buffer, bytes, self.submitted())
    }

    /// Waits for a submission, and for no later one, and reads a buffer that it has copied to.
    pub(super) fn read_after(
        &mut self,
        buffer: &Buffer,
        bytes: u64,
        submission: Option<wgpu::SubmissionIndex>,
    ) -> Result<Vec<u8>> {
        self.counters.readback_bytes += bytes;
        self.device.map(buffer, bytes, submission)
    }

    /// Where these parameters will stand in the parameter buffer.
    fn parameters(&mut self, bytes: &[u8]) -> Result<u32> {
        let mut parameters = [0; PARAMETER_BYTES];
        parameters[..bytes.len()].copy_from_slice(bytes);
        if let Some(&offset) = self.parameters.get(&parameters) {
            return Ok(offset);
        }
        if self.parameters.len() == SLOTS {
            self.submit()?;
        }
        let offset = self.parameter_bytes.len();
        self.parameter_bytes.extend_from_slice(&parameters);
        self.parameter_bytes.resize(offset + SLOT_BYTES, 0);
        self.parameters.insert(parameters, offset as u32);
        Ok(offset as u32)
    }

    fn pipeline(&mut self, kernel: Kernel) -> Result<Arc<Pipeline>> {
        if let Some(pipeline) = self.pipelines.get(&kernel) {
            return Ok(Arc::clone(pipeline));
        }
        let pipeline = self.device.pipeline(kernel)?;
        self.pipelines.insert(kernel, Arc::clone(&pipeline));
        self.counters.pipelines += 1;
        Ok(pipeline)
    }

    fn bind_group(
        &mut self,
        kernel: Kernel,
        pipeline: &Pipeline,
        buffers: &[&Buffer],
    ) -> Result<wgpu::BindGroup> {
        let mut ids = [0; MAX_BUFFERS];
        for (id, buffer) in ids.iter_mut().zip(buffers) {
            *id = buffer.id();
        }
        let key = (kernel, ids);
        if let Some(bind_group) = self.bind_groups.get(&key) {
            return Ok(bind_group.clone());
        }
        let mut entries = vec![wgpu::BindGroupEntry {
            binding: 0,
            resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer: self.parameter_buffer.raw(),
                offset: 0,
                size: wgpu::BufferSize::new(PARAMETER_BYTES as u64),
            }),
        }];
        entries.extend(pipeline.bindings.iter().zip(buffers).map(|(&binding, buffer)| {
            wgpu::BindGroupEntry { binding, resource: buffer.raw().as_entire_binding() }
        }));
        let descriptor =
            wgpu::BindGroupDescriptor { label: None, layout: &pipeline.layout, entries: &entries };
        let device = Arc::clone(&self.device);
        let bind_group = device
            .scoped(|| device.raw.create_bind_group(&descriptor))
            .map_err(|error| device.lost_or(kernel.name(), error.to_string()))?;
        if self.bind_groups.len() == MAX_BIND_GROUPS {
            self.bind_groups.clear();
        }
        self.bind_groups.insert(key, bind_group.clone());
        self.counters.bind_groups += 1;
        Ok(bind_group)
    }
}
