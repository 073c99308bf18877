//! Cases of `norm` and `gate`, which work on each row by itself and may quantise it.

use std::ops::Range;

use super::{Check, FLUSHED, Inputs, U, compare, measure, step};
use crate::backend::{Activation, Backend, Operations, TensorFormat};
use crate::error::Result;
use crate::reference::Reference;

/// Epsilon of the gate's norm.
const EPS: f64 = 1e-5;

/// What an operation wrote.
enum Output {
    F32(Vec<f32>),
    Int8(Vec<i8>, Vec<f32>),
}

fn output<B: Backend>(
    stream: &mut B::Stream,
    tensor: &B::Tensor,
    format: TensorFormat,
) -> Result<Output> {
    stream.submit()?;
    Ok(match format {
        TensorFormat::F32 => Output::F32(stream.read(tensor)?),
        TensorFormat::Int8 => {
            let (values, scales) = stream.read_int8(tensor)?;
            Output::Int8(values, scales)
        }
    })
}

/// Compares what a backend wrote with the reference's floats `want`, `[rows, width]`, of which
/// element `i` may be off by `bound[i]`.
///
/// A quantised element is within half a level of the exact quotient, but for the error of that
/// quotient: of the element, of the row's maximum, of the division and the multiplication.
fn compare_rows(
    operation: &'static str,
    case: String,
    got: &Output,
    want: &[f32],
    width: usize,
    bound: &[f64],
) -> Vec<Check> {
    let (values, scales) = match got {
        Output::F32(got) => return vec![compare(operation, case, got, want, |i| bound[i])],
        Output::Int8(values, scales) => (values, scales),
    };
    let maximum = |row: &[f32]| row.iter().fold(1e-5f32, |m, v| m.max(v.abs()));
    let maxima: Vec<f32> = want.chunks_exact(width).map(maximum).collect();
    let exact_scales: Vec<f32> = maxima.iter().map(|m| m / 127.0).collect();
    // Relative error of a row's maximum.
    let slack = |row: usize| {
        let bound = bound[row * width..][..width].iter().copied().fold(0.0, f64::max);
        bound / f64::from(maxima[row]) + 4.0 * U
    };
    let scale = |row: usize| (slack(row) + 4.0 * U) * f64::from(exact_scales[row]);
    let level = |i: usize| {
        let (row, per_level) = (i / width, 127.0 / f64::from(maxima[i / width]));
        let error = (f64::from(values[i]) - f64::from(want[i]) * per_level).abs();
        (error, 0.5 + bound[i] * per_level + 127.0 * (slack(row) + 4.0 * U))
    };
    vec![
        compare(operation, format!("{case}, scales"), scales, &exact_scales, scale),
        measure(operation, case, values.len(), want.len(), level),
    ]
}

/// The mean of squares has only positive terms, so that its relative error is at most `(n + 1) u`,
/// half of which goes through the root; root, division and the product with the weight add a few
/// roundings.
fn norm_error(width: usize) -> f64 {
    (width as f64 / 2.0 + 8.0) * U
}

/// A case of `norm`.
struct Norm<'a> {
    /// `[rows, width]`.
    x: &'a [f32],
    width: usize,
    weight: &'a [f32],
    eps: f32,
}

fn normed<B: Backend>(
    backend: &B,
    case: &Norm<'_>,
    live: Range<usize>,
    format: TensorFormat,
) -> Result<Output> {
    let rows = case.x.len() / case.width;
    let norm = backend.norm(case.weight, case.eps)?;
    let mut x = backend.tensor(rows + 2, case.width, TensorFormat::F32)?;
    backend.write(&mut x, case.x)?;
    let mut out = backend.tensor(rows + 1, case.width, format)?;
    let mut stream = step(backend, rows, 32)?;
    stream.norm(&x, live, &norm, &mut out)?;
    output::<B>(&mut stream, &out, format)
}

/// The `live` of so many rows, into each of some formats.
pub(super) fn norm_of<B: Backend>(
    backend: &B,
    inputs: &mut Inputs,
    (width, rows, live): (usize, usize, Range<usize>),
    formats: &[TensorFormat],
) -> Result<Vec<Check>> {
    let x = inputs.rows(rows, width);
    let weight = inputs.floats(width, 2.0);
    let case = Norm { x: &x, width, weight: &weight, eps: 1e-5 };
    let Output::F32(want) = normed(&Reference::new(), &case, live.clone(), TensorFormat::F32)?
    else {
        unreachable!("F32 was asked for");
    };
    let mut checks = Vec::new();
    for &format in formats {
        let got = normed(backend, &case, live.clone(), format)?;
        let name = format!("width {width}, rows {live:?} of {rows}, to {format:?}");
        let bound = |y: &f32| norm_error(width) * f64::from(y.abs()) + FLUSHED;
        let bound: Vec<f64> = want.iter().map(bound).collect();
        checks.extend(compare_rows("norm", name, &got, &want, width, &bound));
    }
    Ok(checks)
}

pub(super) fn norm<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(4);
    for shape in [
        (1, 1, 0..1),
        (3, 5, 0..5),
        (31, 2, 1..2),
        (64, 17, 0..17),
        (100, 5, 2..4),
        (257, 5, 0..5),
        (2560, 6, 5..6),
        (2560, 33, 0..33),
    ] {
        let formats = [TensorFormat::F32, TensorFormat::Int8];
        checks.extend(norm_of(backend, &mut inputs, shape, &formats)?);
    }

    // Where epsilon does not matter, a norm does not see the scale of its input.
    let (width, x) = (300, inputs.floats(300, 1.0));
    let weight = vec![1.0; width];
    let large: Vec<f32> = x.iter().map(|v| v * 1024.0).collect();
    let case = |x| Norm { x, width, weight: &weight, eps: 1e-12 };
    let small = normed(backend, &case(&x), 0..1, TensorFormat::F32)?;
    let large = normed(backend, &case(&large), 0..1, TensorFormat::F32)?;
    if let (Output::F32(small), Output::F32(large)) = (small, large) {
        let tolerance = |i: usize| 2.0 * norm_error(width) * f64::from(small[i]).abs() + 1e-10;
        checks.push(compare("norm", "of a scaled row".into(), &large, &small, tolerance));
    }
    Ok(checks)
}

/// A case of `gate`.
struct Gate<'a> {
    /// `[rows, 2 * width]`.
    gate_up: &'a [f32],
    width: usize,
    activation: Activation,
    norm: Option<&'a [f32]>,
}

/// How far each element of `want` may be off.
fn gate_bound(case: &Gate<'_>, want: &[f32]) -> Vec<f64> {
    let gate_up = |i: usize| {
        let row = &case.gate_up[i / case.width * 2 * case.width..];
        (f64::from(row[i % case.width]), f64::from(row[case.width + i % case.width]))
    };
    let relative = |i: usize| match case.activation {
        // exp is off by 3 + 2 |x| ULP, its sum with 1, the division and two products by a few
        // more. Beyond -88 it overflows and only zero is left.
        Activation::Silu => 2.0 * U * (3.0 + 2.0 * gate_up(i).0.abs().min(88.0) + 8.0),
        Activation::Relu2 => 4.0 * U,
    };
    let bound = |i: usize| {
        let (gate, up) = gate_up(i);
        let flushed = 4.0 * FLUSHED * (1.0 + (gate * up).abs());
        let Some(weight) = case.norm else {
            return relative(i) * f64::from(want[i].abs()) + flushed;
        };
        // A norm adds the errors of the row's mean square and its own, and multiplies by at most
        // 1 / sqrt(eps).
        let start = i / case.width * case.width;
        let all = (start..start + case.width).map(relative).fold(0.0, f64::max);
        let flushed = flushed * f64::from(weight[i % case.width].abs()) / EPS.sqrt();
        (relative(i) + all + norm_error(case.width)) * f64::from(want[i].abs()) + flushed + FLUSHED
    };
    (0..want.len()).map(bound).collect()
}

/// Gate and up of so many rows, into each of some formats.
pub(super) fn gate_of<B: Backend>(
    backend: &B,
    inputs: &mut Inputs,
    (width, rows): (usize, usize),
    (activation, normed): (Activation, bool),
    formats: &[TensorFormat],
) -> Result<Vec<Check>> {
    fn gated<B: Backend>(backend: &B, case: &Gate<'_>, format: TensorFormat) -> Result<Output> {
        let rows = case.gate_up.len() / (2 * case.width);
        let norm = case.norm.map(|weight| backend.norm(weight, EPS as f32)).transpose()?;
        let mut gate_up = backend.tensor(rows + 1, 2 * case.width, TensorFormat::F32)?;
        backend.write(&mut gate_up, case.gate_up)?;
        let mut out = backend.tensor(rows + 2, case.width, format)?;
        let mut stream = step(backend, rows, 32)?;
        stream.gate(&gate_up, case.activation, norm.as_ref(), &mut out)?;
        output::<B>(&mut stream, &out, format)
    }

    let mut gate_up = inputs.floats(rows * 2 * width, 8.0);
    // The last row is zero but where there is only one; the middle one has gates at which a careless
    // sigmoid overflows.
    if rows > 1 {
        gate_up[(rows - 1) * 2 * width..].fill(0.0);
    }
    if rows > 2 {
        let middle = &mut gate_up[rows / 2 * 2 * width..][..width];
        for (gate, extreme) in
            middle.iter_mut().zip([-100.0, 100.0, -88.0, 1e4, -1e4, 0.0, -0.0, 1e-20])
        {
            *gate = extreme;
        }
    }
    let weight = inputs.floats(width, 2.0);
    let norm = normed.then_some(&weight[..]);
    let case = Gate { gate_up: &gate_up, width, activation, norm };
    let Output::F32(want) = gated(&Reference::new(), &case, TensorFormat::F32)? else {
        unreachable!("F32 was asked for");
    };
    let bound = gate_bound(&case, &want);
    let mut checks = Vec::new();
    for &format in formats {
        let got = gated(backend, &case, format)?;
        let normed = if normed { ", normed" } else { "" };
        let name = format!("{activation:?}, [{rows}, {width}]{normed}, to {format:?}");
        checks.extend(compare_rows("gate", name, &got, &want, width, &bound));
    }
    Ok(checks)
}

pub(super) fn gate<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(5);
    for shape in [(1, 1), (3, 5), (31, 2), (64, 17), (257, 5), (1000, 3), (6912, 2)] {
        for activation in [Activation::Silu, Activation::Relu2] {
            for normed in [false, true] {
                let formats = [TensorFormat::F32, TensorFormat::Int8];
                let how = (activation, normed);
                checks.extend(gate_of(backend, &mut inputs, shape, how, &formats)?);
            }
        }
    }
    Ok(checks)
}
