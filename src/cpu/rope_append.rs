//! The rotation of queries and keys (<https://arxiv.org/abs/2104.09864>, equation 34, on halves),
//! and the cache.

use super::cache::{Cache, Place, StoreMut};
use super::norm::SERIAL;
use super::rows::Blocks;
use super::simd::{BLOCK, Kernel, Simd};
use super::tensor::Tensor;
use super::values::Quantise;
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
    let (rows, width) = (qkv.rows(), qkv.width());
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
    let items = cache.append(position, rows);
    machine.each_of(small, items, |_worker, (head, place)| {
        let start = (heads + head) * head_dim;
        let columns = qkv.chunks_exact(width).map(|row| &row[start..start + head_dim]);
        match place {
            Place::Rows { rows, slots, end } => {
                let places = (position..end).map(|n| n % slots * head_dim);
                match rows {
                    StoreMut::F32(all) => {
                        for (row, at) in columns.zip(places) {
                            all[at..at + head_dim].copy_from_slice(row);
                        }
                    }
                    StoreMut::F16(all) => {
                        for (row, at) in columns.zip(places) {
                            let place = &mut all[at..at + head_dim];
                            machine.level.run(Round { row: Blocks::new(row), place });
                        }
                    }
                }
            }
            Place::Quantised(format, places) => {
                for (row, place) in columns.zip(places) {
                    machine.level.run(Quantise { format, row: Blocks::new(row), place });
                }
            }
        }
    });
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
