//! Where a session's operations run.

use std::ops::Range;
use std::sync::Arc;

use super::Gpu;
use super::buffer::Buffer;
use super::cache::Cache;
use super::device::Device;
use super::encode_keys::Usage;
use super::linear::Linear;
use super::recorder::{Counters, Recorder};
use super::tensor::{Norm, Rope, RowScale, Tensor};
use super::tuning::Tuning;
use super::{attention, sample};
use crate::backend::{
    Activation, Activity, Footprint, Input, KernelTime, Operations, Step, StreamShape, TensorFormat,
};
use crate::delta::{CacheImage, Page, Phase};
use crate::error::{Error, Result};
use crate::sampler::SampleStep;

/// Bytes that are read back at a time.
const LARGEST_READ: usize = 16 << 20;

/// The tokens that the current step is over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Current {
    pub position: usize,
    pub tokens: usize,
    /// Whether its token is the last sampled one.
    pub sampled: bool,
    pub phase: Phase,
}

/// Records a session's operations and reads their results.
pub struct Stream {
    pub(super) device: Arc<Device>,
    /// The device's; only who measures others changes it.
    pub(super) tuning: Tuning,
    pub(super) shape: StreamShape,
    pub(super) step: Current,
    pub(super) recorder: Recorder,
    /// Ids of the step's tokens, `[rows]` u32. A sampled token becomes the first of them.
    pub(super) tokens: Buffer,
    pub(super) attention: attention::Scratch,
    pub(super) sampling: sample::Scratch,
    pub(super) usage: Usage,
    /// What tensors are read through; grows to the largest.
    readback: Option<Buffer>,
}

impl Stream {
    pub(super) fn new(device: Arc<Device>, shape: &StreamShape) -> Result<Self> {
        Ok(Self {
            shape: *shape,
            step: Current { position: 0, tokens: 0, sampled: false, phase: Phase::Decode },
            recorder: Recorder::new(Arc::clone(&device))?,
            tokens: device.storage("the tokens of a step", shape.rows as u64 * 4)?,
            attention: attention::Scratch::new(&device, shape)?,
            sampling: sample::Scratch::new(&device, shape)?,
            usage: Usage::default(),
            readback: None,
            tuning: device.tuning,
            device,
        })
    }

    /// What the stream has made and done so far.
    pub fn counters(&self) -> Counters {
        self.recorder.counters()
    }

    pub(super) fn fault(&self, what: &str, message: impl Into<String>) -> Error {
        self.device.fault(what, message)
    }

    /// Refuses a call of `operation` whose tensors do not fit together.
    pub(super) fn expect(
        &self,
        operation: &str,
        fits: bool,
        message: impl FnOnce() -> String,
    ) -> Result<()> {
        if fits { Ok(()) } else { Err(self.fault(operation, message())) }
    }

    /// The first `bytes` of a buffer, after all that was recorded.
    fn read_bytes(&mut self, buffer: &Buffer, bytes: usize) -> Result<Vec<u8>> {
        self.read_at(buffer, 0, bytes)
    }

    /// `bytes` of a buffer from `offset` on, a multiple of four, after all that was recorded.
    pub(super) fn read_at(
        &mut self,
        buffer: &Buffer,
        offset: usize,
        bytes: usize,
    ) -> Result<Vec<u8>> {
        let mut data = Vec::with_capacity(bytes.next_multiple_of(4));
        // In pieces, so that reading a whole cache does not take as much again.
        while data.len() < bytes {
            let piece = (bytes - data.len()).min(LARGEST_READ).next_multiple_of(4) as u64;
            let readback = match self.readback.take() {
                Some(readback) if readback.size() >= piece => readback,
                _ => {
                    let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
                    self.recorder.count_readback();
                    self.device.buffer("reading a tensor", piece, usage)?
                }
            };
            let from = (buffer, (offset + data.len()) as u64);
            self.recorder.copy(from, (&readback, 0), piece);
            let read = self.recorder.read(&readback, piece);
            self.readback = Some(readback);
            data.extend(read?);
        }
        data.truncate(bytes);
        Ok(data)
    }
}

impl Footprint for Stream {
    fn bytes(&self) -> u64 {
        let readback = self.readback.as_ref().map_or(0, Buffer::size);
        let scratch = self.attention.bytes() + self.sampling.bytes() + self.usage.bytes();
        self.tokens.size() + scratch + readback + self.recorder.bytes()
    }
}

impl Operations<Gpu> for Stream {
    fn begin(&mut self, step: &Step<'_>) -> Result<()> {
        let Step { input, position, phase } = *step;
        let tokens = input.count();
        let fits =
            (1..=self.shape.rows).contains(&tokens) && position + tokens <= self.shape.context;
        self.expect("begin", fits, || {
            let StreamShape { rows, context, .. } = self.shape;
            format!("{tokens} tokens at {position} in chunks of {rows}, context {context}")
        })?;
        // What is recorded belongs to earlier tokens, and writes come before what is recorded.
        self.submit()?;
        self.usage.settle(&mut self.recorder)?;
        let sampled = matches!(input, Input::Sampled);
        match input {
            Input::Tokens(ids) => {
                self.sampling.forget();
                self.device.write(&self.tokens, 0, bytemuck::cast_slice(ids))?;
            }
            Input::Sampled => {
                self.expect("begin", self.sampling.any, || "no token was sampled".to_owned())?
            }
        }
        self.step = Current { position, tokens, sampled, phase };
        Ok(())
    }

    fn embed(&mut self, table: &Linear, out: &mut Tensor) -> Result<()> {
        self.embed_tokens(table, out)
    }

    fn norm(
        &mut self,
        x: &Tensor,
        rows: Range<usize>,
        norm: &Norm,
        out: &mut Tensor,
    ) -> Result<()> {
        self.norm_rows(x, rows, norm, out)
    }

    fn linear(&mut self, x: &Tensor, weight: &Linear, out: &mut Tensor) -> Result<()> {
        self.linear_any(x, weight, out, false)
    }

    fn linear_add(&mut self, x: &Tensor, weight: &Linear, out: &mut Tensor) -> Result<()> {
        self.linear_any(x, weight, out, true)
    }

    fn rope_append(&mut self, qkv: &mut Tensor, rope: &Rope, cache: &mut Cache) -> Result<()> {
        self.rope_rows(qkv, rope, cache)
    }

    fn encode_keys(&mut self, cache: &mut Cache) -> Result<()> {
        self.encode_pages(cache)
    }

    fn attention(&mut self, qkv: &Tensor, cache: &Cache, out: &mut Tensor) -> Result<()> {
        self.attention_rows(qkv, cache, out)
    }

    fn gate(
        &mut self,
        gate_up: &Tensor,
        activation: Activation,
        norm: Option<&Norm>,
        out: &mut Tensor,
    ) -> Result<()> {
        self.gate_rows(gate_up, activation, norm, out)
    }

    fn sample(&mut self, logits: &Tensor, step: &SampleStep<'_>) -> Result<()> {
        self.sample_token(logits, step)
    }

    fn truncate(&mut self, cache: &mut Cache, length: usize) -> Result<()> {
        self.truncate_cache(cache, length)
    }

    fn pages(&mut self, cache: &Cache) -> Result<Vec<Vec<Page>>> {
        self.read_pages(cache)
    }

    fn save(&mut self, cache: &Cache, exact_from: usize) -> Result<CacheImage> {
        self.save_cache(cache, exact_from)
    }

    fn restore(&mut self, cache: &mut Cache, image: &CacheImage) -> Result<()> {
        self.restore_cache(cache, image)
    }

    fn submit(&mut self) -> Result<()> {
        self.recorder.submit()?;
        self.sampling.submitted(&self.recorder);
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        self.device.wait(None)
    }

    fn token(&mut self) -> Result<u32> {
        self.sampled_token()
    }

    fn activity(&self) -> Activity {
        let Counters { dispatches, submissions, readback_bytes, .. } = self.recorder.counters();
        Activity { launches: dispatches, submissions, readback_bytes }
    }

    fn time_kernels(&mut self, on: bool) -> Result<bool> {
        self.recorder.time_kernels(on)
    }

    fn kernel_times(&mut self) -> Result<Vec<KernelTime>> {
        self.recorder.submit()?;
        Ok(self.recorder.kernel_times())
    }

    fn read(&mut self, tensor: &Tensor) -> Result<Vec<f32>> {
        self.expect("read", tensor.format == TensorFormat::F32, || "not an F32 tensor".into())?;
        let stride = tensor.stride();
        let bytes = self.read_bytes(&tensor.data, tensor.rows * stride * 4)?;
        let floats: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
        let rows = floats.chunks_exact(stride.max(1)).take(tensor.rows);
        Ok(rows.flat_map(|row| &row[..tensor.width]).copied().collect())
    }

    fn read_int8(&mut self, tensor: &Tensor) -> Result<(Vec<i8>, Vec<f32>)> {
        let Some(scales) = &tensor.scales else {
            return Err(self.fault("read_int8", "not an Int8 tensor"));
        };
        let stride = tensor.stride();
        let bytes = self.read_bytes(&tensor.data, tensor.rows * stride)?;
        let rows = bytes.chunks_exact(stride.max(1)).take(tensor.rows);
        let values = rows.flat_map(|row| &row[..tensor.width]).map(|&byte| byte as i8).collect();
        let bytes = self.read_bytes(scales, tensor.rows * size_of::<RowScale>())?;
        let scales: Vec<RowScale> = bytemuck::pod_collect_to_vec(&bytes);
        Ok((values, scales.iter().take(tensor.rows).map(|row| row.scale).collect()))
    }
}
