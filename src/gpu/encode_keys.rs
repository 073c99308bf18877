//! `encode_keys`: compresses the pages of keys that a step has completed.

use std::sync::Arc;

use super::buffer::Buffer;
use super::cache::{Cache, Compressed, Filled, PageKeys, PageKind, PageSegment};
use super::device::Device;
use super::recorder::Recorder;
use super::shader::{
    Binding, HALF, Kernel, LEVEL, PRECISE, Program, key_read, key_rows, page_constants, wgsl,
};
use super::stream::Stream;
use crate::backend::CacheFormat;
use crate::delta::{Reference, Threshold};
use crate::error::Result;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    page: u32,
    page_first: u32,
    kv_heads: u32,
    sink: u32,
    recent: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct DeltaParams {
    page: u32,
    loops: u32,
    page_first: u32,
    kv_heads: u32,
    deltas: u32,
    sink: u32,
    recent: u32,
    relative: u32,
}

pub(super) fn program(exact: CacheFormat, pages: PageKind, head_dim: u32) -> Program {
    use Binding::{Read, Write};
    let mut constants = page_constants(pages, head_dim);
    constants.push(("WORKGROUP", 128));
    let mut parts = vec![HALF, LEVEL, PRECISE, key_rows(true), key_read(exact)];
    let mut bindings = vec![(2, Read), (3, Write)];
    if matches!(pages.keys, PageKeys::Delta(..)) {
        parts.push(wgsl!("encode_keys_delta.wgsl"));
        bindings.extend([(4, Write), (5, Read)]);
    } else {
        parts.push(wgsl!("encode_keys.wgsl"));
    }
    Program { constants, parts, bindings, f16: false }
}

impl Stream {
    pub(super) fn encode_pages(&mut self, cache: &mut Cache) -> Result<()> {
        let (kv_heads, sink) = (cache.shape.kv_heads, cache.policy.sink);
        let (length, context) = (cache.length, cache.context);
        let Some(compressed) = &mut cache.compressed else {
            return Ok(());
        };
        let page = compressed.layout.tokens;
        while compressed.pages < length / page {
            let wanted = length / page - compressed.pages;
            let count = compressed.room(kv_heads, wanted);
            if count == 0 {
                if compressed.unknown() > 0 {
                    self.usage.settle(&mut self.recorder)?;
                } else {
                    let left = context / page - compressed.pages;
                    compressed.grow(&self.device, kv_heads, left)?;
                }
                continue;
            }
            let Some(segment) = compressed.segments.last() else {
                return Err(self.fault("encode_keys", "there is no room for pages"));
            };
            let kernel = Kernel::EncodeKeys {
                exact: cache.policy.exact,
                pages: compressed.kind,
                head_dim: cache.shape.head_dim as u32,
            };
            let (first, recent) = (compressed.pages as u32, compressed.recent as u32);
            match compressed.layout.delta() {
                None => {
                    let params = Params {
                        page: first,
                        page_first: segment.first as u32,
                        kv_heads: kv_heads as u32,
                        sink: sink as u32,
                        recent,
                    };
                    let buffers = [&compressed.originals, &segment.buffer];
                    self.recorder.dispatch(kernel, &params, &buffers, [count, kv_heads, 1])?;
                }
                Some(delta) => {
                    let relative = matches!(delta.threshold, Threshold::Relative(_));
                    // Each page of a continuous chain begins where the one before has ended.
                    let loops = if delta.reference == Reference::Continuous { count } else { 1 };
                    let params = DeltaParams {
                        page: first,
                        loops: loops as u32,
                        page_first: segment.first as u32,
                        kv_heads: kv_heads as u32,
                        deltas: segment.deltas as u32,
                        sink: sink as u32,
                        recent,
                        relative: relative.into(),
                    };
                    let Compressed { originals, carry, thresholds, .. } = &*compressed;
                    let buffers = [originals, &segment.buffer, carry, thresholds];
                    let grid = [count / loops, kv_heads, 1];
                    self.recorder.dispatch(kernel, &params, &buffers, grid)?;
                    let pages = compressed.pages + count - segment.first;
                    self.usage.report(&self.device, &mut self.recorder, segment, pages)?;
                }
            }
            compressed.pages += count;
        }
        Ok(())
    }
}

/// Counts of delta words on their way from the device to the host.
#[derive(Default)]
pub(super) struct Usage {
    /// Where the counts are copied to, in the order of the reports.
    readback: Option<Buffer>,
    /// Whose counts they are, and over how many pages.
    reports: Vec<(Arc<Filled>, usize)>,
}

/// Counts that are read at a time.
const REPORTS: usize = 1024;

impl Usage {
    /// Records that a segment's count, over its first `pages`, is to be copied once the step is
    /// done.
    fn report(
        &mut self,
        device: &Device,
        recorder: &mut Recorder,
        segment: &PageSegment,
        pages: usize,
    ) -> Result<()> {
        if self.reports.len() == REPORTS {
            self.settle(recorder)?;
        }
        let readback = match self.readback.take() {
            Some(readback) => readback,
            None => {
                let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
                device.buffer("reading counts of deltas", 4 * REPORTS as u64, usage)?
            }
        };
        let place = 4 * self.reports.len() as u64;
        recorder.copy((&segment.buffer, 0), (&readback, place), 4);
        self.reports.push((Arc::clone(&segment.filled), pages));
        self.readback = Some(readback);
        Ok(())
    }

    /// Bytes held on the device.
    pub(super) fn bytes(&self) -> u64 {
        self.readback.as_ref().map_or(0, Buffer::size)
    }

    /// Waits for the counts that are on their way.
    pub(super) fn settle(&mut self, recorder: &mut Recorder) -> Result<()> {
        let Some(readback) = self.readback.as_ref().filter(|_| !self.reports.is_empty()) else {
            return Ok(());
        };
        let bytes = recorder.read(readback, 4 * self.reports.len() as u64)?;
        let counts = bytes.as_chunks().0.iter().copied().map(u32::from_le_bytes);
        for ((filled, pages), words) in self.reports.drain(..).zip(counts) {
            filled.set(pages, words);
        }
        Ok(())
    }
}
