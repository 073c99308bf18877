//! How fast all threads together multiply what is in registers.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::Machine;
use super::simd::{
    BLOCK, Kernel, Simd, TERNARY_BLOCK, TILE_COLS, TILE_ROWS, Tile, TileProducts, TileUnit,
};
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
    let (words, tiles) = (machine.level.has_fast_words(), machine.level.tiles());
    let round = || match (format, tiles) {
        (MatrixFormat::Ternary, Some(unit)) => machine.level.run(Tiled(unit)),
        (MatrixFormat::Ternary, None) => machine.level.run(Bytes),
        // Of two bytes each.
        (MatrixFormat::Q8 | MatrixFormat::Q4, Some(unit)) => machine.level.run(Tiled(unit)) / 4,
        (MatrixFormat::Q8 | MatrixFormat::Q4, None) if words => machine.level.run(Words),
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

/// Products of bytes in tiles.
struct Tiled(TileUnit);

impl Kernel for Tiled {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) -> usize {
        // As many as a part of a product has.
        let tiles = black_box([[[1; TILE_COLS]; TILE_ROWS]; 8]);
        let mut products = TileProducts::ZERO;
        let unit = self.0.begin();
        for _ in 0..REPEATS / 64 {
            unit.multiply([&tiles; 2], [&tiles; 2], &mut products, true);
            black_box(&mut products);
        }
        REPEATS / 64 * 4 * tiles.len() * size_of::<Tile>() * TILE_ROWS
    }
}
