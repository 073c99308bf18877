//! The gate of the feed-forward layer, with the norm that BitNet has after it, a row a task.
//!
//! `act(gate) * up` is computed anew in each of the norm's passes, which is cheaper than a place
//! to keep it.

use super::norm::SERIAL;
use super::rows::{Blocks, Source, WriteRow};
use super::simd::Simd;
use super::tensor::Tensor;
use super::{Machine, Norm};
use crate::backend::Activation;

/// `act(gate) * up` of one row.
struct Gated<'a> {
    gate: Blocks<'a>,
    up: Blocks<'a>,
    activation: Activation,
}

impl Source for Gated<'_> {
    fn width(&self) -> usize {
        self.gate.width()
    }

    #[inline(always)]
    fn load<S: Simd>(&self, simd: S, block: usize, i: usize) -> S::Floats {
        let (gate, up) = (self.gate.load(simd, block, i), self.up.load(simd, block, i));
        let zero = simd.splat(0.0);
        match self.activation {
            Activation::Silu => {
                let one = simd.splat(1.0);
                let exp = simd.exp(simd.sub(zero, gate));
                simd.mul(simd.div(gate, simd.add(one, exp)), up)
            }
            Activation::Relu2 => {
                let positive = simd.max(zero, gate);
                simd.mul(simd.mul(positive, positive), up)
            }
        }
    }
}

/// See [`crate::backend::Operations::gate`].
pub(super) fn gate(
    machine: &Machine,
    gate_up: &Tensor,
    activation: Activation,
    norm: Option<&Norm>,
    out: &mut Tensor,
) {
    let width = gate_up.width() / 2;
    assert_eq!(out.width(), width, "gate width");
    assert!(norm.is_none_or(|norm| norm.weight.len() == width), "norm width");
    let rows = gate_up.rows();
    out.set_rows(rows);
    let row = |_worker: usize, (row, out)| {
        let (gate, up) = gate_up.row(row).split_at(width);
        let source = Gated { gate: Blocks::new(gate), up: Blocks::new(up), activation };
        let norm = norm.map(|norm| (Blocks::new(&norm.weight), norm.eps));
        machine.level.run(WriteRow { source, norm, out });
    };
    let small = rows * width < SERIAL;
    let items: Vec<_> = (0..rows).zip(out.rows_mut()).collect();
    machine.each_of(small, items, row);
}
