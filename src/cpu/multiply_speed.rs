//! How fast all threads together multiply what is in registers.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::Machine;
use super::simd::{BLOCK, Kernel, Simd, TERNARY_BLOCK};
use crate::backend::MatrixFormat;

/// Time that rounds are made for, of which the fastest counts: the others met other work on the
/// machine.
const TIME: Duration = Duration::from_millis(100);

/// Repetitions of a round, a fraction of a millisecond.
const REPEATS: usize = 20_000;

/// Independent sums, so that none waits for the one before.
const SUMS: usize = 12;

/// Multiply-adds a second, of the kind that weights of a format are multiplied by.
pub(super) fn measure(machine: &Machine, format: MatrixFormat) -> f64 {
    let words = machine.level.has_fast_words();
    let round = || match format {
        MatrixFormat::Ternary => machine.level.run(Bytes),
        MatrixFormat::Q8 | MatrixFormat::Q4 if words => machine.level.run(Words),
        _ => machine.level.run(Floats),
    };
    let threads = machine.threads.count();
    let (mut best, begun) = (f64::INFINITY, Instant::now());
    let mut count = 0;
    while best.is_infinite() || begun.elapsed() < TIME {
        let mut counts = vec![0; threads];
        let start = Instant::now();
        machine.threads.each_of(counts.iter_mut().collect(), |_, count| *count = round());
        best = start.elapsed().as_secs_f64().min(best);
        count = counts.iter().sum();
    }
    count as f64 / best.max(1e-9)
}

/// Products of floats; each kernel gives how many it made.
struct Floats;

impl Kernel for Floats {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        let (a, b) = (simd.splat(black_box(0.5)), simd.splat(black_box(1.0)));
        let mut sums = [b; SUMS];
        for _ in 0..REPEATS {
            for sum in &mut sums {
                *sum = simd.fma(*sum, a, b);
            }
        }
        black_box(sums.map(|sum| simd.sum(sum)));
        REPEATS * SUMS * S::LANES
    }
}

/// Products of 16-bit integers.
struct Words;

impl Kernel for Words {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        let a: [_; 4] = std::array::from_fn(|i| simd.words(&[i as i16; BLOCK]));
        let mut b: [_; SUMS / 4] = std::array::from_fn(|i| simd.words(&[i as i16; BLOCK]));
        let mut sums = [simd.no_ints(); SUMS];
        for _ in 0..REPEATS {
            // Or the products would be made once, since they do not change.
            b = black_box(b);
            for i in 0..SUMS {
                sums[i] = simd.dot_words(sums[i], a[i % 4], b[i / 4]);
            }
        }
        black_box(sums.map(|sum| simd.sum(simd.floats(sum))));
        REPEATS * SUMS * BLOCK
    }
}

/// Products of bytes.
struct Bytes;

impl Kernel for Bytes {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        let codes = simd.fields(&black_box([0b1001_0001; TERNARY_BLOCK]), 0);
        let mut x: [_; SUMS / 4] =
            std::array::from_fn(|i| simd.bytes(&[i as i8; TERNARY_BLOCK], 0));
        let mut totals = [0; 4];
        // Some sums are of 16 bits.
        let steps = S::DOT_BLOCKS.min(REPEATS);
        for _ in 0..REPEATS / steps {
            let mut sums = [[simd.no_sums(); 4]; SUMS / 4];
            for _ in 0..steps {
                x = black_box(x);
                for (sums, x) in sums.iter_mut().zip(x) {
                    for field in 0..4 {
                        sums[field] = simd.dot(sums[field], codes[field], x);
                    }
                }
            }
            for sums in sums {
                let sums = simd.total4(sums);
                for field in 0..4 {
                    totals[field] += sums[field] >> S::FIELD_SHIFTS[field];
                }
            }
        }
        black_box(totals);
        REPEATS / steps * steps * SUMS * S::BYTES
    }
}
