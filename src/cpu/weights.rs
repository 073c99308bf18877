//! Encoded rows of matrices, keys and values, decoded a block at a time.

use half::f16;

use super::simd::{BLOCK, Simd};

/// A format of weights.
pub(super) trait Weight {
    /// The bytes of a block of [`BLOCK`] columns.
    type Raw: AsRef<[u8]> + Copy;

    /// Whole blocks of a row, and what is left.
    fn split(row: &[u8]) -> (&[Self::Raw], &[u8]);

    /// A block that ends in zeros.
    fn pad(rest: &[u8]) -> Self::Raw;

    /// Decodes vector `i` of a block; `scale` holds the bits of an `f16` where the format has one.
    /// `#[inline(always)]`.
    fn load<S: Simd>(simd: S, raw: &Self::Raw, scale: u16, i: usize) -> S::Floats;
}

/// A format of integers with scales.
pub(super) trait Levels: Weight {
    /// The largest magnitude of one.
    const LARGEST: f32;

    /// Vector `i` of a block, without its scale. `#[inline(always)]`.
    fn level<S: Simd>(simd: S, raw: &Self::Raw, i: usize) -> S::Floats;

    /// Whether [`Levels::add`] takes activations in the order of [`Simd::words_apart`].
    const APART: bool;

    /// Adds the products of four blocks with those of `T` tokens, each times the scale of both.
    /// `#[inline(always)]`.
    fn add<S: Simd, const T: usize>(
        simd: S,
        raw: &[Self::Raw; 4],
        x: [&[[i16; BLOCK]; 4]; T],
        scales: [&[f32; 4]; T],
        sums: &mut [[S::Floats; 4]; T],
    );
}

macro_rules! weight {
    ($(#[$doc:meta])* $name:ident, $bytes:expr, |$simd:ident, $raw:ident, $scale:ident, $i:ident| $load:expr) => {
        $(#[$doc])*
        pub(super) struct $name;

        impl Weight for $name {
            type Raw = [u8; $bytes];

            #[inline(always)]
            fn split(row: &[u8]) -> (&[Self::Raw], &[u8]) {
                row.as_chunks()
            }

            #[inline(always)]
            fn pad(rest: &[u8]) -> Self::Raw {
                let mut raw = [0; $bytes];
                raw[..rest.len()].copy_from_slice(rest);
                raw
            }

            #[inline(always)]
            fn load<S: Simd>($simd: S, $raw: &Self::Raw, $scale: u16, $i: usize) -> S::Floats {
                $load
            }
        }
    };
}

weight!(
    /// Little-endian `f32`.
    Float32, 4 * BLOCK, |simd, raw, _scale, i| simd.load_f32(raw, i)
);
weight!(
    /// Little-endian `f16`.
    Float16, 2 * BLOCK, |simd, raw, _scale, i| simd.load_f16(raw, i)
);
weight!(
    /// Little-endian `bf16`.
    BFloat16, 2 * BLOCK, |simd, raw, _scale, i| simd.load_bf16(raw, i)
);
weight!(
    /// `i8` with a scale: a block is a block of [`crate::backend::Q8_BLOCK`].
    Levels8, BLOCK, |simd, raw, scale, i| simd.mul(simd.load_i8(raw, i), simd.splat_f16(scale))
);
weight!(
    /// Fields of 4 bits with a scale and an offset of 8, in whole blocks as above.
    Levels4, BLOCK / 2, |simd, raw, scale, i| {
        simd.mul(Signed4::load(simd, raw, 0, i), simd.splat_f16(scale))
    }
);

weight!(
    /// `i8` as it is.
    Signed8, BLOCK, |simd, raw, _scale, i| simd.load_i8(raw, i)
);
weight!(
    /// Fields of 4 bits with an offset of 8.
    Signed4, BLOCK / 2, |simd, raw, _scale, i| {
        simd.sub(simd.load_u4(raw, i), simd.splat(8.0))
    }
);
weight!(
    /// Unsigned fields of 4 bits.
    Unsigned4, BLOCK / 2, |simd, raw, _scale, i| simd.load_u4(raw, i)
);
weight!(
    /// The same in the order of [`apart`](super::simd::apart).
    Apart4, BLOCK / 2, |simd, raw, _scale, i| simd.load_u4_apart(raw, i)
);
weight!(
    /// Unsigned fields of 2 bits.
    Unsigned2, BLOCK / 4, |simd, raw, _scale, i| simd.load_u2(raw, i)
);

impl Levels for Levels8 {
    const LARGEST: f32 = 127.0;

    #[inline(always)]
    fn level<S: Simd>(simd: S, raw: &[u8; BLOCK], i: usize) -> S::Floats {
        Signed8::load(simd, raw, 0, i)
    }

    const APART: bool = false;

    #[inline(always)]
    fn add<S: Simd, const T: usize>(
        simd: S,
        raw: &[[u8; BLOCK]; 4],
        x: [&[[i16; BLOCK]; 4]; T],
        scales: [&[f32; 4]; T],
        sums: &mut [[S::Floats; 4]; T],
    ) {
        for i in 0..4 {
            let w = simd.words_i8(&raw[i]);
            for t in 0..T {
                let dot = simd.floats(simd.dot_words(simd.no_ints(), w, simd.words(&x[t][i])));
                sums[t][i] = simd.fma(dot, simd.splat(scales[t][i]), sums[t][i]);
            }
        }
    }
}

impl Levels for Levels4 {
    const LARGEST: f32 = 8.0;

    #[inline(always)]
    fn level<S: Simd>(simd: S, raw: &[u8; BLOCK / 2], i: usize) -> S::Floats {
        Signed4::load(simd, raw, 0, i)
    }

    const APART: bool = true;

    #[inline(always)]
    fn add<S: Simd, const T: usize>(
        simd: S,
        raw: &[[u8; BLOCK / 2]; 4],
        x: [&[[i16; BLOCK]; 4]; T],
        scales: [&[f32; 4]; T],
        sums: &mut [[S::Floats; 4]; T],
    ) {
        for t in 0..T {
            let [a, b, c, d] = x[t];
            let x = [simd.words(a), simd.words(b), simd.words(c), simd.words(d)];
            sums[t] = simd.add_u4(sums[t], raw, x, scales[t]);
        }
    }
}

const _: () = assert!(BLOCK == crate::backend::Q8_BLOCK);

/// Columns of one row, from a multiple of [`BLOCK`] on.
pub(super) struct Row<'a, W: Weight> {
    whole: &'a [W::Raw],
    /// What is left after the whole blocks.
    rest: &'a [u8],
    /// One a block, or none.
    scales: &'a [f16],
}

impl<'a, W: Weight> Row<'a, W> {
    /// The columns encoded in `bytes`, with the blocks' `scales` where the format has them.
    #[inline(always)]
    pub(super) fn new(bytes: &'a [u8], scales: &'a [f16]) -> Self {
        let (whole, rest) = W::split(bytes);
        Self { whole, rest, scales }
    }

    /// Whole blocks.
    #[inline(always)]
    pub(super) fn whole(&self) -> &'a [W::Raw] {
        self.whole
    }

    /// Whether it ends with a whole block.
    #[inline(always)]
    pub(super) fn is_whole(&self) -> bool {
        self.rest.is_empty()
    }

    /// The block after the whole ones, padded with zeros.
    #[inline(always)]
    pub(super) fn rest(&self) -> W::Raw {
        W::pad(self.rest)
    }

    /// The scales of its blocks; none where the format has none.
    #[inline(always)]
    pub(super) fn scales(&self) -> &'a [f16] {
        self.scales
    }

    /// The scale of a block: bits of an `f16`, 0 where the format has none.
    #[inline(always)]
    pub(super) fn scale(&self, block: usize) -> u16 {
        self.scales.get(block).map_or(0, |scale| scale.to_bits())
    }

    /// Decodes it into whole blocks; what is beyond its end becomes zero.
    #[inline(always)]
    pub(super) fn decode<S: Simd>(&self, simd: S, out: &mut [[f32; BLOCK]]) {
        for (block, (raw, out)) in self.whole.iter().zip(&mut *out).enumerate() {
            for i in 0..BLOCK / S::LANES {
                simd.store(out, i, W::load(simd, raw, self.scale(block), i));
            }
        }
        if let (false, Some(out)) = (self.is_whole(), out.get_mut(self.whole.len())) {
            let (raw, scale) = (self.rest(), self.scale(self.whole.len()));
            for i in 0..BLOCK / S::LANES {
                simd.store(out, i, W::load(simd, &raw, scale, i));
            }
        }
    }

    /// Decodes it as `x * scale + minimum`, see [`Row::decode`].
    #[inline(always)]
    pub(super) fn scale_all<S: Simd>(
        &self,
        simd: S,
        scale: S::Floats,
        minimum: S::Floats,
        out: &mut [[f32; BLOCK]],
    ) {
        for (raw, out) in self.whole.iter().zip(&mut *out) {
            for i in 0..BLOCK / S::LANES {
                simd.store(out, i, simd.fma(W::load(simd, raw, 0, i), scale, minimum));
            }
        }
        if let (false, Some(out)) = (self.is_whole(), out.get_mut(self.whole.len())) {
            let raw = self.rest();
            for i in 0..BLOCK / S::LANES {
                simd.store(out, i, simd.fma(W::load(simd, &raw, 0, i), scale, minimum));
            }
        }
    }

    /// The same where each column has its own `scale` and `minimum`.
    #[inline(always)]
    pub(super) fn scale_each<S: Simd>(
        &self,
        simd: S,
        scale: &[[f32; BLOCK]],
        minimum: &[[f32; BLOCK]],
        out: &mut [[f32; BLOCK]],
    ) {
        let columns = scale.iter().zip(minimum);
        for ((raw, out), (scale, minimum)) in self.whole.iter().zip(&mut *out).zip(columns) {
            for i in 0..BLOCK / S::LANES {
                let (scale, minimum) = (simd.load(scale, i), simd.load(minimum, i));
                simd.store(out, i, simd.fma(W::load(simd, raw, 0, i), scale, minimum));
            }
        }
        let last = self.whole.len();
        if let (false, Some(out)) = (self.is_whole(), out.get_mut(last)) {
            let raw = self.rest();
            for i in 0..BLOCK / S::LANES {
                let (scale, minimum) = (simd.load(&scale[last], i), simd.load(&minimum[last], i));
                simd.store(out, i, simd.fma(W::load(simd, &raw, 0, i), scale, minimum));
            }
        }
    }
}
