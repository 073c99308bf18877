//! One vector interface over AVX-512, AVX2, NEON and plain Rust, chosen at run time.
//!
//! A kernel is written once, generic over [`Simd`]: a token that exists only where the processor
//! has the instructions. [`Level::run`] enters it through a function that is compiled for them;
//! a kernel and all that it calls must be `#[inline(always)]` to be compiled along.
//!
//! Data comes in blocks of a fixed size, [`BLOCK`] floats or [`TERNARY_BLOCK`] trits, whatever the
//! width of a vector: a block is an array, so that its length is known and nothing is unchecked.
//! `unsafe` is confined to the files below this one.

/// Calls intrinsics that work on registers, in the file of a token that proves their presence.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! simd {
    ($($body:tt)*) => {{
        // SAFETY: a token of this type is made by `detect` alone, so that the processor has the
        // features, and these intrinsics ask for nothing else.
        unsafe { $($body)* }
    }};
}

/// Calls an intrinsic that reads or writes `$count` elements of `$array` from `$at`.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! memory {
    ($array:ident [$at:expr, $count:expr] => |$pointer:ident| $body:expr) => {{
        let part = &$array[$at..$at + $count];
        let $pointer = part.as_ptr();
        // SAFETY: as above, and the slice was checked to hold what is read.
        unsafe { $body }
    }};
    (mut $array:ident [$at:expr, $count:expr] => |$pointer:ident| $body:expr) => {{
        let part = &mut $array[$at..$at + $count];
        let $pointer = part.as_mut_ptr();
        // SAFETY: as above, and the slice was checked to hold what is written.
        unsafe { $body }
    }};
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod tiles;

use std::str::FromStr;

use half::f16;

pub(super) use tiles::{TILE_COLS, TILE_ROWS, Tile, TileProducts, TileUnit};

/// Elements of a block of floats.
pub(super) const BLOCK: usize = 32;

/// Bytes of a cache line, or half of one.
pub(super) const LINE: usize = 64;

/// Columns of a block of ternary weights.
pub(super) const TERNARY_BLOCK: usize = 64;

/// A set of vector instructions that this processor has.
///
/// `i` is the index of a vector within its block: `0..BLOCK / LANES`, or for bytes
/// `0..TERNARY_BLOCK / BYTES`. It is a constant once loops are unrolled.
pub(super) trait Simd: Copy + Send + Sync + 'static {
    /// A vector of `f32`.
    type Floats: Copy;
    /// A vector of bytes.
    type Bytes: Copy;
    /// A vector of partial sums of products of bytes.
    type Sums: Copy;
    /// A block of 16-bit integers.
    type Words: Copy;
    /// A vector of 32-bit integers, as many as of floats.
    type Ints: Copy;

    /// Floats in a vector.
    const LANES: usize;
    /// Bytes in a vector.
    const BYTES: usize;
    /// Blocks of 64 columns that [`Simd::dot`] may add up before a sum overflows.
    const DOT_BLOCKS: usize;
    /// How far [`Simd::fields`] leaves each field shifted to the left.
    const FIELD_SHIFTS: [u32; 4];
    /// Tokens whose sums of four fields, or of four float rows, fit in the registers.
    const TILE: usize;
    /// Whether [`Simd::dot_words`] outruns the same products in floats.
    const FAST_WORDS: bool;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::Floats;
    /// A vector of a block.
    fn load(self, from: &[f32; BLOCK], i: usize) -> Self::Floats;
    /// Stores a vector into a block.
    fn store(self, to: &mut [f32; BLOCK], i: usize, x: Self::Floats);
    /// Decodes little-endian `f32`.
    fn load_f32(self, from: &[u8; 4 * BLOCK], i: usize) -> Self::Floats;
    /// Decodes little-endian `f16`.
    fn load_f16(self, from: &[u8; 2 * BLOCK], i: usize) -> Self::Floats;
    /// Decodes little-endian `bf16`.
    fn load_bf16(self, from: &[u8; 2 * BLOCK], i: usize) -> Self::Floats;
    /// Decodes `i8`.
    fn load_i8(self, from: &[u8; BLOCK], i: usize) -> Self::Floats;
    /// Decodes unsigned fields of 4 bits, the lowest bits of a byte first.
    fn load_u4(self, from: &[u8; BLOCK / 2], i: usize) -> Self::Floats;
    /// Decodes them in an order that costs less: vector `2 n` is of the lower fields of as many bytes
    /// as there are lanes, vector `2 n + 1` of the upper fields of the same, see [`apart`].
    fn load_u4_apart(self, from: &[u8; BLOCK / 2], i: usize) -> Self::Floats;
    /// Decodes unsigned fields of 2 bits, the lowest bits of a byte first.
    fn load_u2(self, from: &[u8; BLOCK / 4], i: usize) -> Self::Floats;
    /// All lanes the `f16` of these bits.
    fn splat_f16(self, bits: u16) -> Self::Floats;
    /// Rounds to `f16`, to nearest even.
    fn store_f16(self, to: &mut [u16; BLOCK], i: usize, x: Self::Floats);
    /// Rounds to integers, to nearest even, and clamps them to `-128..=127`.
    fn store_i8(self, to: &mut [i8; BLOCK], i: usize, x: Self::Floats);
    /// Rounds to integers, to nearest even, and clamps them to 16 bits.
    fn store_i16(self, to: &mut [i16; BLOCK], i: usize, x: Self::Floats);

    /// `a + b`.
    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a - b`.
    fn sub(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b`.
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a / b`.
    fn div(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`, fused where the processor can.
    fn fma(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// The larger of each lane; `b` or NaN where either is NaN.
    fn max(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// The smaller of each lane; `b` or NaN where either is NaN.
    fn min(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// The nearest integer, ties to even.
    fn round(self, x: Self::Floats) -> Self::Floats;
    /// `2^n` for whole `n` in `-126..=128`; infinity for 128.
    fn exp2_whole(self, n: Self::Floats) -> Self::Floats;
    /// The sum over the lanes of each of four vectors.
    fn sum4(self, x: [Self::Floats; 4]) -> [f32; 4];

    /// Decodes as many little-endian `f16` as `mask` has bits, each into the lane of its bit; the
    /// other lanes become zero. Bits beyond the lanes are zero.
    #[inline(always)]
    fn expand_f16(self, from: &[u8; 32], mask: u32) -> Self::Floats {
        spread(self, mask, |i| f16::from_le_bytes([from[2 * i], from[2 * i + 1]]).to_f32())
    }

    /// The same of `i8`.
    #[inline(always)]
    fn expand_i8(self, from: &[u8; 16], mask: u32) -> Self::Floats {
        spread(self, mask, |i| f32::from(from[i] as i8))
    }

    /// The same of signed fields of 4 bits, the lowest first.
    #[inline(always)]
    fn expand_i4(self, from: u64, mask: u32) -> Self::Floats {
        spread(self, mask, |i| ((from >> (4 * i) << 60) as i64 >> 60) as f32)
    }

    /// The largest lane; unspecified where one is NaN.
    fn max_lane(self, x: Self::Floats) -> f32;

    /// A vector of activations.
    fn bytes(self, from: &[i8; TERNARY_BLOCK], i: usize) -> Self::Bytes;
    /// The four 2-bit fields of each packed byte, `code << FIELD_SHIFTS[field]`.
    fn fields(self, from: &[u8; TERNARY_BLOCK], i: usize) -> [Self::Bytes; 4];
    /// Sums of zero.
    fn no_sums(self) -> Self::Sums;
    /// Adds the products of fields and activations.
    fn dot(self, sums: Self::Sums, codes: Self::Bytes, x: Self::Bytes) -> Self::Sums;
    /// The whole sum of each of four vectors.
    fn total4(self, x: [Self::Sums; 4]) -> [i32; 4];

    /// A block of 16-bit integers.
    fn words(self, from: &[i16; BLOCK]) -> Self::Words;
    /// Decodes a block of `i8`.
    fn words_i8(self, from: &[u8; BLOCK]) -> Self::Words;
    /// Brings four blocks into the order in which [`Simd::add_u4`] takes them.
    fn words_apart(self, blocks: &mut [[i16; BLOCK]; 4]);
    /// Adds the products of four blocks of unsigned fields of 4 bits less 8, the lowest bits of a byte
    /// first, with `x` in the order of [`Simd::words_apart`], each block's sum times its scale. They are
    /// spread over the lanes of all `sums`.
    fn add_u4(
        self,
        sums: [Self::Floats; 4],
        from: &[[u8; BLOCK / 2]; 4],
        x: [Self::Words; 4],
        scales: &[f32; 4],
    ) -> [Self::Floats; 4];
    /// Zeros.
    fn no_ints(self) -> Self::Ints;
    /// Adds the products of two blocks, each to one of the lanes; sums must fit 32 bits.
    fn dot_words(self, sums: Self::Ints, a: Self::Words, b: Self::Words) -> Self::Ints;
    /// Rounds to floats.
    fn floats(self, ints: Self::Ints) -> Self::Floats;

    /// Adds the products of four blocks, each block's sum times its scale.
    #[inline(always)]
    fn add_blocks(
        self,
        sums: [Self::Floats; 4],
        a: [Self::Words; 4],
        b: [Self::Words; 4],
        scales: &[f32; 4],
    ) -> [Self::Floats; 4] {
        let mut sums = sums;
        for i in 0..4 {
            let dot = self.floats(self.dot_words(self.no_ints(), a[i], b[i]));
            sums[i] = self.fma(dot, self.splat(scales[i]), sums[i]);
        }
        sums
    }

    /// Swaps rows and columns.
    #[inline(always)]
    fn transpose(self, x: &mut [[f32; 16]; 16]) {
        for i in 0..16 {
            for j in 0..i {
                (x[i][j], x[j][i]) = (x[j][i], x[i][j]);
            }
        }
    }

    /// Asks for the cache line that holds byte `at` of `from`, or would if it were that long.
    #[inline(always)]
    fn prefetch(self, from: &[u8], at: usize) {
        let _ = (from, at);
    }

    /// The same, into the second-level cache only.
    #[inline(always)]
    fn prefetch_second(self, from: &[u8], at: usize) {
        let _ = (from, at);
    }

    /// The elements in even places, then those in odd ones.
    #[inline(always)]
    fn evens_odds(self, x: &[f32; BLOCK]) -> [f32; BLOCK] {
        std::array::from_fn(|i| x[2 * (i % (BLOCK / 2)) + i / (BLOCK / 2)])
    }

    /// The sum over the lanes.
    #[inline(always)]
    fn sum(self, x: Self::Floats) -> f32 {
        let zero = self.splat(0.0);
        self.sum4([x, zero, zero, zero])[0]
    }

    /// `|x|`; NaN where it is NaN.
    #[inline(always)]
    fn abs(self, x: Self::Floats) -> Self::Floats {
        self.max(self.sub(self.splat(0.0), x), x)
    }

    /// `e^x`, within 2 ULP from -87 to 88; above that infinity, below that less than `2^-125`.
    ///
    /// `x = n ln 2 + r`, and a polynomial in `r` (Cephes, `expf`).
    #[inline(always)]
    fn exp(self, x: Self::Floats) -> Self::Floats {
        // The order of arguments lets NaN through.
        let x = self.min(self.splat(88.8), self.max(self.splat(-87.0), x));
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, the first of which times n is exact.
        let r = self.fma(n, self.splat(-0.693_359_4), x);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = self.fma(p, r, self.splat(c));
        }
        let p = self.fma(self.mul(p, r), r, self.add(r, self.splat(1.0)));
        self.mul(p, self.exp2_whole(n))
    }
}

/// Puts `field(0)`, `field(1)` and so on into the lanes whose bits of `mask` are set.
#[inline(always)]
fn spread<S: Simd>(simd: S, mask: u32, field: impl Fn(usize) -> f32) -> S::Floats {
    let mut lanes = [0.0; BLOCK];
    let mut next = 0;
    for (lane, x) in lanes.iter_mut().take(S::LANES).enumerate() {
        if mask >> lane & 1 == 1 {
            *x = field(next);
            next += 1;
        }
    }
    simd.load(&lanes, 0)
}

/// Brings a block into the order of [`Simd::load_u4_apart`].
#[inline(always)]
pub(super) fn apart<S: Simd>(simd: S, block: &[f32; BLOCK]) -> [f32; BLOCK] {
    if S::LANES == BLOCK / 2 {
        return simd.evens_odds(block);
    }
    let mut out = [0.0; BLOCK];
    for (out, pairs) in out.chunks_exact_mut(2 * S::LANES).zip(block.chunks_exact(2 * S::LANES)) {
        for n in 0..S::LANES {
            (out[n], out[S::LANES + n]) = (pairs[2 * n], pairs[2 * n + 1]);
        }
    }
    out
}

/// Brings a block out of that order.
#[inline(always)]
pub(super) fn together<S: Simd>(block: &[f32; BLOCK]) -> [f32; BLOCK] {
    let mut out = [0.0; BLOCK];
    for (pairs, block) in out.chunks_exact_mut(2 * S::LANES).zip(block.chunks_exact(2 * S::LANES)) {
        for n in 0..S::LANES {
            (pairs[2 * n], pairs[2 * n + 1]) = (block[n], block[S::LANES + n]);
        }
    }
    out
}

/// The elements in even places of two blocks, and those in odd ones.
#[inline(always)]
pub(super) fn pairs_apart<S: Simd>(simd: S, both: &[[f32; BLOCK]; 2]) -> [[f32; BLOCK]; 2] {
    let mut apart = [[0.0; BLOCK]; 2];
    for (n, both) in both.iter().enumerate() {
        let halves = simd.evens_odds(both);
        for (apart, half) in apart.iter_mut().zip(halves.as_chunks::<{ BLOCK / 2 }>().0) {
            apart[n * BLOCK / 2..][..BLOCK / 2].copy_from_slice(half);
        }
    }
    apart
}

/// A computation that is compiled for each level.
pub(super) trait Kernel {
    /// What it gives.
    type Output;
    /// Runs it. Implementations are `#[inline(always)]`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// The instructions that the kernels of a [`super::Cpu`] use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernels {
    /// What the compiler makes of plain Rust.
    Portable,
    /// x86-64 with AVX2, FMA and F16C (from 2013).
    Avx2,
    /// AVX2 with 8-bit dot products (AVX-VNNI, from 2021).
    Avx2Vnni,
    /// AVX-512 with 8-bit dot products (VNNI, from 2019).
    Avx512,
    /// The same with a unit for products of tiles (AMX, servers from 2023; Linux).
    Avx512Amx,
    /// 64-bit ARM.
    Neon,
    /// 64-bit ARM with 8-bit dot products (from 2018).
    NeonDotprod,
}

impl Kernels {
    /// All that this machine can run, the fastest last.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|&kernels| Level::new(kernels).is_some()).collect()
    }

    /// All there are, on any machine.
    const ALL: [Self; 7] = [
        Self::Portable,
        Self::Avx2,
        Self::Avx2Vnni,
        Self::Avx512,
        Self::Avx512Amx,
        Self::Neon,
        Self::NeonDotprod,
    ];

    /// The name in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "AVX2",
            Self::Avx2Vnni => "AVX2 + VNNI",
            Self::Avx512 => "AVX-512 + VNNI",
            Self::Avx512Amx => "AVX-512 + AMX",
            Self::Neon => "NEON",
            Self::NeonDotprod => "NEON + dotprod",
        }
    }

    /// The [`Kernels::key`] of each that this machine can run, as messages list them.
    pub fn listed() -> String {
        Self::available().into_iter().map(Self::key).collect::<Vec<_>>().join(", ")
    }

    /// The name as options spell it, which [`Kernels::from_str`] reads.
    pub fn key(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx2Vnni => "avx2-vnni",
            Self::Avx512 => "avx512",
            Self::Avx512Amx => "avx512-amx",
            Self::Neon => "neon",
            Self::NeonDotprod => "neon-dotprod",
        }
    }
}

impl FromStr for Kernels {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|kernels| kernels.key() == text);
        found.ok_or_else(|| {
            format!("{text:?} is no set of instructions; this machine has {}", Self::listed())
        })
    }
}

/// The token of one set of instructions.
#[derive(Clone, Copy)]
pub(super) enum Level {
    Portable(portable::Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2<false>),
    #[cfg(target_arch = "x86_64")]
    Avx2Vnni(avx2::Avx2<true>),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx512Amx(avx512::Avx512, TileUnit),
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon<false>),
    #[cfg(target_arch = "aarch64")]
    NeonDotprod(neon::Neon<true>),
}

impl Level {
    /// The token, where this processor has the instructions.
    pub(super) fn new(kernels: Kernels) -> Option<Self> {
        match kernels {
            Kernels::Portable => Some(Self::Portable(portable::Portable)),
            #[cfg(target_arch = "x86_64")]
            Kernels::Avx2 => avx2::Avx2::<false>::detect().map(Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            Kernels::Avx2Vnni => avx2::Avx2::<true>::detect().map(Self::Avx2Vnni),
            #[cfg(target_arch = "x86_64")]
            Kernels::Avx512 => avx512::Avx512::detect().map(Self::Avx512),
            #[cfg(target_arch = "x86_64")]
            Kernels::Avx512Amx => {
                Some(Self::Avx512Amx(avx512::Avx512::detect()?, TileUnit::detect()?))
            }
            #[cfg(target_arch = "aarch64")]
            Kernels::Neon => neon::Neon::<false>::detect().map(Self::Neon),
            #[cfg(target_arch = "aarch64")]
            Kernels::NeonDotprod => neon::Neon::<true>::detect().map(Self::NeonDotprod),
            #[allow(unreachable_patterns)] // Instructions of another architecture.
            _ => None,
        }
    }

    /// Whether products of 16-bit integers outrun those of floats.
    pub(super) fn has_fast_words(self) -> bool {
        struct Ask;
        impl Kernel for Ask {
            type Output = bool;
            #[inline(always)]
            fn run<S: Simd>(self, _simd: S) -> bool {
                S::FAST_WORDS
            }
        }
        self.run(Ask)
    }

    /// What multiplies tiles, where the processor has it.
    pub(super) fn tiles(self) -> Option<TileUnit> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Amx(_, tiles) => Some(tiles),
            _ => None,
        }
    }

    /// Runs a kernel compiled for these instructions.
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Portable(simd) => kernel.run(simd),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2Vnni(simd) => simd.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) | Self::Avx512Amx(simd, _) => simd.enter(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(simd) => simd.enter(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDotprod(simd) => simd.enter(kernel),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Transpose([[f32; 16]; 16]);

    impl Kernel for Transpose {
        type Output = [[f32; 16]; 16];

        #[inline(always)]
        fn run<S: Simd>(mut self, simd: S) -> Self::Output {
            simd.transpose(&mut self.0);
            self.0
        }
    }

    #[test]
    fn rows_become_columns() {
        let at = |i: usize, j: usize| (16 * i + j) as f32;
        let x = std::array::from_fn(|i| std::array::from_fn(|j| at(i, j)));
        let want: [[f32; 16]; 16] = std::array::from_fn(|i| std::array::from_fn(|j| at(j, i)));
        for kernels in Kernels::available() {
            let level = Level::new(kernels).expect("available");
            assert_eq!(level.run(Transpose(x)), want, "{kernels:?}");
        }
    }

    struct PairsApart([[f32; BLOCK]; 2]);

    impl Kernel for PairsApart {
        type Output = [[f32; BLOCK]; 2];

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            pairs_apart(simd, &self.0)
        }
    }

    #[test]
    fn pairs_come_apart() {
        let both = std::array::from_fn(|n| std::array::from_fn(|i| (BLOCK * n + i) as f32));
        let want = std::array::from_fn(|odd| std::array::from_fn(|i| (2 * i + odd) as f32));
        for kernels in Kernels::available() {
            let level = Level::new(kernels).expect("available");
            assert_eq!(level.run(PairsApart(both)), want, "{kernels:?}");
        }
    }

    struct Exp<'a>(&'a [f32; BLOCK]);

    impl Kernel for Exp<'_> {
        type Output = [f32; BLOCK];

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> [f32; BLOCK] {
            let mut out = [0.0; BLOCK];
            for i in 0..BLOCK / S::LANES {
                simd.store(&mut out, i, simd.exp(simd.load(self.0, i)));
            }
            out
        }
    }

    #[test]
    fn exp_is_within_two_ulp() {
        for kernels in Kernels::available() {
            let level = Level::new(kernels).expect("available");
            let mut x = -87.0f32;
            while x < 88.0 {
                let block: [f32; BLOCK] = std::array::from_fn(|i| x + i as f32 * 1e-3);
                for (x, y) in block.iter().zip(level.run(Exp(&block))) {
                    let exact = f64::from(*x).exp();
                    let ulp = (exact as f32).next_up() - exact as f32;
                    let error = (f64::from(y) - exact).abs() / f64::from(ulp);
                    assert!(error <= 2.0, "{kernels:?}: exp({x}) = {y}, {error} ULP");
                }
                x += 0.04;
            }
        }
    }

    #[test]
    fn exp_at_its_limits() {
        for kernels in Kernels::available() {
            let level = Level::new(kernels).expect("available");
            let mut block = [0.0; BLOCK];
            block[..5].copy_from_slice(&[f32::NAN, f32::INFINITY, 1e4, f32::NEG_INFINITY, -1e4]);
            let y = level.run(Exp(&block));
            assert!(y[0].is_nan(), "{kernels:?}");
            assert!(y[1] == f32::INFINITY && y[2] == f32::INFINITY, "{kernels:?}");
            assert!((0.0..1e-37).contains(&y[3]) && (0.0..1e-37).contains(&y[4]), "{kernels:?}");
            assert_eq!(y[5], 1.0, "{kernels:?}");
        }
    }
}
