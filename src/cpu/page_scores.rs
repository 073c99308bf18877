//! Scores of a few queries with compressed pages, which are not unpacked.
//!
//! What a page stands for is linear in what it holds, and so are scores. With `q` a query:
//!
//! | page | its scores |
//! |---|---|
//! | `Int8` | `scale_t (q . level_t)` |
//! | `Channel` | `q . minimum + (q scale) . level_t`, the product with the scales once a page |
//! | `Delta`, mean | `q . mean + (q scale) . level_t`, over the deltas that token `t` keeps |
//! | `Delta`, chains | `score_t = score_(t-1) + (q scale) . level_t`, from `q . reference` on |
//!
//! so that a token costs what its levels cost, and a chain needs the score of the token before
//! instead of its key.
//!
//! The next page is asked for ahead only where that pays ([`Reading::asks`]): elsewhere requests keep the
//! values waiting, which costs more than it gains (benches/runs/2026-11-25-epyc-depth). Levels are asked
//! for row by row, at the distance between the two pages; of deltas nobody knows where they lie, and a
//! part of the next page is asked for at once.
//!
//! [`Reading::asks`]: super::reading::Reading::asks

use std::ops::Range;

use super::attention::Block;
use super::attention_tiles::{Scores, TILE, products, raw};
use super::pages::{Bytes, Field, Halves, Nibbles, prefetch_next};
use super::simd::{BLOCK, LINE, Simd, apart, pairs_apart};
use super::weights::{Apart4, Float16, Float32, Row, Signed8, Unsigned2, Weight};
use crate::delta::{ChannelBits, DeltaFormat, KeyFormat, Page, PageLayout, Reference};

/// Scores the pages of one KV head in the order of their tokens.
pub(super) struct PageScores<'a> {
    layout: &'a PageLayout,
    pages: &'a [Page],
    /// Whether to ask for the next page ahead.
    ask: bool,
    /// The page that the rest is about.
    page: Option<usize>,
    /// Queries times the scales of channels, in the order of the levels, `[tiles, TILE, blocks]`; not
    /// used where channels have none.
    scaled: &'a mut [Block],
    /// What is the same for all tokens, for a chain the score of the token before.
    base: [[f32; TILE]; 2],
    /// Of a chain, the token that comes next and the deltas before it.
    token: usize,
    next: usize,
    /// `[2, blocks]`.
    constants: &'a mut [Block],
}

impl<'a> PageScores<'a> {
    /// Blocks of memory that it needs, for so many tiles of queries of `blocks` blocks.
    pub(super) fn memory(tiles: usize, blocks: usize) -> usize {
        (tiles * TILE + 2) * blocks
    }

    pub(super) fn new(
        layout: &'a PageLayout,
        pages: &'a [Page],
        ask: bool,
        tiles: usize,
        memory: &'a mut [Block],
    ) -> Self {
        let blocks = layout.head_dim / BLOCK;
        let (scaled, rest) = memory.split_at_mut(tiles * TILE * blocks);
        let constants = &mut rest[..2 * blocks];
        let base = [[0.0; TILE]; 2];
        Self { layout, pages, ask, page: None, scaled, base, token: 0, next: 0, constants }
    }

    /// Writes the scores of the queries `[tiles, TILE, blocks]` with the keys at `positions`, which lie
    /// in full pages, from place `at` of each tile's scores on.
    ///
    /// Positions must not go back in a page of a chain.
    #[inline(always)]
    pub(super) fn scores<S: Simd>(
        &mut self,
        simd: S,
        positions: Range<usize>,
        query: &[Block],
        mut at: usize,
        out: &mut [Scores],
    ) {
        let tokens = self.layout.tokens;
        let mut position = positions.start;
        while position < positions.end {
            let (page, first) = (position / tokens, position % tokens);
            let count = (tokens - first).min(positions.end - position);
            if self.page != Some(page) {
                self.page = Some(page);
                self.open(simd, query);
            }
            self.page_scores(simd, first, at..at + count, query, out);
            (position, at) = (position + count, at + count);
        }
    }

    /// Prepares what a page needs once.
    #[inline(always)]
    fn open<S: Simd>(&mut self, simd: S, query: &[Block]) {
        let Self { layout, pages, page: Some(page), scaled, base, constants, .. } = self else {
            return;
        };
        (self.token, self.next) = (0, 0);
        let bytes: &[u8] = bytemuck::cast_slice(&pages[*page].words);
        let head_dim = layout.head_dim;
        let (scales, minima) = constants.split_at_mut(head_dim / BLOCK);
        match layout.keys {
            KeyFormat::Plain | KeyFormat::Int8 => return,
            KeyFormat::Channel(_) => {
                let pairs: &[[u8; 4 * BLOCK]] = raw(&bytes[..4 * head_dim]);
                for (pairs, (scales, minima)) in
                    pairs.iter().zip(scales.iter_mut().zip(&mut *minima))
                {
                    let mut both = [[0.0; BLOCK]; 2];
                    Row::<Float16>::new(pairs, &[]).decode(simd, &mut both);
                    // Scales and minima take turns.
                    [*scales, *minima] = pairs_apart(simd, &both);
                }
                start::<S, Float32>(simd, query, raw(minima), base);
            }
            KeyFormat::Delta(delta) => {
                start::<S, Float16>(simd, query, raw(&bytes[..2 * head_dim]), base);
                if delta.deltas == DeltaFormat::F16 {
                    return;
                }
                let at = 4 * layout.scales();
                Row::<Float16>::new(&bytes[at..at + 2 * head_dim], &[]).decode(simd, scales);
            }
        }
        let rows = query.chunks_exact(scales.len()).zip(scaled.chunks_exact_mut(scales.len()));
        for (query, scaled) in rows {
            for ((query, scales), scaled) in query.iter().zip(&*scales).zip(scaled) {
                for i in 0..BLOCK / S::LANES {
                    let product = simd.mul(simd.load(query, i), simd.load(scales, i));
                    simd.store(scaled, i, product);
                }
                if layout.keys == KeyFormat::Channel(ChannelBits::Four) {
                    *scaled = apart(simd, scaled);
                }
            }
        }
    }

    /// Scores of tokens from `first` on, of the page that is open, into `places`.
    #[inline(always)]
    fn page_scores<S: Simd>(
        &mut self,
        simd: S,
        first: usize,
        places: Range<usize>,
        query: &[Block],
        out: &mut [Scores],
    ) {
        let Some(page) = self.page else { return };
        let bytes: &[u8] = bytemuck::cast_slice(&self.pages[page].words);
        let next = self.pages.get(page + 1).filter(|_| self.ask);
        let next: Option<&[u8]> = next.map(|next| bytemuck::cast_slice(&next.words));
        // How far ahead the same levels of the next page are.
        let ask = next.map(|next| next.as_ptr().addr().wrapping_sub(bytes.as_ptr().addr()));
        match (next, self.layout.keys) {
            (Some(_), KeyFormat::Delta(_)) => {
                prefetch_next(simd, self.layout, self.pages, page, first..first + places.len());
            }
            // What comes before them.
            (Some(next), _) if first == 0 => {
                (0..4 * self.layout.levels()).step_by(LINE).for_each(|at| simd.prefetch(next, at));
            }
            _ => {}
        }
        let row = 4 * self.layout.level_words();
        let at = 4 * self.layout.levels() + first * row;
        let levels = at..at + places.len() * row;
        match self.layout.keys {
            KeyFormat::Plain => {}
            KeyFormat::Int8 => {
                let mut scales = [[0.0; BLOCK]; 1];
                let halves = &bytes[2 * first..2 * (first + places.len())];
                Row::<Float16>::new(halves, &[]).decode(simd, &mut scales);
                for (query, out) in query.chunks_exact(self.tile()).zip(out) {
                    let levels = raw(&bytes[levels.clone()]);
                    products::<S, Signed8>(simd, query, levels, out, places.clone(), ask);
                    for out in out {
                        let scores = out[places.clone()].iter_mut().zip(&scales[0]);
                        scores.for_each(|(score, scale)| *score *= scale);
                    }
                }
            }
            KeyFormat::Channel(bits) => {
                let tiles = self.scaled.chunks_exact(self.tile()).zip(&self.base);
                for ((query, base), out) in tiles.zip(out) {
                    let (levels, at) = (&bytes[levels.clone()], places.clone());
                    match bits {
                        ChannelBits::Four => {
                            products::<S, Apart4>(simd, query, raw(levels), out, at, ask);
                        }
                        ChannelBits::Two => {
                            products::<S, Unsigned2>(simd, query, raw(levels), out, at, ask);
                        }
                    }
                    for (out, base) in out.iter_mut().zip(base) {
                        out[places.clone()].iter_mut().for_each(|score| *score += base);
                    }
                }
            }
            KeyFormat::Delta(delta) => match delta.deltas {
                DeltaFormat::F16 => {
                    self.delta_scores::<S, Halves>(
                        simd,
                        delta.reference,
                        first,
                        places,
                        query,
                        out,
                    );
                }
                DeltaFormat::Int8 => {
                    self.delta_scores::<S, Bytes>(simd, delta.reference, first, places, query, out);
                }
                DeltaFormat::Int4 => {
                    self.delta_scores::<S, Nibbles>(
                        simd,
                        delta.reference,
                        first,
                        places,
                        query,
                        out,
                    );
                }
            },
        }
    }

    /// The same of a page of deltas.
    #[inline(always)]
    fn delta_scores<S: Simd, F: Field>(
        &mut self,
        simd: S,
        reference: Reference,
        first: usize,
        places: Range<usize>,
        query: &[Block],
        out: &mut [Scores],
    ) {
        let (tile, chain) = (self.tile(), reference != Reference::Mean);
        let Self { layout, pages, page: Some(page), scaled, base, token, next, .. } = self else {
            return;
        };
        let words = &pages[*page].words;
        let bytes: &[u8] = bytemuck::cast_slice(words);
        let (masks, fields) = (&words[layout.masks()..], &bytes[4 * layout.header_words()..]);
        if !chain {
            let at = 4 * layout.offsets() + 2 * first;
            (*token, *next) = (first, usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]])));
        }
        let query = if F::SCALED { scaled } else { query };
        let blocks = layout.mask_words();
        let end = first + places.len();
        let mut after = *next;
        for ((query, base), out) in query.chunks_exact(tile).zip(base).zip(out) {
            after = *next;
            // A chain runs over tokens that nobody wants, too.
            for token in *token..end {
                let masks = &masks[token * blocks..][..blocks];
                let mut scores = delta_products::<S, F>(simd, query, masks, fields, &mut after);
                scores.iter_mut().zip(&*base).for_each(|(score, base)| *score += base);
                if chain {
                    *base = scores;
                }
                if token >= first {
                    let place = places.start + token - first;
                    out.iter_mut().zip(scores).for_each(|(out, score)| out[place] = score);
                }
            }
        }
        (*token, *next) = (end, after);
    }

    /// Blocks of a tile of queries.
    fn tile(&self) -> usize {
        TILE * (self.layout.head_dim / BLOCK)
    }
}

/// Products of the queries with one row, a tile at a time.
#[inline(always)]
fn start<S: Simd, W: Weight>(simd: S, query: &[Block], row: &[W::Raw], out: &mut [[f32; TILE]]) {
    for (query, out) in query.chunks_exact(TILE * row.len()).zip(out) {
        let mut scores: Scores = [[0.0; BLOCK]; TILE];
        products::<S, W>(simd, query, row, &mut scores, 0..1, None);
        *out = scores.map(|scores| scores[0]);
    }
}

/// Products of the queries of a tile with the deltas that one token keeps; `next` deltas lie before
/// them.
///
/// Every lane is multiplied, zeros too: to leave some out of a vector takes longer.
#[inline(always)]
fn delta_products<S: Simd, F: Field>(
    simd: S,
    query: &[Block],
    masks: &[u32],
    fields: &[u8],
    next: &mut usize,
) -> [f32; TILE] {
    let blocks = masks.len();
    let query: [_; TILE] = std::array::from_fn(|q| &query[q * blocks..][..blocks]);
    let mut sums = [simd.splat(0.0); TILE];
    for (block, mask) in masks.iter().enumerate() {
        for i in 0..BLOCK / S::LANES {
            let lanes = mask >> (i * S::LANES) & (u32::MAX >> (32 - S::LANES));
            let delta = F::expand(simd, fields, *next, lanes);
            *next += lanes.count_ones() as usize;
            for q in 0..TILE {
                sums[q] = simd.fma(delta, simd.load(&query[q][block], i), sums[q]);
            }
        }
    }
    simd.sum4(sums)
}
