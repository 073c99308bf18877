//! 64-bit ARM, and where there is one its 8-bit dot product.
//!
//! Three instructions stand as inline assembly, since their intrinsics are not stable in the
//! oldest compiler that this crate supports: the conversions from and to `f16`, which all
//! processors have, and `sdot`.

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use super::{BLOCK, Kernel, Simd, TERNARY_BLOCK};

/// Exists only where the processor has the instructions, `sdot` included if `DOT`.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Neon<const DOT: bool>(());

impl<const DOT: bool> Neon<DOT> {
    pub(super) fn detect() -> Option<Self> {
        let found = is_aarch64_feature_detected!("neon")
            && (!DOT || is_aarch64_feature_detected!("dotprod"));
        found.then_some(Self(()))
    }

    pub(super) fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon")]
        fn plain<K: Kernel, const DOT: bool>(simd: Neon<DOT>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        #[target_feature(enable = "neon,dotprod")]
        fn dotprod<K: Kernel, const DOT: bool>(simd: Neon<DOT>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        simd!(if DOT { dotprod(self, kernel) } else { plain(self, kernel) })
    }
}

/// Widens four `f16`.
#[inline(always)]
fn from_f16(half: uint16x4_t) -> float32x4_t {
    let out: float32x4_t;
    // SAFETY: part of every 64-bit ARM processor; works on registers.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", lateout(vreg) out, in(vreg) half,
            options(pure, nomem, nostack, preserves_flags));
    }
    out
}

/// Rounds to four `f16`, to nearest even.
#[inline(always)]
fn to_f16(x: float32x4_t) -> uint16x4_t {
    let out: uint16x4_t;
    // SAFETY: part of every 64-bit ARM processor; works on registers.
    unsafe {
        asm!("fcvtn {0:v}.4h, {1:v}.4s", lateout(vreg) out, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
    }
    out
}

/// Four fields of a word, each shifted to its low end.
#[inline(always)]
fn fields(word: u32, shifts: [i32; 4], mask: u32) -> float32x4_t {
    // SAFETY: part of every 64-bit ARM processor; four shifts are read.
    unsafe {
        let shifted = vshlq_u32(vdupq_n_u32(word), vld1q_s32(shifts.as_ptr()));
        vcvtq_f32_u32(vandq_u32(shifted, vdupq_n_u32(mask)))
    }
}

/// The lower four bits of each byte of a word, shifted to the left by `shift`.
#[inline(always)]
fn fields_of_bytes(word: u32, shift: i8) -> float32x4_t {
    simd! {
        let bytes = vshl_u8(vreinterpret_u8_u32(vdup_n_u32(word)), vdup_n_s8(shift));
        let words = vmovl_u8(vand_u8(bytes, vdup_n_u8(15)));
        vcvtq_f32_u32(vmovl_u16(vget_low_u16(words)))
    }
}

impl<const DOT: bool> Simd for Neon<DOT> {
    type Floats = float32x4_t;
    type Bytes = int8x16_t;
    /// Without `sdot`, eight 16-bit sums in the same register.
    type Sums = int32x4_t;
    type Words = [int16x8_t; 4];
    type Ints = int32x4_t;

    const LANES: usize = 4;
    const BYTES: usize = 16;
    // Without sdot, sums are of 16 bits: a step adds two products of at most 2 * 128, and a block
    // has four steps: 15 * 4 * 512 = 30,720 still fits. (A field of 3 is malformed, and no sum of
    // it means anything.)
    const DOT_BLOCKS: usize = if DOT { 1024 } else { 15 };
    // Signed bytes hold all fields where they are but the highest.
    const FIELD_SHIFTS: [u32; 4] = if DOT { [0, 2, 4, 0] } else { [0; 4] };
    const TILE: usize = 4;
    // Four products an instruction either way, and fewer processors do two of these a cycle.
    const FAST_WORDS: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        simd!(vdupq_n_f32(x))
    }

    #[inline(always)]
    fn load(self, from: &[f32; BLOCK], i: usize) -> float32x4_t {
        memory!(from[i * 4, 4] => |p| vld1q_f32(p))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; BLOCK], i: usize, x: float32x4_t) {
        memory!(mut to[i * 4, 4] => |p| vst1q_f32(p, x));
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 4 * BLOCK], i: usize) -> float32x4_t {
        memory!(from[i * 16, 16] => |p| vreinterpretq_f32_u8(vld1q_u8(p)))
    }

    #[inline(always)]
    fn load_f16(self, from: &[u8; 2 * BLOCK], i: usize) -> float32x4_t {
        from_f16(memory!(from[i * 8, 8] => |p| vreinterpret_u16_u8(vld1_u8(p))))
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 2 * BLOCK], i: usize) -> float32x4_t {
        let half = memory!(from[i * 8, 8] => |p| vreinterpret_u16_u8(vld1_u8(p)));
        simd!(vreinterpretq_f32_u32(vshll_n_u16::<16>(half)))
    }

    #[inline(always)]
    fn load_i8(self, from: &[u8; BLOCK], i: usize) -> float32x4_t {
        let at = i * 4;
        let word = u32::from_le_bytes([from[at], from[at + 1], from[at + 2], from[at + 3]]);
        simd! {
            let words = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(word)));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)))
        }
    }

    #[inline(always)]
    fn load_u4(self, from: &[u8; BLOCK / 2], i: usize) -> float32x4_t {
        let word = u32::from(u16::from_le_bytes([from[2 * i], from[2 * i + 1]]));
        fields(word, [0, -4, -8, -12], 15)
    }

    #[inline(always)]
    fn load_u4_apart(self, from: &[u8; BLOCK / 2], i: usize) -> float32x4_t {
        let at = i / 2 * 4;
        let word = u32::from_le_bytes([from[at], from[at + 1], from[at + 2], from[at + 3]]);
        let shift = [0, -4][i % 2];
        fields_of_bytes(word, shift)
    }

    #[inline(always)]
    fn load_u2(self, from: &[u8; BLOCK / 4], i: usize) -> float32x4_t {
        fields(u32::from(from[i]), [0, -2, -4, -6], 3)
    }

    #[inline(always)]
    fn splat_f16(self, bits: u16) -> float32x4_t {
        from_f16(simd!(vdup_n_u16(bits)))
    }

    #[inline(always)]
    fn store_f16(self, to: &mut [u16; BLOCK], i: usize, x: float32x4_t) {
        memory!(mut to[i * 4, 4] => |p| vst1_u16(p, to_f16(x)));
    }

    #[inline(always)]
    fn store_i8(self, to: &mut [i8; BLOCK], i: usize, x: float32x4_t) {
        let mut bytes = [0; 8];
        let narrow = simd! {
            let words = vqmovn_s32(vcvtnq_s32_f32(x));
            vqmovn_s16(vcombine_s16(words, words))
        };
        memory!(mut bytes[0, 8] => |p| vst1_s8(p, narrow));
        to[i * 4..][..4].copy_from_slice(&bytes[..4]);
    }

    #[inline(always)]
    fn store_i16(self, to: &mut [i16; BLOCK], i: usize, x: float32x4_t) {
        let words = simd!(vqmovn_s32(vcvtnq_s32_f32(x)));
        memory!(mut to[i * 4, 4] => |p| vst1_s16(p, words));
    }

    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        simd!(vaddq_f32(a, b))
    }

    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        simd!(vsubq_f32(a, b))
    }

    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        simd!(vmulq_f32(a, b))
    }

    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        simd!(vdivq_f32(a, b))
    }

    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        simd!(vfmaq_f32(c, a, b))
    }

    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        simd!(vmaxq_f32(a, b))
    }

    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        simd!(vminq_f32(a, b))
    }

    #[inline(always)]
    fn round(self, x: float32x4_t) -> float32x4_t {
        simd!(vrndnq_f32(x))
    }

    #[inline(always)]
    fn exp2_whole(self, n: float32x4_t) -> float32x4_t {
        simd! {
            let exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))
        }
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [float32x4_t; 4]) -> [f32; 4] {
        simd!(std::mem::transmute(vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))))
    }

    #[inline(always)]
    fn max_lane(self, x: float32x4_t) -> f32 {
        simd!(vmaxvq_f32(x))
    }

    #[inline(always)]
    fn bytes(self, from: &[i8; TERNARY_BLOCK], i: usize) -> int8x16_t {
        memory!(from[i * 16, 16] => |p| vld1q_s8(p))
    }

    #[inline(always)]
    fn fields(self, from: &[u8; TERNARY_BLOCK], i: usize) -> [int8x16_t; 4] {
        let packed = memory!(from[i * 16, 16] => |p| vld1q_u8(p));
        simd! {
            let (low, second, third) = if DOT {
                let second = vandq_u8(packed, vdupq_n_u8(0b1100));
                let third = vandq_u8(packed, vdupq_n_u8(0b11_0000));
                (vandq_u8(packed, vdupq_n_u8(0b11)), second, third)
            } else {
                let mask = vdupq_n_u8(0b11);
                let second = vandq_u8(vshrq_n_u8::<2>(packed), mask);
                let third = vandq_u8(vshrq_n_u8::<4>(packed), mask);
                (vandq_u8(packed, mask), second, third)
            };
            [
                vreinterpretq_s8_u8(low),
                vreinterpretq_s8_u8(second),
                vreinterpretq_s8_u8(third),
                vreinterpretq_s8_u8(vshrq_n_u8::<6>(packed)),
            ]
        }
    }

    #[inline(always)]
    fn no_sums(self) -> int32x4_t {
        simd!(vdupq_n_s32(0))
    }

    #[inline(always)]
    fn dot(self, sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
        if DOT {
            let mut out = sums;
            // SAFETY: the token says that the processor has the instruction; works on registers.
            unsafe {
                asm!(".arch_extension dotprod", "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
                    inout(vreg) out, in(vreg) codes, in(vreg) x,
                    options(pure, nomem, nostack, preserves_flags));
            }
            out
        } else {
            simd! {
                let sums = vreinterpretq_s16_s32(sums);
                let sums = vmlal_s8(sums, vget_low_s8(codes), vget_low_s8(x));
                vreinterpretq_s32_s16(vmlal_high_s8(sums, codes, x))
            }
        }
    }

    #[inline(always)]
    fn total4(self, [a, b, c, d]: [int32x4_t; 4]) -> [i32; 4] {
        simd! {
            let [a, b, c, d] = if DOT {
                [a, b, c, d]
            } else {
                [
                    vpaddlq_s16(vreinterpretq_s16_s32(a)),
                    vpaddlq_s16(vreinterpretq_s16_s32(b)),
                    vpaddlq_s16(vreinterpretq_s16_s32(c)),
                    vpaddlq_s16(vreinterpretq_s16_s32(d)),
                ]
            };
            std::mem::transmute(vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)))
        }
    }

    #[inline(always)]
    fn words_i8(self, from: &[u8; BLOCK]) -> [int16x8_t; 4] {
        let low = memory!(from[0, 16] => |p| vreinterpretq_s8_u8(vld1q_u8(p)));
        let high = memory!(from[16, 16] => |p| vreinterpretq_s8_u8(vld1q_u8(p)));
        simd! {
            [
                vmovl_s8(vget_low_s8(low)),
                vmovl_high_s8(low),
                vmovl_s8(vget_low_s8(high)),
                vmovl_high_s8(high),
            ]
        }
    }

    #[inline(always)]
    fn add_u4(
        self,
        sums: [float32x4_t; 4],
        from: &[[u8; BLOCK / 2]; 4],
        x: [[int16x8_t; 4]; 4],
        scales: &[f32; 4],
    ) -> [float32x4_t; 4] {
        let mut words = x;
        for (words, from) in words.iter_mut().zip(from) {
            let bytes = memory!(from[0, 16] => |p| vld1q_u8(p));
            *words = simd! {
                let eight = vdupq_n_s8(8);
                let lower = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), eight);
                let upper = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8::<4>(bytes)), eight);
                [
                    vmovl_s8(vget_low_s8(lower)),
                    vmovl_high_s8(lower),
                    vmovl_s8(vget_low_s8(upper)),
                    vmovl_high_s8(upper),
                ]
            };
        }
        self.add_blocks(sums, words, x, scales)
    }

    /// The first half of a block has the lower fields, the second the upper ones.
    #[inline(always)]
    fn words_apart(self, blocks: &mut [[i16; BLOCK]; 4]) {
        for block in blocks {
            let [a, b, c, d] = self.words(block);
            let apart =
                simd!([vuzp1q_s16(a, b), vuzp1q_s16(c, d), vuzp2q_s16(a, b), vuzp2q_s16(c, d)]);
            for (i, words) in apart.into_iter().enumerate() {
                memory!(mut block[8 * i, 8] => |p| vst1q_s16(p, words));
            }
        }
    }

    #[inline(always)]
    fn words(self, from: &[i16; BLOCK]) -> [int16x8_t; 4] {
        [
            memory!(from[0, 8] => |p| vld1q_s16(p)),
            memory!(from[8, 8] => |p| vld1q_s16(p)),
            memory!(from[16, 8] => |p| vld1q_s16(p)),
            memory!(from[24, 8] => |p| vld1q_s16(p)),
        ]
    }

    #[inline(always)]
    fn no_ints(self) -> int32x4_t {
        simd!(vdupq_n_s32(0))
    }

    #[inline(always)]
    fn dot_words(self, sums: int32x4_t, a: [int16x8_t; 4], b: [int16x8_t; 4]) -> int32x4_t {
        simd! {
            // Two chains of sums, since each waits for the one before.
            let mut low = sums;
            let mut high = vdupq_n_s32(0);
            for i in 0..4 {
                low = vmlal_s16(low, vget_low_s16(a[i]), vget_low_s16(b[i]));
                high = vmlal_high_s16(high, a[i], b[i]);
            }
            vaddq_s32(low, high)
        }
    }

    #[inline(always)]
    fn floats(self, ints: int32x4_t) -> float32x4_t {
        simd!(vcvtq_f32_s32(ints))
    }
}
