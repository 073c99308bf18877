//! How fast all threads together read memory that no cache holds.

use std::array::from_ref;
use std::hint::black_box;
use std::time::{Duration, Instant};

use super::Machine;
use super::reading::{Reading, ask_near};
use super::simd::{Kernel, LINE, Simd};
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
            *sum = machine.level.run(Read { words: strip, reading: machine.reading });
        });
        best = start.elapsed().as_secs_f64().min(best);
        sum = strips.iter().fold(0, |sum: u32, strip| sum.wrapping_add(strip.1));
    }
    let bytes = 4 * count as u64;
    Ok(ReadSpeed { bytes_per_second: bytes as f64 / best.max(1e-9), bytes, sum })
}

/// Adds up a strip, read as one-token products read theirs.
struct Read<'a> {
    words: &'a [u32],
    reading: Reading,
}

impl Kernel for Read<'_> {
    type Output = u32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> u32 {
        match self.reading.rows::<S>() {
            4 => sum_of::<S, 4>(simd, self.words),
            2 => sum_of::<S, 2>(simd, self.words),
            _ => sum_of::<S, 1>(simd, self.words),
        }
    }
}

/// The sum of `words`, lines of `R` stretches of them at once.
#[inline(always)]
fn sum_of<S: Simd, const R: usize>(simd: S, words: &[u32]) -> u32 {
    let (lines, rest) = words.as_chunks::<{ LINE / size_of::<u32>() }>();
    let (side_by_side, last) = lines.split_at(lines.len() / R * R);
    let stretches: [_; R] = std::array::from_fn(|r| {
        let len = side_by_side.len() / R;
        &side_by_side[r * len..][..len]
    });
    let mut sums = [[0u32; LINE / size_of::<u32>()]; R];
    for i in 0..side_by_side.len() / R {
        for r in 0..R {
            let line = &stretches[r][i];
            if R > 1 {
                ask_near(simd, from_ref(bytemuck::cast_ref::<_, [u8; LINE]>(line)));
            }
            for (sum, word) in sums[r].iter_mut().zip(line) {
                *sum = sum.wrapping_add(*word);
            }
        }
    }
    let all = sums.as_flattened().iter().chain(last.as_flattened()).chain(rest);
    all.fold(0, |sum, word| sum.wrapping_add(*word))
}
