//! The products of attention, in tiles that fit the registers.
//!
//! Four queries pass by at once: as many as share a KV head in most models, so that what is encoded
//! is decoded once for all of them.

use std::ops::Range;

use super::attention::{Block, KEYS};
use super::reading::ask_beyond;
use super::simd::{BLOCK, Simd};
use super::weights::Weight;

/// Queries of a tile.
pub(super) const TILE: usize = 4;

/// Scores of each query of a tile with the keys of a block.
pub(super) type Scores = [Block; TILE];

/// Rows as blocks of encoded columns.
#[inline(always)]
pub(super) fn raw<T: bytemuck::Pod, const BYTES: usize>(rows: &[T]) -> &[[u8; BYTES]] {
    bytemuck::cast_slice::<T, u8>(rows).as_chunks().0
}

/// Products of the queries of a tile, `[TILE, blocks]`, with as many rows `[blocks]` as there are
/// `places`, which is where they go; what lies so many bytes beyond is asked for ahead if `ask`.
#[inline(always)]
pub(super) fn products<S: Simd, W: Weight>(
    simd: S,
    query: &[Block],
    rows: &[W::Raw],
    out: &mut Scores,
    places: Range<usize>,
    ask: Option<usize>,
) {
    if S::TILE >= 4 {
        products_of::<S, W, 4>(simd, query, rows, out, places, ask);
    } else {
        products_of::<S, W, 2>(simd, query, rows, out, places, ask);
    }
}

/// The same, `K` rows at once while there are as many.
#[inline(always)]
fn products_of<S: Simd, W: Weight, const K: usize>(
    simd: S,
    query: &[Block],
    rows: &[W::Raw],
    out: &mut Scores,
    places: Range<usize>,
    ask: Option<usize>,
) {
    let blocks = query.len() / TILE;
    let whole = places.len() / K * K;
    let (whole_rows, rest_rows) = rows.split_at(whole * blocks);
    let firsts = places.clone().step_by(K);
    for (first, rows) in firsts.zip(whole_rows.chunks_exact(K * blocks)) {
        if let Some(distance) = ask {
            ask_beyond(simd, rows, distance);
        }
        tile::<S, W, K>(simd, query, rows, out, first);
    }
    for (place, row) in (places.start + whole..places.end).zip(rest_rows.chunks_exact(blocks)) {
        tile::<S, W, 1>(simd, query, row, out, place);
    }
}

/// Products of the queries of a tile with `K` rows, at most four, into places from `first` on.
#[inline(always)]
fn tile<S: Simd, W: Weight, const K: usize>(
    simd: S,
    query: &[Block],
    rows: &[W::Raw],
    out: &mut Scores,
    first: usize,
) {
    let blocks = query.len() / TILE;
    let query: [_; TILE] = std::array::from_fn(|q| &query[q * blocks..][..blocks]);
    let rows: [_; K] = std::array::from_fn(|k| &rows[k * blocks..][..blocks]);
    // Of each query, as many as there are rows.
    let mut sums = [[simd.splat(0.0); 4]; TILE];
    for block in 0..blocks {
        for i in 0..BLOCK / S::LANES {
            let mut keys = [simd.splat(0.0); K];
            for k in 0..K {
                keys[k] = W::load(simd, &rows[k][block], 0, i);
            }
            for q in 0..TILE {
                let query = simd.load(&query[q][block], i);
                for k in 0..K {
                    sums[q][k] = simd.fma(query, keys[k], sums[q][k]);
                }
            }
        }
    }
    if K == 4 {
        for q in 0..TILE {
            out[q][first..][..4].copy_from_slice(&simd.sum4(sums[q]));
        }
    } else {
        for k in 0..K {
            let products = simd.sum4([sums[0][k], sums[1][k], sums[2][k], sums[3][k]]);
            for q in 0..TILE {
                out[q][first + k] = products[q];
            }
        }
    }
}

/// Adds `weights` `[padded, KEYS]` times the values in `rows`, at most [`KEYS`] of `stride` bytes each,
/// to `sums` `[padded, blocks + 1]`; what lies so many bytes beyond is asked for ahead if `ask`.
#[inline(always)]
pub(super) fn add_values<S: Simd, W: Weight>(
    simd: S,
    weights: &[Block],
    (rows, stride): (&[u8], usize),
    sums: &mut [Block],
    ask: Option<usize>,
) {
    let blocks = sums.len() / weights.len() - 1;
    let of = (rows, stride);
    // Evenly, or a burst of requests keeps all else waiting.
    let ask = |part, parts| ask.map(|distance| (part, parts, distance));
    // As many sums as leave registers for the rest: what is decoded meets four queries.
    match S::LANES {
        4 => {
            add_values_of::<S, W, 1, 0, 4>(simd, weights, of, sums, ask(0, 2));
            add_values_of::<S, W, 1, 4, 4>(simd, weights, of, sums, ask(1, 2));
        }
        8 => {
            add_values_of::<S, W, 1, 0, 2>(simd, weights, of, sums, ask(0, 2));
            add_values_of::<S, W, 1, 2, 2>(simd, weights, of, sums, ask(1, 2));
        }
        _ if blocks.is_multiple_of(2) => {
            add_values_of::<S, W, 2, 0, 2>(simd, weights, of, sums, ask(0, 1));
        }
        _ => add_values_of::<S, W, 1, 0, 2>(simd, weights, of, sums, ask(0, 1)),
    }
}

/// The same of vectors `FROM..FROM + V` of each block, `B` blocks and a tile of queries at once; of `ask`,
/// this part of how many of the rows is asked for, so many bytes beyond.
#[inline(always)]
fn add_values_of<S: Simd, W: Weight, const B: usize, const FROM: usize, const V: usize>(
    simd: S,
    weights: &[Block],
    (rows, stride): (&[u8], usize),
    sums: &mut [Block],
    ask: Option<(usize, usize, usize)>,
) {
    let width = sums.len() / weights.len();
    for (weights, sums) in weights.chunks_exact(TILE).zip(sums.chunks_exact_mut(TILE * width)) {
        let weights: [_; TILE] = std::array::from_fn(|q| &weights[q]);
        for first in (0..width - 1).step_by(B) {
            let mut added = [[[simd.splat(0.0); V]; B]; TILE];
            for q in 0..TILE {
                for b in 0..B {
                    for v in 0..V {
                        added[q][b][v] = simd.load(&sums[q * width + first + b], FROM + v);
                    }
                }
            }
            for (key, row) in rows.chunks_exact(stride).take(KEYS).enumerate() {
                let values = &W::split(row).0[first..][..B];
                if let Some((part, parts, distance)) = ask
                    && key % parts == part
                {
                    ask_beyond(simd, values, distance);
                }
                for b in 0..B {
                    for v in 0..V {
                        let value = W::load(simd, &values[b], 0, FROM + v);
                        for q in 0..TILE {
                            let weight = simd.splat(weights[q][key]);
                            added[q][b][v] = simd.fma(weight, value, added[q][b][v]);
                        }
                    }
                }
            }
            for q in 0..TILE {
                for b in 0..B {
                    for v in 0..V {
                        simd.store(&mut sums[q * width + first + b], FROM + v, added[q][b][v]);
                    }
                }
            }
        }
    }
}
