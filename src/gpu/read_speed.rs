//! How fast the device reads memory that no cache holds: the ceiling of what is bound by it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::buffer::Buffer;
use super::device::Device;
use super::recorder::Recorder;
use super::shader::{Binding, Kernel, Program, wgsl};
use crate::backend::{ReadSpeed, read_pattern};
use crate::error::Result;

/// Bytes that a workgroup reads.
const PIECE: u64 = 64 << 10;

/// Invocations of a workgroup, each of which leaves a sum.
const INVOCATIONS: u64 = 64;

/// Bytes that are written to the device at a time.
const WRITE: u64 = 8 << 20;

/// Time that a timed submission takes at least, so that submitting it does not count.
const LONG_ENOUGH: Duration = Duration::from_millis(50);

/// Timed submissions, of which the fastest counts: so many, or fewer on a slow device.
const ROUNDS: usize = 5;

/// Time after which no further submission is timed.
const PATIENCE: Duration = Duration::from_secs(1);

pub(super) fn program() -> Program {
    Program {
        constants: Vec::new(),
        parts: vec![wgsl!("read_speed.wgsl")],
        bindings: vec![(1, Binding::Read), (2, Binding::Write)],
        f16: false,
    }
}

/// What one binding covers.
struct Part {
    data: Buffer,
    sums: Buffer,
    pieces: u64,
}

pub(super) fn measure(device: &Arc<Device>, bytes: u64) -> Result<ReadSpeed> {
    // A grid has at most 65535 workgroups.
    let most = device.max_binding.min(65_535 * PIECE) / PIECE;
    let (mut left, mut parts) = ((bytes / PIECE).max(1), Vec::new());
    let mut word = 0;
    while left > 0 {
        let pieces = left.min(most);
        parts.push(part(device, pieces, &mut word)?);
        left -= pieces;
    }
    let bytes = parts.iter().map(|part| part.pieces * PIECE).sum::<u64>();

    let mut recorder = Recorder::new(Arc::clone(device))?;
    let mut read = |passes: u32| -> Result<Duration> {
        let start = Instant::now();
        for _ in 0..passes {
            for part in &parts {
                let grid = [part.pieces as usize, 1, 1];
                recorder.dispatch(Kernel::ReadSpeed, &0u32, &[&part.data, &part.sums], grid)?;
            }
        }
        recorder.submit()?;
        device.wait(None)?;
        Ok(start.elapsed())
    };
    read(1)?;
    let once = read(1)?;
    let passes = LONG_ENOUGH.div_duration_f64(once.max(Duration::from_nanos(1))).ceil();
    let passes = passes.clamp(1.0, 64.0) as u32;
    let (mut best, begun) = (once, Instant::now());
    for _ in 0..ROUNDS {
        best = best.min(read(passes)? / passes);
        if begun.elapsed() > PATIENCE {
            break;
        }
    }
    let mut sum = 0u32;
    for part in &parts {
        let sums = part.pieces * INVOCATIONS * 4;
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let readback = device.buffer("reading sums", sums, usage)?;
        recorder.copy((&part.sums, 0), (&readback, 0), sums);
        let sums: Vec<u32> = bytemuck::pod_collect_to_vec(&recorder.read(&readback, sums)?);
        sum = sums.iter().fold(sum, |sum, word| sum.wrapping_add(*word));
    }
    Ok(ReadSpeed { bytes_per_second: bytes as f64 / best.as_secs_f64().max(1e-9), bytes, sum })
}

/// A buffer with the pattern from `word` on.
fn part(device: &Arc<Device>, pieces: u64, word: &mut u32) -> Result<Part> {
    let bytes = pieces * PIECE;
    let data = device.storage("memory to be read for its speed", bytes)?;
    for at in (0..bytes).step_by(WRITE as usize) {
        let count = (bytes - at).min(WRITE) as u32 / 4;
        let words: Vec<u32> = (*word..*word + count).map(read_pattern).collect();
        device.write(&data, at, bytemuck::cast_slice(&words))?;
        *word += count;
        // Or all of it would wait in staging memory.
        let submission = device.submit(None)?;
        device.wait(Some(submission))?;
    }
    let sums = device.storage("sums", pieces * INVOCATIONS * 4)?;
    Ok(Part { data, sums, pieces })
}
