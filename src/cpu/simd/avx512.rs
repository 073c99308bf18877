//! AVX-512 (F, BW, VL, DQ) with VNNI: Ice Lake, Zen 4 and later.

use std::arch::x86_64::*;

use super::{BLOCK, Kernel, Simd, TERNARY_BLOCK};

/// The places of every second word of two vectors, from the first on and from the second on.
const EVEN: [i16; BLOCK] = every_second(0);
const ODD: [i16; BLOCK] = every_second(1);

const fn every_second(first: i16) -> [i16; BLOCK] {
    let mut places = [first; BLOCK];
    let mut i = 1;
    while i < BLOCK {
        places[i] = places[i - 1] + 2;
        i += 1;
    }
    places
}

/// Exists only where the processor has the instructions.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx512(());

impl Avx512 {
    pub(super) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt");
        found.then_some(Self(()))
    }

    pub(super) fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(
            enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2,popcnt"
        )]
        fn inner<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        simd!(inner(self, kernel))
    }
}

/// The level of each of the sixteen fields of 4 bits in the lower half of `packed`.
#[inline(always)]
fn nibbles(packed: __m128i, levels: __m512) -> __m512 {
    simd! {
        // The fields of the first word go to the lower eight lanes, those of the second above.
        let places = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        let shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        let words = _mm512_permutexvar_epi32(places, _mm512_castsi128_si512(packed));
        // A permutation looks at the lowest four bits alone.
        _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), levels)
    }
}

impl Simd for Avx512 {
    type Floats = __m512;
    type Bytes = __m512i;
    type Sums = __m512i;
    type Words = __m512i;
    type Ints = __m512i;

    const LANES: usize = 16;
    const BYTES: usize = 64;
    // Fields stay where they are: unsigned 8 bits hold 3 << 6, and 32 bits the sum of 65,536
    // columns.
    const DOT_BLOCKS: usize = 1024;
    const FIELD_SHIFTS: [u32; 4] = [0, 2, 4, 6];
    const TILE: usize = 4;
    const FAST_WORDS: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        simd!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, from: &[f32; BLOCK], i: usize) -> __m512 {
        memory!(from[i * 16, 16] => |p| _mm512_loadu_ps(p))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; BLOCK], i: usize, x: __m512) {
        memory!(mut to[i * 16, 16] => |p| _mm512_storeu_ps(p, x));
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 4 * BLOCK], i: usize) -> __m512 {
        memory!(from[i * 64, 64] => |p| _mm512_loadu_ps(p.cast()))
    }

    #[inline(always)]
    fn load_f16(self, from: &[u8; 2 * BLOCK], i: usize) -> __m512 {
        memory!(from[i * 32, 32] => |p| _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())))
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 2 * BLOCK], i: usize) -> __m512 {
        let half = memory!(from[i * 32, 32] => |p| _mm256_loadu_si256(p.cast()));
        simd!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half))))
    }

    #[inline(always)]
    fn load_i8(self, from: &[u8; BLOCK], i: usize) -> __m512 {
        let bytes = memory!(from[i * 16, 16] => |p| _mm_loadu_si128(p.cast()));
        simd!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)))
    }

    #[inline(always)]
    fn load_u4(self, from: &[u8; BLOCK / 2], i: usize) -> __m512 {
        let packed = memory!(from[i * 8, 8] => |p| _mm_loadl_epi64(p.cast()));
        let levels = simd!(_mm512_setr_ps(
            0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
        ));
        nibbles(packed, levels)
    }

    #[inline(always)]
    fn load_u4_apart(self, from: &[u8; BLOCK / 2], i: usize) -> __m512 {
        let pairs = memory!(from[0, 16] => |p| _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())));
        simd!(_mm512_cvtepi32_ps(if i == 0 {
            _mm512_and_si512(pairs, _mm512_set1_epi32(15))
        } else {
            _mm512_srli_epi32::<4>(pairs)
        }))
    }

    #[inline(always)]
    fn load_u2(self, from: &[u8; BLOCK / 4], i: usize) -> __m512 {
        let at = 4 * i;
        let word = i32::from_le_bytes([from[at], from[at + 1], from[at + 2], from[at + 3]]);
        simd! {
            let shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let fields = _mm512_srlv_epi32(_mm512_set1_epi32(word), shifts);
            // A permutation looks at four bits, here at those of the next field, too.
            let levels = _mm512_setr_ps(
                0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0,
            );
            _mm512_permutexvar_ps(fields, levels)
        }
    }

    #[inline(always)]
    fn expand_f16(self, from: &[u8; 32], mask: u32) -> __m512 {
        let packed = memory!(from[0, 32] => |p| _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())));
        simd!(_mm512_maskz_expand_ps(mask as u16, packed))
    }

    #[inline(always)]
    fn expand_i8(self, from: &[u8; 16], mask: u32) -> __m512 {
        let packed = memory!(from[0, 16] => |p| _mm_loadu_si128(p.cast()));
        simd! {
            let words = _mm512_cvtepi8_epi32(packed);
            _mm512_cvtepi32_ps(_mm512_maskz_expand_epi32(mask as u16, words))
        }
    }

    #[inline(always)]
    fn expand_i4(self, from: u64, mask: u32) -> __m512 {
        simd! {
            // Each bit of the mask makes the four of a field, to which the fields are moved.
            let places = 15 * _pdep_u64(u64::from(mask), 0x1111_1111_1111_1111);
            let placed = _mm_cvtsi64_si128(_pdep_u64(from, places) as i64);
            let levels = _mm512_setr_ps(
                0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0,
            );
            nibbles(placed, levels)
        }
    }

    #[inline(always)]
    fn splat_f16(self, bits: u16) -> __m512 {
        simd!(_mm512_cvtph_ps(_mm256_set1_epi16(bits as i16)))
    }

    #[inline(always)]
    fn store_f16(self, to: &mut [u16; BLOCK], i: usize, x: __m512) {
        let half = simd!(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
        memory!(mut to[i * 16, 16] => |p| _mm256_storeu_si256(p.cast(), half));
    }

    #[inline(always)]
    fn store_i8(self, to: &mut [i8; BLOCK], i: usize, x: __m512) {
        let bytes = simd!(_mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
        memory!(mut to[i * 16, 16] => |p| _mm_storeu_si128(p.cast(), bytes));
    }

    #[inline(always)]
    fn store_i16(self, to: &mut [i16; BLOCK], i: usize, x: __m512) {
        let words = simd!(_mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
        memory!(mut to[i * 16, 16] => |p| _mm256_storeu_si256(p.cast(), words));
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        simd!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        simd!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        simd!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        simd!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        simd!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        simd!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        simd!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn round(self, x: __m512) -> __m512 {
        simd!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x))
    }

    #[inline(always)]
    fn exp2_whole(self, n: __m512) -> __m512 {
        simd!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
            _mm512_cvtps_epi32(n),
            _mm512_set1_epi32(127)
        ))))
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        simd! {
            // Within each 128 bits: [a a b b], [c c d d], then [a b c d].
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            let x = _mm512_add_ps(low, high);
            let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            std::mem::transmute(x)
        }
    }

    #[inline(always)]
    fn max_lane(self, x: __m512) -> f32 {
        simd!(_mm512_reduce_max_ps(x))
    }

    #[inline(always)]
    fn bytes(self, from: &[i8; TERNARY_BLOCK], _i: usize) -> __m512i {
        memory!(from[0, 64] => |p| _mm512_loadu_si512(p.cast()))
    }

    #[inline(always)]
    fn fields(self, from: &[u8; TERNARY_BLOCK], _i: usize) -> [__m512i; 4] {
        let packed = memory!(from[0, 64] => |p| _mm512_loadu_si512(p.cast()));
        simd! {
            [
                _mm512_and_si512(packed, _mm512_set1_epi8(0b11)),
                _mm512_and_si512(packed, _mm512_set1_epi8(0b1100)),
                _mm512_and_si512(packed, _mm512_set1_epi8(0b11_0000)),
                _mm512_and_si512(packed, _mm512_set1_epi8(0b1100_0000u8 as i8)),
            ]
        }
    }

    #[inline(always)]
    fn no_sums(self) -> __m512i {
        simd!(_mm512_setzero_si512())
    }

    #[inline(always)]
    fn dot(self, sums: __m512i, codes: __m512i, x: __m512i) -> __m512i {
        simd!(_mm512_dpbusd_epi32(sums, codes, x))
    }

    #[inline(always)]
    fn total4(self, [a, b, c, d]: [__m512i; 4]) -> [i32; 4] {
        simd! {
            // As in `sum4`.
            let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            let (low, high) = (_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
            let x = _mm512_add_epi32(low, high);
            let x = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x));
            let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            std::mem::transmute(x)
        }
    }

    #[inline(always)]
    fn words_i8(self, from: &[u8; BLOCK]) -> __m512i {
        memory!(from[0, 32] => |p| _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.cast())))
    }

    /// Vector `i` has every fourth column, from column `i` on: each of the four fields of a word.
    #[inline(always)]
    fn words_apart(self, blocks: &mut [[i16; BLOCK]; 4]) {
        let (even, odd) = (self.words(&EVEN), self.words(&ODD));
        let [a, b, c, d] = [
            self.words(&blocks[0]),
            self.words(&blocks[1]),
            self.words(&blocks[2]),
            self.words(&blocks[3]),
        ];
        let apart = simd! {
            let (ab, cd) = (_mm512_permutex2var_epi16(a, even, b), _mm512_permutex2var_epi16(c, even, d));
            let (xy, zw) = (_mm512_permutex2var_epi16(a, odd, b), _mm512_permutex2var_epi16(c, odd, d));
            [
                _mm512_permutex2var_epi16(ab, even, cd),
                _mm512_permutex2var_epi16(xy, even, zw),
                _mm512_permutex2var_epi16(ab, odd, cd),
                _mm512_permutex2var_epi16(xy, odd, zw),
            ]
        };
        for (block, words) in blocks.iter_mut().zip(apart) {
            memory!(mut block[0, 32] => |p| _mm512_storeu_si512(p.cast(), words));
        }
    }

    /// Fourteen instructions for 128 columns, loads apart: a word has four fields, of which the upper one of each byte
    /// stays where it is, sixteen times as large, until the sum is known.
    #[inline(always)]
    fn add_u4(
        self,
        [sums, b, c, d]: [__m512; 4],
        from: &[[u8; BLOCK / 2]; 4],
        x: [__m512i; 4],
        scales: &[f32; 4],
    ) -> [__m512; 4] {
        let from = from.as_flattened();
        let fields = memory!(from[0, 64] => |p| _mm512_loadu_si512(p.cast()));
        let scales = memory!(scales[0, 4] => |p| _mm512_castps128_ps512(_mm_loadu_ps(p)));
        simd! {
            // Less 8 times each activation, which is the same for all rows.
            let less = _mm512_set1_epi16(-8);
            let mut dot = _mm512_setzero_si512();
            for x in x {
                dot = _mm512_dpwssd_epi32(dot, less, x);
            }
            let (low, high) = (_mm512_set1_epi16(0x000f), _mm512_set1_epi16(0x00f0));
            let upper = _mm512_srli_epi16::<8>(fields);
            dot = _mm512_dpwssd_epi32(dot, _mm512_and_si512(fields, low), x[0]);
            dot = _mm512_dpwssd_epi32(dot, _mm512_and_si512(upper, low), x[2]);
            let times_16 = _mm512_setzero_si512();
            let times_16 = _mm512_dpwssd_epi32(times_16, _mm512_and_si512(fields, high), x[1]);
            let times_16 = _mm512_dpwssd_epi32(times_16, _mm512_and_si512(upper, high), x[3]);
            dot = _mm512_add_epi32(dot, _mm512_srai_epi32::<4>(times_16));
            // A block is four lanes.
            let lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            let scales = _mm512_permutexvar_ps(lanes, scales);
            [_mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scales, sums), b, c, d]
        }
    }

    #[inline(always)]
    fn words(self, from: &[i16; BLOCK]) -> __m512i {
        memory!(from[0, 32] => |p| _mm512_loadu_si512(p.cast()))
    }

    #[inline(always)]
    fn no_ints(self) -> __m512i {
        simd!(_mm512_setzero_si512())
    }

    #[inline(always)]
    fn dot_words(self, sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
        simd!(_mm512_dpwssd_epi32(sums, a, b))
    }

    #[inline(always)]
    fn floats(self, ints: __m512i) -> __m512 {
        simd!(_mm512_cvtepi32_ps(ints))
    }

    /// In 16 times four instructions: squares of eight, four, two and one swap their corners.
    #[inline(always)]
    fn transpose(self, x: &mut [[f32; 16]; 16]) {
        let mut rows = [self.splat(0.0); 16];
        for (row, x) in rows.iter_mut().zip(&*x) {
            *row = memory!(x[0, 16] => |p| _mm512_loadu_ps(p));
        }
        for square in [8, 4, 2, 1] {
            let (mut upper, mut lower) = ([0; 16], [0; 16]);
            for lane in 0..16 {
                // Lanes from 16 on are those of the second row.
                let moved = lane & square != 0;
                upper[lane] = if moved { (16 + lane - square) as i32 } else { lane as i32 };
                lower[lane] = if moved { (16 + lane) as i32 } else { (lane + square) as i32 };
            }
            let upper = memory!(upper[0, 16] => |p| _mm512_loadu_si512(p.cast()));
            let lower = memory!(lower[0, 16] => |p| _mm512_loadu_si512(p.cast()));
            for i in 0..16 {
                if i & square == 0 {
                    let (a, b) = (rows[i], rows[i + square]);
                    rows[i] = simd!(_mm512_permutex2var_ps(a, upper, b));
                    rows[i + square] = simd!(_mm512_permutex2var_ps(a, lower, b));
                }
            }
        }
        for (x, row) in x.iter_mut().zip(rows) {
            memory!(mut x[0, 16] => |p| _mm512_storeu_ps(p, row));
        }
    }

    #[inline(always)]
    fn prefetch(self, from: &[u8], at: usize) {
        let pointer = from.as_ptr().wrapping_add(at);
        // SAFETY: a hint, which may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(pointer.cast()) }
    }

    #[inline(always)]
    fn prefetch_second(self, from: &[u8], at: usize) {
        let pointer = from.as_ptr().wrapping_add(at);
        // SAFETY: a hint, which may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(pointer.cast()) }
    }

    #[inline(always)]
    fn evens_odds(self, x: &[f32; BLOCK]) -> [f32; BLOCK] {
        let mut out = [0.0; BLOCK];
        let (a, b) = (self.load(x, 0), self.load(x, 1));
        for first in 0..2 {
            let both = simd! {
                let evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                let places = _mm512_add_epi32(evens, _mm512_set1_epi32(first as i32));
                _mm512_permutex2var_ps(a, places, b)
            };
            self.store(&mut out, first, both);
        }
        out
    }
}
