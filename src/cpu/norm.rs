//! RMSNorm (<https://arxiv.org/abs/1910.07467>, equation 4), a row a task.

use std::ops::Range;

use super::rows::{Blocks, WriteRow};
use super::tensor::Tensor;
use super::{Machine, Norm};

/// Elements below which waking other threads costs more than it saves.
pub(super) const SERIAL: usize = 16 * 1024;

/// See [`crate::backend::Operations::norm`].
pub(super) fn norm(
    machine: &Machine,
    x: &Tensor,
    rows: Range<usize>,
    norm: &Norm,
    out: &mut Tensor,
) {
    let width = x.width();
    assert_eq!(norm.weight.len(), width, "norm width");
    out.set_rows(rows.len());
    let row = |_worker: usize, (row, out)| {
        let source = Blocks::new(x.row(row));
        let norm = Some((Blocks::new(&norm.weight), norm.eps));
        machine.level.run(WriteRow { source, norm, out });
    };
    let small = rows.len() * width < SERIAL;
    let items: Vec<_> = rows.zip(out.rows_mut()).collect();
    machine.each_of(small, items, row);
}
