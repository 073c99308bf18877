//! Plain Rust for every processor; the compiler vectorises what it can.

use half::{bf16, f16};

use super::{BLOCK, Simd, TERNARY_BLOCK};

/// Needs nothing.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Portable;

const LANES: usize = 8;
const BYTES: usize = 16;

#[inline(always)]
fn map(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

#[inline(always)]
fn two(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]])
}

impl Simd for Portable {
    type Floats = [f32; LANES];
    type Bytes = [u8; BYTES];
    type Sums = [i32; BYTES];
    type Words = [i16; BLOCK];
    type Ints = [i32; LANES];

    const LANES: usize = LANES;
    const BYTES: usize = BYTES;
    const DOT_BLOCKS: usize = usize::MAX;
    const FIELD_SHIFTS: [u32; 4] = [0; 4];
    const TILE: usize = 2;
    const FAST_WORDS: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; LANES] {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; BLOCK], i: usize) -> [f32; LANES] {
        map(|l| from[i * LANES + l])
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; BLOCK], i: usize, x: [f32; LANES]) {
        to[i * LANES..][..LANES].copy_from_slice(&x);
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 4 * BLOCK], i: usize) -> [f32; LANES] {
        map(|l| {
            let at = 4 * (i * LANES + l);
            f32::from_le_bytes([from[at], from[at + 1], from[at + 2], from[at + 3]])
        })
    }

    #[inline(always)]
    fn load_f16(self, from: &[u8; 2 * BLOCK], i: usize) -> [f32; LANES] {
        map(|l| f16::from_bits(two(from, i * LANES + l)).to_f32())
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 2 * BLOCK], i: usize) -> [f32; LANES] {
        map(|l| bf16::from_bits(two(from, i * LANES + l)).to_f32())
    }

    #[inline(always)]
    fn load_i8(self, from: &[u8; BLOCK], i: usize) -> [f32; LANES] {
        map(|l| f32::from(from[i * LANES + l] as i8))
    }

    #[inline(always)]
    fn load_u4(self, from: &[u8; BLOCK / 2], i: usize) -> [f32; LANES] {
        map(|l| f32::from(from[(i * LANES + l) / 2] >> (4 * (l % 2)) & 15))
    }

    #[inline(always)]
    fn load_u4_apart(self, from: &[u8; BLOCK / 2], i: usize) -> [f32; LANES] {
        map(|l| f32::from(from[i / 2 * LANES + l] >> (4 * (i % 2)) & 15))
    }

    #[inline(always)]
    fn load_u2(self, from: &[u8; BLOCK / 4], i: usize) -> [f32; LANES] {
        map(|l| f32::from(from[(i * LANES + l) / 4] >> (2 * (l % 4)) & 3))
    }

    #[inline(always)]
    fn splat_f16(self, bits: u16) -> [f32; LANES] {
        [f16::from_bits(bits).to_f32(); LANES]
    }

    #[inline(always)]
    fn store_f16(self, to: &mut [u16; BLOCK], i: usize, x: [f32; LANES]) {
        for (to, x) in to[i * LANES..].iter_mut().zip(x) {
            *to = f16::from_f32(x).to_bits();
        }
    }

    #[inline(always)]
    fn store_i8(self, to: &mut [i8; BLOCK], i: usize, x: [f32; LANES]) {
        for (to, x) in to[i * LANES..].iter_mut().zip(x) {
            *to = x.round_ties_even() as i8;
        }
    }

    #[inline(always)]
    fn store_i16(self, to: &mut [i16; BLOCK], i: usize, x: [f32; LANES]) {
        for (to, x) in to[i * LANES..].iter_mut().zip(x) {
            *to = x.round_ties_even() as i16;
        }
    }

    #[inline(always)]
    fn add(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        map(|l| a[l] + b[l])
    }

    #[inline(always)]
    fn sub(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        map(|l| a[l] - b[l])
    }

    #[inline(always)]
    fn mul(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        map(|l| a[l] * b[l])
    }

    #[inline(always)]
    fn div(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        map(|l| a[l] / b[l])
    }

    #[inline(always)]
    fn fma(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        // Not `mul_add`, which is a call of the C library where there is no instruction.
        map(|l| a[l] * b[l] + c[l])
    }

    #[inline(always)]
    fn max(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        map(|l| if a[l] > b[l] { a[l] } else { b[l] })
    }

    #[inline(always)]
    fn min(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        map(|l| if a[l] < b[l] { a[l] } else { b[l] })
    }

    #[inline(always)]
    fn round(self, x: [f32; LANES]) -> [f32; LANES] {
        // 1.5 * 2^23: adding it leaves no place for a fraction. For |x| below 2^22, as here.
        map(|l| (x[l] + 12_582_912.0) - 12_582_912.0)
    }

    #[inline(always)]
    fn exp2_whole(self, n: [f32; LANES]) -> [f32; LANES] {
        map(|l| f32::from_bits(((n[l] as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    fn sum4(self, x: [[f32; LANES]; 4]) -> [f32; 4] {
        x.map(|x| x.iter().sum())
    }

    #[inline(always)]
    fn max_lane(self, x: [f32; LANES]) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn bytes(self, from: &[i8; TERNARY_BLOCK], i: usize) -> [u8; BYTES] {
        std::array::from_fn(|l| from[i * BYTES + l] as u8)
    }

    #[inline(always)]
    fn fields(self, from: &[u8; TERNARY_BLOCK], i: usize) -> [[u8; BYTES]; 4] {
        std::array::from_fn(|field| std::array::from_fn(|l| from[i * BYTES + l] >> (2 * field) & 3))
    }

    #[inline(always)]
    fn no_sums(self) -> [i32; BYTES] {
        [0; BYTES]
    }

    #[inline(always)]
    fn dot(self, sums: [i32; BYTES], codes: [u8; BYTES], x: [u8; BYTES]) -> [i32; BYTES] {
        // At most 3 * 128, so that 16 bits hold a product and SSE2 can multiply.
        std::array::from_fn(|l| sums[l] + i32::from(i16::from(codes[l]) * i16::from(x[l] as i8)))
    }

    #[inline(always)]
    fn total4(self, x: [[i32; BYTES]; 4]) -> [i32; 4] {
        x.map(|x| x.iter().sum())
    }

    #[inline(always)]
    fn words_i8(self, from: &[u8; BLOCK]) -> [i16; BLOCK] {
        from.map(|byte| i16::from(byte as i8))
    }

    #[inline(always)]
    fn add_u4(
        self,
        sums: [[f32; LANES]; 4],
        from: &[[u8; BLOCK / 2]; 4],
        x: [[i16; BLOCK]; 4],
        scales: &[f32; 4],
    ) -> [[f32; LANES]; 4] {
        let words = from.map(|from| {
            std::array::from_fn(|i| {
                i16::from(from[i % (BLOCK / 2)] >> (4 * (i / (BLOCK / 2))) & 15) - 8
            })
        });
        self.add_blocks(sums, words, x, scales)
    }

    /// The first half of a block has the lower fields, the second the upper ones.
    #[inline(always)]
    fn words_apart(self, blocks: &mut [[i16; BLOCK]; 4]) {
        for block in blocks {
            let words = *block;
            *block = std::array::from_fn(|i| words[2 * (i % (BLOCK / 2)) + i / (BLOCK / 2)]);
        }
    }

    #[inline(always)]
    fn words(self, from: &[i16; BLOCK]) -> [i16; BLOCK] {
        *from
    }

    #[inline(always)]
    fn no_ints(self) -> [i32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    fn dot_words(self, sums: [i32; LANES], a: [i16; BLOCK], b: [i16; BLOCK]) -> [i32; LANES] {
        // Pairs of neighbours, which SSE2 multiplies and adds in one instruction.
        std::array::from_fn(|l| {
            let pair = |i: usize| {
                i32::from(a[i]) * i32::from(b[i]) + i32::from(a[i + 1]) * i32::from(b[i + 1])
            };
            sums[l] + pair(2 * l) + pair(2 * (l + LANES))
        })
    }

    #[inline(always)]
    fn floats(self, ints: [i32; LANES]) -> [f32; LANES] {
        map(|l| ints[l] as f32)
    }
}
