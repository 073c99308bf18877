//! How fast all threads together read memory that no cache holds.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::Machine;
use crate::backend::{ReadSpeed, read_pattern};
use crate::error::{Error, Result};

/// Time that passes are made for, of which the fastest counts: the others met other work on the
/// machine.
const TIME: Duration = Duration::from_millis(500);

/// Words that a thread takes at a time.
const STRIP: usize = (1 << 20) / 4;

pub(super) fn measure(machine: &Machine, bytes: u64) -> Result<ReadSpeed> {
    let count = bytes as usize / 4;
    let mut words = Vec::new();
    words.try_reserve_exact(count).map_err(|_| Error::DeviceMemory {
        device: machine.info.name.clone(),
        what: "memory to be read for its speed".into(),
        needed: bytes,
        held: 0,
    })?;
    words.extend((0..count as u32).map(read_pattern));
    let (mut best, mut sum, begun) = (f64::INFINITY, 0, Instant::now());
    while best.is_infinite() || begun.elapsed() < TIME {
        let strips = words.chunks(STRIP).map(|strip| (strip, 0)).collect::<Vec<_>>();
        let mut strips = black_box(strips);
        let start = Instant::now();
        machine.threads.each_of(strips.iter_mut().collect(), |_, (strip, sum)| {
            *sum = strip.iter().fold(0, |sum: u32, word| sum.wrapping_add(*word));
        });
        best = start.elapsed().as_secs_f64().min(best);
        sum = strips.iter().fold(0, |sum: u32, strip| sum.wrapping_add(strip.1));
    }
    let bytes = 4 * count as u64;
    Ok(ReadSpeed { bytes_per_second: bytes as f64 / best.max(1e-9), bytes, sum })
}
