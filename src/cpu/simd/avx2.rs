//! AVX2 with FMA and F16C, and where there is one the 8-bit dot product of AVX-VNNI.

use std::arch::x86_64::*;

use super::{BLOCK, Kernel, Simd, TERNARY_BLOCK};

/// Exists only where the processor has the instructions, AVX-VNNI included if `VNNI`.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx2<const VNNI: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
    pub(super) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("popcnt")
            && (!VNNI || is_x86_feature_detected!("avxvnni"));
        found.then_some(Self(()))
    }

    pub(super) fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c,popcnt")]
        fn plain<K: Kernel, const VNNI: bool>(simd: Avx2<VNNI>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        #[target_feature(enable = "avx2,fma,f16c,popcnt,avxvnni")]
        fn vnni<K: Kernel, const VNNI: bool>(simd: Avx2<VNNI>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        simd!(if VNNI { vnni(self, kernel) } else { plain(self, kernel) })
    }
}

/// For each mask, which of the packed fields goes to each lane; -128 where none does.
const PLACES: [[u8; 8]; 256] = {
    let mut places = [[0x80; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut next) = (0, 0);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                places[mask][lane] = next;
                next += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    places
};

/// Spreads the first `i8` over the lanes of `mask`.
#[inline(always)]
fn spread(packed: __m128i, mask: u32) -> __m256 {
    let places = i64::from_le_bytes(PLACES[mask as usize & 255]);
    simd! {
        // A shuffle makes zero of what has no place.
        let bytes = _mm_shuffle_epi8(packed, _mm_cvtsi64_si128(places));
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))
    }
}

/// The words in even places of a block, and those in odd ones.
#[inline(always)]
fn evens_and_odds([a, b]: [__m256i; 2]) -> [__m256i; 2] {
    simd! {
        let low = _mm256_set1_epi32(0xffff);
        // Packing takes halves of both in turn.
        let pack = |a, b| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(a, b));
        [
            pack(_mm256_and_si256(a, low), _mm256_and_si256(b, low)),
            pack(_mm256_srli_epi32::<16>(a), _mm256_srli_epi32::<16>(b)),
        ]
    }
}

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type Floats = __m256;
    type Bytes = __m256i;
    /// 32-bit sums with VNNI, 16-bit sums without.
    type Sums = __m256i;
    type Words = [__m256i; 2];
    type Ints = __m256i;

    const LANES: usize = 8;
    const BYTES: usize = 32;
    // With VNNI as in AVX-512. Without, sums are of 16 bits: a step adds two products of at most 2 * 128, and a block
    // has two steps for each sum: 31 * 2 * 512 = 31,744 still fits. (A field of 3 is malformed,
    // and no sum of it means anything.)
    const DOT_BLOCKS: usize = if VNNI { 1024 } else { 31 };
    const FIELD_SHIFTS: [u32; 4] = if VNNI { [0, 2, 4, 6] } else { [0; 4] };
    const TILE: usize = 2;
    const FAST_WORDS: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        simd!(_mm256_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, from: &[f32; BLOCK], i: usize) -> __m256 {
        memory!(from[i * 8, 8] => |p| _mm256_loadu_ps(p))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; BLOCK], i: usize, x: __m256) {
        memory!(mut to[i * 8, 8] => |p| _mm256_storeu_ps(p, x));
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 4 * BLOCK], i: usize) -> __m256 {
        memory!(from[i * 32, 32] => |p| _mm256_loadu_ps(p.cast()))
    }

    #[inline(always)]
    fn load_f16(self, from: &[u8; 2 * BLOCK], i: usize) -> __m256 {
        memory!(from[i * 16, 16] => |p| _mm256_cvtph_ps(_mm_loadu_si128(p.cast())))
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 2 * BLOCK], i: usize) -> __m256 {
        let half = memory!(from[i * 16, 16] => |p| _mm_loadu_si128(p.cast()));
        simd!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half))))
    }

    #[inline(always)]
    fn load_i8(self, from: &[u8; BLOCK], i: usize) -> __m256 {
        let bytes = memory!(from[i * 8, 8] => |p| _mm_loadl_epi64(p.cast()));
        simd!(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)))
    }

    #[inline(always)]
    fn load_u4(self, from: &[u8; BLOCK / 2], i: usize) -> __m256 {
        let at = 4 * i;
        let word = i32::from_le_bytes([from[at], from[at + 1], from[at + 2], from[at + 3]]);
        simd! {
            let shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
            let fields = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
            _mm256_cvtepi32_ps(_mm256_and_si256(fields, _mm256_set1_epi32(15)))
        }
    }

    #[inline(always)]
    fn load_u4_apart(self, from: &[u8; BLOCK / 2], i: usize) -> __m256 {
        let bytes = memory!(from[i / 2 * 8, 8] => |p| _mm_loadl_epi64(p.cast()));
        simd! {
            let pairs = _mm256_cvtepu8_epi32(bytes);
            _mm256_cvtepi32_ps(if i.is_multiple_of(2) {
                _mm256_and_si256(pairs, _mm256_set1_epi32(15))
            } else {
                _mm256_srli_epi32::<4>(pairs)
            })
        }
    }

    #[inline(always)]
    fn load_u2(self, from: &[u8; BLOCK / 4], i: usize) -> __m256 {
        let word = i32::from(u16::from_le_bytes([from[2 * i], from[2 * i + 1]]));
        simd! {
            let shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
            let fields = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
            _mm256_cvtepi32_ps(_mm256_and_si256(fields, _mm256_set1_epi32(3)))
        }
    }

    #[inline(always)]
    fn expand_f16(self, from: &[u8; 32], mask: u32) -> __m256 {
        let places = PLACES[mask as usize & 255];
        let places = simd!(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(places))));
        let packed = memory!(from[0, 16] => |p| _mm256_cvtph_ps(_mm_loadu_si128(p.cast())));
        simd! {
            let spread = _mm256_permutevar8x32_ps(packed, places);
            // What has no place is negative.
            _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32::<31>(places)), spread)
        }
    }

    #[inline(always)]
    fn expand_i8(self, from: &[u8; 16], mask: u32) -> __m256 {
        let packed = memory!(from[0, 8] => |p| _mm_loadl_epi64(p.cast()));
        spread(packed, mask)
    }

    #[inline(always)]
    fn expand_i4(self, from: u64, mask: u32) -> __m256 {
        spread(
            simd! {
                // A byte for each field, with its sign.
                let pairs = _mm_cvtepu8_epi16(_mm_cvtsi32_si128(from as i32));
                let bytes = _mm_or_si128(pairs, _mm_slli_epi16::<4>(pairs));
                let bytes = _mm_and_si128(bytes, _mm_set1_epi8(15));
                let sign = _mm_set1_epi8(8);
                _mm_sub_epi8(_mm_xor_si128(bytes, sign), sign)
            },
            mask,
        )
    }

    #[inline(always)]
    fn splat_f16(self, bits: u16) -> __m256 {
        simd!(_mm256_cvtph_ps(_mm_set1_epi16(bits as i16)))
    }

    #[inline(always)]
    fn store_f16(self, to: &mut [u16; BLOCK], i: usize, x: __m256) {
        let half = simd!(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
        memory!(mut to[i * 8, 8] => |p| _mm_storeu_si128(p.cast(), half));
    }

    #[inline(always)]
    fn store_i8(self, to: &mut [i8; BLOCK], i: usize, x: __m256) {
        let bytes = simd! {
            let words = _mm256_cvtps_epi32(x);
            let words = _mm_packs_epi32(
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            _mm_packs_epi16(words, words)
        };
        memory!(mut to[i * 8, 8] => |p| _mm_storel_epi64(p.cast(), bytes));
    }

    #[inline(always)]
    fn store_i16(self, to: &mut [i16; BLOCK], i: usize, x: __m256) {
        let words = simd! {
            let words = _mm256_cvtps_epi32(x);
            _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
        };
        memory!(mut to[i * 8, 8] => |p| _mm_storeu_si128(p.cast(), words));
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        simd!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        simd!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        simd!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        simd!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        simd!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        simd!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        simd!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn round(self, x: __m256) -> __m256 {
        simd!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x))
    }

    #[inline(always)]
    fn exp2_whole(self, n: __m256) -> __m256 {
        simd!(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
            _mm256_cvtps_epi32(n),
            _mm256_set1_epi32(127)
        ))))
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        simd! {
            // Within each 128 bits: [a a b b], [c c d d], then [a b c d].
            let x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            std::mem::transmute(x)
        }
    }

    #[inline(always)]
    fn max_lane(self, x: __m256) -> f32 {
        simd! {
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }

    #[inline(always)]
    fn bytes(self, from: &[i8; TERNARY_BLOCK], i: usize) -> __m256i {
        memory!(from[i * 32, 32] => |p| _mm256_loadu_si256(p.cast()))
    }

    #[inline(always)]
    fn fields(self, from: &[u8; TERNARY_BLOCK], i: usize) -> [__m256i; 4] {
        let packed = memory!(from[i * 32, 32] => |p| _mm256_loadu_si256(p.cast()));
        simd! {
            if VNNI {
                [
                    _mm256_and_si256(packed, _mm256_set1_epi8(0b11)),
                    _mm256_and_si256(packed, _mm256_set1_epi8(0b1100)),
                    _mm256_and_si256(packed, _mm256_set1_epi8(0b11_0000)),
                    _mm256_and_si256(packed, _mm256_set1_epi8(0b1100_0000u8 as i8)),
                ]
            } else {
                let mask = _mm256_set1_epi8(0b11);
                [
                    _mm256_and_si256(packed, mask),
                    _mm256_and_si256(_mm256_srli_epi16::<2>(packed), mask),
                    _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask),
                    _mm256_and_si256(_mm256_srli_epi16::<6>(packed), mask),
                ]
            }
        }
    }

    #[inline(always)]
    fn no_sums(self) -> __m256i {
        simd!(_mm256_setzero_si256())
    }

    #[inline(always)]
    fn dot(self, sums: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        simd!(if VNNI {
            _mm256_dpbusd_avx_epi32(sums, codes, x)
        } else {
            _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, x))
        })
    }

    #[inline(always)]
    fn total4(self, [a, b, c, d]: [__m256i; 4]) -> [i32; 4] {
        simd! {
            let one = _mm256_set1_epi16(1);
            let [a, b, c, d] = if VNNI {
                [a, b, c, d]
            } else {
                [
                    _mm256_madd_epi16(a, one),
                    _mm256_madd_epi16(b, one),
                    _mm256_madd_epi16(c, one),
                    _mm256_madd_epi16(d, one),
                ]
            };
            let x = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
            let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            std::mem::transmute(x)
        }
    }

    #[inline(always)]
    fn words_i8(self, from: &[u8; BLOCK]) -> [__m256i; 2] {
        [
            memory!(from[0, 16] => |p| _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast()))),
            memory!(from[16, 16] => |p| _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast()))),
        ]
    }

    /// Eighteen instructions for 64 columns, loads apart: a word has four fields, which become signed by
    /// shifts to its upper end and back.
    #[inline(always)]
    fn add_u4(
        self,
        sums: [__m256; 4],
        from: &[[u8; BLOCK / 2]; 4],
        x: [[__m256i; 2]; 4],
        scales: &[f32; 4],
    ) -> [__m256; 4] {
        let (from, mut sums) = (from.as_flattened(), sums);
        for two in 0..2 {
            let fields = memory!(from[32 * two, 32] => |p| _mm256_loadu_si256(p.cast()));
            let [[a, b], [c, d]] = [x[2 * two], x[2 * two + 1]];
            let dot = simd! {
                // Less 8: the upper bit of a field becomes its sign.
                let signed = _mm256_xor_si256(fields, _mm256_set1_epi8(0x88u8 as i8));
                let first = _mm256_srai_epi16::<12>(_mm256_slli_epi16::<12>(signed));
                let second = _mm256_srai_epi16::<12>(_mm256_slli_epi16::<8>(signed));
                let third = _mm256_srai_epi16::<12>(_mm256_slli_epi16::<4>(signed));
                let fourth = _mm256_srai_epi16::<12>(signed);
                if VNNI {
                    let dot = _mm256_dpwssd_avx_epi32(_mm256_setzero_si256(), first, a);
                    let other = _mm256_dpwssd_avx_epi32(_mm256_setzero_si256(), second, b);
                    let dot = _mm256_dpwssd_avx_epi32(dot, third, c);
                    _mm256_add_epi32(dot, _mm256_dpwssd_avx_epi32(other, fourth, d))
                } else {
                    let dot = _mm256_add_epi32(
                        _mm256_madd_epi16(first, a),
                        _mm256_madd_epi16(second, b),
                    );
                    let other = _mm256_add_epi32(
                        _mm256_madd_epi16(third, c),
                        _mm256_madd_epi16(fourth, d),
                    );
                    _mm256_add_epi32(dot, other)
                }
            };
            // A block is four lanes.
            let low = memory!(scales[2 * two, 1] => |p| _mm_broadcast_ss(&*p));
            let high = memory!(scales[2 * two + 1, 1] => |p| _mm_broadcast_ss(&*p));
            let scales = simd!(_mm256_set_m128(high, low));
            sums[two] = self.fma(self.floats(dot), scales, sums[two]);
        }
        sums
    }

    /// Of two blocks at a time, vector `i` has every fourth column, from column `i` on: each of the four
    /// fields of a word.
    #[inline(always)]
    fn words_apart(self, blocks: &mut [[i16; BLOCK]; 4]) {
        for two in blocks.as_chunks_mut::<2>().0 {
            let [even, odd] = [0, 1].map(|i| evens_and_odds(self.words(&two[i])));
            let [first, third] = evens_and_odds([even[0], odd[0]]);
            let [second, fourth] = evens_and_odds([even[1], odd[1]]);
            for (block, words) in two.iter_mut().zip([[first, second], [third, fourth]]) {
                memory!(mut block[0, 16] => |p| _mm256_storeu_si256(p.cast(), words[0]));
                memory!(mut block[16, 16] => |p| _mm256_storeu_si256(p.cast(), words[1]));
            }
        }
    }

    #[inline(always)]
    fn words(self, from: &[i16; BLOCK]) -> [__m256i; 2] {
        [
            memory!(from[0, 16] => |p| _mm256_loadu_si256(p.cast())),
            memory!(from[16, 16] => |p| _mm256_loadu_si256(p.cast())),
        ]
    }

    #[inline(always)]
    fn no_ints(self) -> __m256i {
        simd!(_mm256_setzero_si256())
    }

    #[inline(always)]
    fn dot_words(self, sums: __m256i, a: [__m256i; 2], b: [__m256i; 2]) -> __m256i {
        simd!(if VNNI {
            _mm256_dpwssd_avx_epi32(_mm256_dpwssd_avx_epi32(sums, a[0], b[0]), a[1], b[1])
        } else {
            let sums = _mm256_add_epi32(sums, _mm256_madd_epi16(a[0], b[0]));
            _mm256_add_epi32(sums, _mm256_madd_epi16(a[1], b[1]))
        })
    }

    #[inline(always)]
    fn floats(self, ints: __m256i) -> __m256 {
        simd!(_mm256_cvtepi32_ps(ints))
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
}
