//! Keys out of compressed pages, into the block that scores are computed from.
//!
//! Pages are read where they lie and what they stand for is never written back to memory: it lives
//! in the nearest cache for as long as the queries of a task pass by.

use std::ops::Range;

use super::simd::{BLOCK, Simd};
use super::weights::{Float16, Row, Signed8, Unsigned2, Unsigned4};
use crate::delta::{ChannelBits, DeltaFormat, KeyFormat, Page, PageLayout, Reference};

type Block = [f32; BLOCK];

/// Reads the pages of one KV head in the order of their tokens.
pub(super) struct Reader<'a> {
    layout: &'a PageLayout,
    pages: &'a [Page],
    /// The page whose constants are in the state, and for a chain the token that comes next and
    /// the deltas before it.
    page: Option<usize>,
    token: usize,
    next: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(layout: &'a PageLayout, pages: &'a [Page]) -> Self {
        Self { layout, pages, page: None, token: 0, next: 0 }
    }

    /// Blocks of the state that [`Reader::read`] keeps, for heads of `blocks` blocks.
    pub(super) fn state(blocks: usize) -> usize {
        4 * blocks
    }

    /// Decodes `count` keys from position `first` on, which lie in full pages, to
    /// `[count, blocks]`; what is beyond a head's end becomes zero.
    ///
    /// A chain is unrolled once, from the start of its page: positions must not go back in a page.
    #[inline(always)]
    pub(super) fn read<S: Simd>(
        &mut self,
        simd: S,
        first: usize,
        count: usize,
        state: &mut [Block],
        out: &mut [Block],
    ) {
        let PageLayout { tokens, head_dim, .. } = *self.layout;
        let blocks = head_dim.div_ceil(BLOCK);
        let (mut position, end, mut out) = (first, first + count, &mut out[..count * blocks]);
        while position < end {
            let (page, token) = (position / tokens, position % tokens);
            let here = (tokens - token).min(end - position);
            let (now, later) = out.split_at_mut(here * blocks);
            self.read_page(simd, page, token, state, now);
            (position, out) = (position + here, later);
        }
    }

    /// Decodes tokens from `first` on, of one page.
    #[inline(always)]
    fn read_page<S: Simd>(
        &mut self,
        simd: S,
        page: usize,
        first: usize,
        state: &mut [Block],
        out: &mut [Block],
    ) {
        let layout = self.layout;
        let head_dim = layout.head_dim;
        let blocks = head_dim.div_ceil(BLOCK);
        let words = &self.pages[page].words;
        let bytes: &[u8] = bytemuck::cast_slice(words);
        prefetch_next(simd, layout, self.pages, page, first..first + out.len() / blocks);
        let fresh = self.page != Some(page);
        self.page = Some(page);
        let (row, rest) = state.split_at_mut(blocks);
        let (scales, pairs) = rest.split_at_mut(blocks);
        let level_bytes = 4 * layout.level_words();
        let levels = &bytes[4 * layout.levels()..];
        match layout.keys {
            KeyFormat::Plain => {}
            KeyFormat::Int8 => {
                for (token, out) in (first..).zip(out.chunks_exact_mut(blocks)) {
                    let at = 2 * token;
                    let scale = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
                    let levels = &levels[token * level_bytes..][..head_dim];
                    let (scale, zero) = (simd.splat_f16(scale), simd.splat(0.0));
                    Row::<Signed8>::new(levels, &[]).scale_all(simd, scale, zero, out);
                }
            }
            KeyFormat::Channel(bits) => {
                if fresh {
                    // Scales and minima take turns.
                    let pairs = &mut pairs[..(2 * head_dim).div_ceil(BLOCK)];
                    Row::<Float16>::new(&bytes[..4 * head_dim], &[]).decode(simd, pairs);
                    let pairs = pairs.as_flattened().chunks_exact(2);
                    let both = scales.as_flattened_mut().iter_mut().zip(row.as_flattened_mut());
                    both.zip(pairs).for_each(|((s, m), pair)| (*s, *m) = (pair[0], pair[1]));
                }
                let of_token = |token: usize, bits: usize| {
                    &levels[token * level_bytes..][..(head_dim * bits).div_ceil(8)]
                };
                for (token, out) in (first..).zip(out.chunks_exact_mut(blocks)) {
                    match bits {
                        ChannelBits::Four => Row::<Unsigned4>::new(of_token(token, 4), &[])
                            .scale_each(simd, scales, row, out),
                        ChannelBits::Two => Row::<Unsigned2>::new(of_token(token, 2), &[])
                            .scale_each(simd, scales, row, out),
                    }
                }
            }
            KeyFormat::Delta(delta) => {
                if fresh {
                    Row::<Float16>::new(&bytes[..2 * head_dim], &[]).decode(simd, row);
                    if delta.deltas != DeltaFormat::F16 {
                        let at = 4 * layout.scales();
                        Row::<Float16>::new(&bytes[at..at + 2 * head_dim], &[])
                            .decode(simd, scales);
                    }
                    (self.token, self.next) = (0, 0);
                }
                let mut deltas = Deltas {
                    masks: &words[layout.masks()..],
                    fields: &bytes[4 * layout.header_words()..],
                    chain: delta.reference != Reference::Mean,
                    row,
                    scales,
                };
                if deltas.chain {
                    // Up to the first token that is wanted.
                    let skipped = self.token..first;
                    self.next = match delta.deltas {
                        DeltaFormat::F16 => deltas.skip::<S, Halves>(simd, skipped, self.next),
                        DeltaFormat::Int8 => deltas.skip::<S, Bytes>(simd, skipped, self.next),
                        DeltaFormat::Int4 => deltas.skip::<S, Nibbles>(simd, skipped, self.next),
                    };
                } else {
                    let at = 4 * layout.offsets() + 2 * first;
                    self.next = usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
                }
                self.token = first + out.len() / blocks;
                self.next = match delta.deltas {
                    DeltaFormat::F16 => deltas.read::<S, Halves>(simd, first, self.next, out),
                    DeltaFormat::Int8 => deltas.read::<S, Bytes>(simd, first, self.next, out),
                    DeltaFormat::Int4 => deltas.read::<S, Nibbles>(simd, first, self.next, out),
                };
            }
        }
    }
}

/// Asks for as large a part of the page after `page` as the `tokens` that are read are of this one:
/// pages lie apart, and no processor foresees where the next one begins.
#[inline(always)]
pub(super) fn prefetch_next<S: Simd>(
    simd: S,
    layout: &PageLayout,
    pages: &[Page],
    page: usize,
    tokens: Range<usize>,
) {
    if let Some(next) = pages.get(page + 1) {
        let next: &[u8] = bytemuck::cast_slice(&next.words);
        let part = |token: usize| next.len() * token / layout.tokens;
        for at in (part(tokens.start)..part(tokens.end)).step_by(64) {
            simd.prefetch(next, at);
        }
    }
}

/// A number format of deltas.
pub(super) trait Field {
    /// Whether they are multiplied by the scale of their channel.
    const SCALED: bool;

    /// Fields from `next` on, into the lanes of `mask`.
    fn expand<S: Simd>(simd: S, fields: &[u8], next: usize, mask: u32) -> S::Floats;
}

/// Little-endian `f16`.
pub(super) struct Halves;
/// `i8`.
pub(super) struct Bytes;
/// Signed fields of 4 bits.
pub(super) struct Nibbles;

impl Field for Halves {
    const SCALED: bool = false;

    #[inline(always)]
    fn expand<S: Simd>(simd: S, fields: &[u8], next: usize, mask: u32) -> S::Floats {
        match window(fields, 2 * next) {
            Some(window) => simd.expand_f16(window, mask),
            None => simd.expand_f16(&last(fields, 2 * next), mask),
        }
    }
}

impl Field for Bytes {
    const SCALED: bool = true;

    #[inline(always)]
    fn expand<S: Simd>(simd: S, fields: &[u8], next: usize, mask: u32) -> S::Floats {
        match window(fields, next) {
            Some(window) => simd.expand_i8(window, mask),
            None => simd.expand_i8(&last(fields, next), mask),
        }
    }
}

impl Field for Nibbles {
    const SCALED: bool = true;

    #[inline(always)]
    fn expand<S: Simd>(simd: S, fields: &[u8], next: usize, mask: u32) -> S::Floats {
        let window = match window(fields, next / 2) {
            Some(window) => *window,
            None => last::<9>(fields, next / 2),
        };
        let [low @ .., high] = window;
        // Sixteen fields, from the upper one of the first byte on where `next` is odd. Not a shift of
        // 128 bits, which takes as long as all the rest.
        let odd = 4 * (next % 2) as u32;
        let high = (u64::from(high) << 1) << (63 - odd);
        simd.expand_i4(u64::from_le_bytes(low) >> odd | high, mask)
    }
}

/// `N` bytes from `at` on, or nothing where the page ends before.
#[inline(always)]
fn window<const N: usize>(bytes: &[u8], at: usize) -> Option<&[u8; N]> {
    bytes.get(at..)?.first_chunk()
}

/// The last bytes of a page, from `at` on, and zeros.
#[cold]
#[inline(never)]
fn last<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut last = [0; N];
    let rest = bytes.get(at..).unwrap_or(&[]);
    last[..rest.len()].copy_from_slice(rest);
    last
}

/// The deltas of a page, and what they are added to.
struct Deltas<'a> {
    /// `[C, blocks]`: a word for a block.
    masks: &'a [u32],
    fields: &'a [u8],
    /// Whether `row` moves along.
    chain: bool,
    /// `[blocks]`.
    row: &'a mut [Block],
    scales: &'a [Block],
}

impl Deltas<'_> {
    /// Decodes tokens from `first` on; `next` deltas lie before them. Gives those before the token
    /// after.
    #[inline(always)]
    fn read<S: Simd, F: Field>(
        &mut self,
        simd: S,
        first: usize,
        mut next: usize,
        out: &mut [Block],
    ) -> usize {
        let blocks = self.row.len();
        for (token, out) in (first..).zip(out.chunks_exact_mut(blocks)) {
            let masks = &self.masks[token * blocks..][..blocks];
            let state = self.row.iter_mut().zip(self.scales);
            for ((mask, out), (row, scales)) in masks.iter().zip(out).zip(state) {
                for i in 0..BLOCK / S::LANES {
                    let key =
                        Self::add::<S, F>(simd, self.fields, *mask, i, &mut next, row, scales);
                    simd.store(out, i, key);
                    if self.chain {
                        simd.store(row, i, key);
                    }
                }
            }
        }
        next
    }

    /// Lets a chain run over tokens that nobody wants.
    #[inline(always)]
    fn skip<S: Simd, F: Field>(&mut self, simd: S, tokens: Range<usize>, mut next: usize) -> usize {
        let blocks = self.row.len();
        for token in tokens {
            let masks = &self.masks[token * blocks..][..blocks];
            for (mask, (row, scales)) in masks.iter().zip(self.row.iter_mut().zip(self.scales)) {
                for i in 0..BLOCK / S::LANES {
                    let key =
                        Self::add::<S, F>(simd, self.fields, *mask, i, &mut next, row, scales);
                    simd.store(row, i, key);
                }
            }
        }
        next
    }

    /// Vector `i` of a block of the row, with the deltas that `mask` keeps.
    #[inline(always)]
    fn add<S: Simd, F: Field>(
        simd: S,
        fields: &[u8],
        mask: u32,
        i: usize,
        next: &mut usize,
        row: &Block,
        scales: &Block,
    ) -> S::Floats {
        let lanes = mask >> (i * S::LANES) & (u32::MAX >> (32 - S::LANES));
        let delta = F::expand(simd, fields, *next, lanes);
        *next += lanes.count_ones() as usize;
        let row = simd.load(row, i);
        // A level times its scale is exact, so that fusing changes nothing.
        if F::SCALED { simd.fma(delta, simd.load(scales, i), row) } else { simd.add(row, delta) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Kernel, Kernels, Level};
    use super::*;
    use crate::delta::{AttentionPolicy, encode_page};
    use crate::sampler::Draws;

    /// Reads ranges of positions.
    struct Read<'a>(&'a PageLayout, &'a [Page], &'a [Range<usize>]);

    impl Kernel for Read<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Vec<f32> {
            let blocks = self.0.head_dim.div_ceil(BLOCK);
            let mut state = vec![[0.0; BLOCK]; Reader::state(blocks)];
            let mut reader = Reader::new(self.0, self.1);
            let mut found = Vec::new();
            for range in self.2 {
                let mut out = vec![[f32::NAN; BLOCK]; range.len() * blocks];
                reader.read(simd, range.start, range.len(), &mut state, &mut out);
                for row in out.chunks_exact(blocks) {
                    let (row, beyond) = row.as_flattened().split_at(self.0.head_dim);
                    assert!(beyond.iter().all(|&x| x == 0.0), "{beyond:?} beyond the row");
                    found.extend_from_slice(row);
                }
            }
            found
        }
    }

    #[test]
    fn pages_stand_for_the_same_keys_as_reconstructed() {
        let mut draws = Draws::new(5);
        let mut policies = vec!["keys=int8".to_owned()];
        for keys in ["keys=channel4", "keys=channel2"] {
            policies.push(keys.into());
        }
        for theta in ["0", "0.6", "1000"] {
            for reference in ["continuous", "anchored", "mean"] {
                for deltas in ["f16", "int8", "int4"] {
                    policies
                        .push(format!("delta theta={theta} reference={reference} deltas={deltas}"));
                }
            }
        }
        for head_dim in [2, 34, 80, 128] {
            for text in policies.iter().flat_map(|p| [16, 64].map(|c| format!("{p} page={c}"))) {
                let policy: AttentionPolicy = text.parse().expect(&text);
                let layout = PageLayout::new(&policy, head_dim).expect("fits").expect("pages");
                let tokens = layout.tokens;
                let mut pages = Vec::new();
                for _ in 0..3 {
                    let keys = (0..tokens * head_dim).map(|_| 4.0 * draws.draw() - 2.0);
                    pages.push(encode_page(&layout, &keys.collect::<Vec<_>>(), None));
                }
                let all: Vec<f32> =
                    pages.iter().flat_map(|page| page.reconstruct(&layout)).collect();
                // At once; and in parts that skip tokens and cross pages.
                let (whole, odd) = (
                    0..3 * tokens,
                    [3..5, 5..6, tokens - 3..tokens + 2, 2 * tokens + 7..3 * tokens],
                );
                for ranges in [std::slice::from_ref(&whole), &odd[..]] {
                    let want: Vec<f32> = ranges
                        .iter()
                        .flat_map(|r| &all[r.start * head_dim..r.end * head_dim])
                        .copied()
                        .collect();
                    for kernels in Kernels::available() {
                        let level = Level::new(kernels).expect("available");
                        let found = level.run(Read(&layout, &pages, ranges));
                        assert_eq!(found, want, "{text} D={head_dim} {kernels:?}");
                    }
                }
            }
        }
    }
}
