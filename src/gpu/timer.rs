//! Times launches by the device's own clock, while a profile is made.

use std::time::Duration;

use super::buffer::Buffer;
use super::device::Device;
use crate::backend::KernelTime;
use crate::error::Result;

/// Launches that one submission can time: WebGPU allows 4096 queries in a set.
pub(super) const MOST: usize = 2048;

/// Bytes of a query.
const QUERY: u64 = 8;

/// Writes the time before and after each launch, which has a compute pass of its own then.
pub(super) struct Timer {
    queries: wgpu::QuerySet,
    resolved: Buffer,
    readback: Buffer,
    /// Nanoseconds of a tick.
    period: f64,
    times: Vec<KernelTime>,
}

impl Timer {
    /// A timer, or nothing where the device was opened without
    /// [`timestamps`](super::GpuOptions::timestamps) or has none.
    pub(super) fn new(device: &Device) -> Result<Option<Self>> {
        if !device.raw.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            return Ok(None);
        }
        let descriptor = wgpu::QuerySetDescriptor {
            label: None,
            ty: wgpu::QueryType::Timestamp,
            count: 2 * MOST as u32,
        };
        let queries = device
            .scoped(|| device.raw.create_query_set(&descriptor))
            .map_err(|error| device.lost_or("timestamps", error.to_string()))?;
        use wgpu::BufferUsages as Usage;
        let bytes = 2 * MOST as u64 * QUERY;
        let what = "timestamps";
        Ok(Some(Self {
            queries,
            resolved: device.buffer(what, bytes, Usage::QUERY_RESOLVE | Usage::COPY_SRC)?,
            readback: device.buffer(what, bytes, Usage::MAP_READ | Usage::COPY_DST)?,
            period: f64::from(device.queue.get_timestamp_period()),
            times: Vec::new(),
        }))
    }

    /// Where the `index`th launch of a submission writes its times.
    pub(super) fn writes(&self, index: usize) -> wgpu::ComputePassTimestampWrites<'_> {
        let first = 2 * index as u32;
        wgpu::ComputePassTimestampWrites {
            query_set: &self.queries,
            beginning_of_pass_write_index: Some(first),
            end_of_pass_write_index: Some(first + 1),
        }
    }

    /// Lets a submission hand its times over at its end.
    pub(super) fn resolve(&self, encoder: &mut wgpu::CommandEncoder, launches: usize) {
        let bytes = 2 * launches as u64 * QUERY;
        let (from, to) = (self.resolved.raw(), self.readback.raw());
        encoder.resolve_query_set(&self.queries, 0..2 * launches as u32, from, 0);
        encoder.copy_buffer_to_buffer(from, 0, to, 0, bytes);
    }

    /// Waits for the submission and keeps its times.
    pub(super) fn collect(
        &mut self,
        device: &Device,
        submission: wgpu::SubmissionIndex,
        kernels: &[&'static str],
    ) -> Result<()> {
        let bytes = 2 * kernels.len() as u64 * QUERY;
        let ticks: Vec<u64> =
            bytemuck::pod_collect_to_vec(&device.map(&self.readback, bytes, Some(submission))?);
        let (pairs, _) = ticks.as_chunks::<2>();
        for (&kernel, [start, end]) in kernels.iter().zip(pairs) {
            // Some drivers write no time where a launch is too short for their clock.
            let nanoseconds = end.saturating_sub(*start) as f64 * self.period;
            let time = Duration::from_nanos(nanoseconds as u64);
            self.times.push(KernelTime { kernel, time });
        }
        Ok(())
    }

    /// The times since the last call.
    pub(super) fn take(&mut self) -> Vec<KernelTime> {
        std::mem::take(&mut self.times)
    }
}
