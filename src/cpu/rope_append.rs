//! The rotation of queries and keys (<https://arxiv.org/abs/2104.09864>, equation 34, on halves),
//! and the cache.

use super::norm::SERIAL;
use super::rows::Blocks;
use super::simd::{BLOCK, Kernel, Simd};
use super::tensor::{Cache, Store, Tensor};
use super::{Machine, Rope};
use crate::backend::AttentionShape;

/// See [`crate::backend::Operations::rope_append`].
pub(super) fn rope_append(
    machine: &Machine,
    position: usize,
    qkv: &mut Tensor,
    rope: &Rope,
    cache: &mut Cache,
) {
    let AttentionShape { heads, kv_heads, head_dim } = cache.shape;
    let (rows, width, context) = (qkv.rows(), qkv.width(), cache.context);
    assert!(position + rows <= context, "context");
    assert_eq!(width, cache.shape.qkv_width(), "qkv width");
    let small = rows * width < SERIAL;

    // Queries and keys are neighbours; values are not rotated.
    let angles = &rope.table[position * head_dim..][..rows * head_dim];
    let items: Vec<_> =
        qkv.floats_mut().chunks_exact_mut(width).zip(angles.chunks_exact(head_dim)).collect();
    machine.each_of(small, items, |_worker, (row, angles)| {
        let rotated = &mut row[..(heads + kv_heads) * head_dim];
        machine.level.run(Rotate { rotated, angles });
    });

    let qkv = qkv.floats();
    let columns = |head: usize| {
        let start = (heads + head) * head_dim;
        qkv.chunks_exact(width).map(move |row| &row[start..start + head_dim])
    };
    let new = position * head_dim..(position + rows) * head_dim;
    // In the order of the columns: the keys of all heads, then the values.
    let stores = [&mut cache.keys, &mut cache.values];
    let mut items = Vec::with_capacity(2 * kv_heads);
    for store in stores {
        match store {
            Store::F32(all) => {
                let heads = all.chunks_exact_mut(context * head_dim);
                items.extend(heads.map(|all| Place::F32(&mut all[new.clone()])));
            }
            Store::F16(all) => {
                let heads = all.chunks_exact_mut(context * head_dim);
                items.extend(heads.map(|all| Place::F16(&mut all[new.clone()])));
            }
        }
    }
    let items: Vec<_> = items.into_iter().enumerate().collect();
    machine.each_of(small, items, |_worker, (head, place)| match place {
        Place::F32(place) => {
            for (row, place) in columns(head).zip(place.chunks_exact_mut(head_dim)) {
                place.copy_from_slice(row);
            }
        }
        Place::F16(place) => {
            for (row, place) in columns(head).zip(place.chunks_exact_mut(head_dim)) {
                machine.level.run(Round { row: Blocks::new(row), place });
            }
        }
    });
}

/// Where the step's keys or values of one head go, `[T, D]`.
enum Place<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [u16]),
}

/// Rotates all heads of a row.
struct Rotate<'a> {
    /// `[heads, D]`.
    rotated: &'a mut [f32],
    /// `[D / 2]` cosines, then as many sines.
    angles: &'a [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let (cos, sin) = self.angles.split_at(self.angles.len() / 2);
        for head in self.rotated.chunks_exact_mut(self.angles.len()) {
            let (first, second) = head.split_at_mut(cos.len());
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

/// Rounds a head `[D]` to `f16`.
struct Round<'a> {
    row: Blocks<'a>,
    place: &'a mut [u16],
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (block, place) in self.place.chunks_mut(BLOCK).enumerate() {
            let mut half = [0; BLOCK];
            for i in 0..BLOCK / S::LANES {
                simd.store_f16(&mut half, i, simd.load(self.row.get(block), i));
            }
            super::rows::copy(&half, place);
        }
    }
}
