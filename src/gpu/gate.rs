//! `gate`: activation, product and sub-norm of the feed-forward block.

use super::shader::{Abilities, Binding, Kernel, PRECISE, Program, finish, reduce, wgsl};
use super::stream::Stream;
use super::tensor::{Norm, Tensor};
use crate::backend::{Activation, TensorFormat};
use crate::error::Result;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    width: u32,
    stride: u32,
    count4: u32,
    eps: f32,
}

pub(super) fn program(
    activation: Activation,
    norm: bool,
    out: TensorFormat,
    vec4: bool,
    abilities: Abilities,
) -> Program {
    let mut bindings = vec![(1, Binding::Read), (3, Binding::Write)];
    if out == TensorFormat::Int8 {
        bindings.push((4, Binding::Write));
    }
    if norm {
        bindings.push((2, Binding::Read));
    }
    let normalise =
        if norm { wgsl!("common/gate_norm.wgsl") } else { wgsl!("common/gate_plain.wgsl") };
    let read =
        if vec4 { wgsl!("common/gate_up_vec4.wgsl") } else { wgsl!("common/gate_up_scalar.wgsl") };
    let silu = activation == Activation::Silu;
    Program {
        constants: vec![("WORKGROUP", 256), ("SILU", silu.into())],
        parts: vec![reduce(abilities), PRECISE, read, finish(out), normalise, wgsl!("gate.wgsl")],
        bindings,
        f16: false,
    }
}

impl Stream {
    pub(super) fn gate_rows(
        &mut self,
        gate_up: &Tensor,
        activation: Activation,
        norm: Option<&Norm>,
        out: &mut Tensor,
    ) -> Result<()> {
        let widths =
            gate_up.width == 2 * out.width && norm.is_none_or(|norm| norm.width == out.width);
        let fits = gate_up.format == TensorFormat::F32 && gate_up.rows <= out.capacity;
        self.expect("gate", widths && fits, || {
            let shapes = [[gate_up.rows, gate_up.width], [out.capacity, out.width]];
            format!("shapes {shapes:?}")
        })?;
        out.rows = gate_up.rows;
        let params = Params {
            width: out.width as u32,
            stride: gate_up.stride() as u32,
            count4: (out.stride() / 4) as u32,
            eps: norm.map_or(0.0, |norm| norm.eps),
        };
        let mut buffers = vec![&gate_up.data, &out.data];
        buffers.extend(&out.scales);
        buffers.extend(norm.map(|norm| &norm.weight));
        let vec4 = out.width.is_multiple_of(4);
        let kernel = Kernel::Gate { activation, norm: norm.is_some(), out: out.format, vec4 };
        self.recorder.dispatch(kernel, &params, &buffers, [out.rows, 1, 1])
    }
}
