//! `norm`: RMSNorm, with quantisation where the output is int8.

use std::ops::Range;

use super::shader::{Abilities, Binding, Kernel, PRECISE, Program, finish, reduce, wgsl};
use super::stream::Stream;
use super::tensor::{Norm, Tensor};
use crate::backend::TensorFormat;
use crate::error::Result;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    width: u32,
    count4: u32,
    eps: f32,
}

pub(super) fn program(out: TensorFormat, abilities: Abilities) -> Program {
    let mut bindings = vec![(1, Binding::Read), (2, Binding::Read), (3, Binding::Write)];
    if out == TensorFormat::Int8 {
        bindings.push((4, Binding::Write));
    }
    Program {
        constants: vec![("WORKGROUP", 256)],
        parts: vec![reduce(abilities), PRECISE, finish(out), wgsl!("norm.wgsl")],
        bindings,
        f16: false,
    }
}

impl Stream {
    pub(super) fn norm_rows(
        &mut self,
        x: &Tensor,
        rows: Range<usize>,
        norm: &Norm,
        out: &mut Tensor,
    ) -> Result<()> {
        let widths = x.width == norm.width && out.width == norm.width;
        let inside = rows.end <= x.rows && rows.len() <= out.capacity;
        self.expect("norm", widths && inside && x.format == TensorFormat::F32, || {
            let shapes = [[x.rows, x.width], [out.capacity, out.width]];
            format!("rows {rows:?} of {shapes:?}, weight of {}", norm.width)
        })?;
        out.rows = rows.len();
        let params = Params {
            first: rows.start as u32,
            width: x.width as u32,
            count4: (x.stride() / 4) as u32,
            eps: norm.eps,
        };
        let mut buffers = vec![&x.data, &norm.weight, &out.data];
        buffers.extend(&out.scales);
        let kernel = Kernel::Norm { out: out.format };
        self.recorder.dispatch(kernel, &params, &buffers, [out.rows, 1, 1])
    }
}
