//! Cases of `embed`, `linear_ternary` and `linear_float`.

use half::{bf16, f16};

use super::{Check, FLUSHED, Inputs, U, compare, step};
use crate::backend::{
    ACTIVATION_STEP, Backend, FIXED_COLS, FIXED_TOKENS, Input, Operations, Step, TensorFormat,
    WEIGHT_STEP,
};
use crate::checkpoint::{FloatType, MatrixSource};
use crate::delta::Phase;
use crate::error::Result;
use crate::reference::Reference;

/// Tokens of a step: about where a backend may switch from matrix-vector to matrix-matrix kernels, and
/// from small tiles to large ones; every second adds, and each kernel is to do both.
const ROWS: [usize; 10] = [1, 2, 3, 5, 7, 8, 17, 33, 65, 66];

/// A float weight format: its name, how the file stores it, and what becomes of that.
pub(super) type FloatFormat = (&'static str, FloatType, fn(MatrixSource) -> MatrixSource);

pub(super) const FLOATS: [FloatFormat; 5] = [
    ("f32", FloatType::F32, |source| source),
    ("f16", FloatType::F16, |source| source),
    ("bf16", FloatType::BF16, |source| source),
    ("q8", FloatType::F32, MatrixSource::into_q8),
    ("q4", FloatType::F32, MatrixSource::into_q4),
];

/// A float matrix with weights in [-1, 1) and each fifth row all zeros.
pub(super) fn float_matrix(
    inputs: &mut Inputs,
    rows: usize,
    cols: usize,
    (_, stored, target): FloatFormat,
) -> MatrixSource {
    let mut data = Vec::with_capacity(rows * cols * stored.bytes());
    for row in 0..rows {
        for w in inputs.floats(cols, if row % 5 == 4 { 0.0 } else { 1.0 }) {
            match stored {
                FloatType::F32 => data.extend(w.to_le_bytes()),
                // Nothing below the smallest normal f16: WGSL may flush it.
                FloatType::F16 if w.abs() < 1e-4 => data.extend([0; 2]),
                FloatType::F16 => data.extend(f16::from_f32(w).to_le_bytes()),
                FloatType::BF16 => data.extend(bf16::from_f32(w).to_le_bytes()),
            }
        }
    }
    target(MatrixSource::float("conformance", rows, cols, stored, data.into()))
}

/// A packed ternary matrix: bytes of four random trits, fields of missing rows hold 1.
pub(super) fn packed_matrix(
    inputs: &mut Inputs,
    rows: usize,
    cols: usize,
    scale: f32,
) -> MatrixSource {
    packed(rows, cols, scale, || inputs.below(3) as u8)
}

fn packed(rows: usize, cols: usize, scale: f32, mut code: impl FnMut() -> u8) -> MatrixSource {
    let quarter = rows.div_ceil(4);
    let mut data = vec![0; quarter * cols];
    for (i, byte) in data.iter_mut().enumerate() {
        for field in 0..4 {
            let exists = i / cols + field * quarter < rows;
            *byte |= if exists { code() } else { 1 } << (2 * field);
        }
    }
    MatrixSource::packed("conformance", rows, cols, data.into(), scale)
}

/// A ternary matrix from float master weights.
fn master_matrix(inputs: &mut Inputs, rows: usize, cols: usize) -> MatrixSource {
    let data: Vec<u8> =
        inputs.floats(rows * cols, 0.1).iter().flat_map(|w| w.to_le_bytes()).collect();
    MatrixSource::master("conformance", rows, cols, FloatType::F32, data.into())
}

/// What is multiplied with a matrix.
#[derive(Clone, Copy)]
enum Activations<'a> {
    F32(&'a [f32]),
    Int8(&'a [i8], &'a [f32]),
}

/// `x W^T` or, where `onto` is given, `onto + x W^T`.
fn product<B: Backend>(
    backend: &B,
    weight: &B::Linear,
    (rows, width, height): (usize, usize, usize),
    x: Activations<'_>,
    onto: Option<&[f32]>,
) -> Result<Vec<f32>> {
    // One more than the live rows: a kernel that trusts the capacity is found out.
    let mut input;
    match x {
        Activations::F32(values) => {
            input = backend.tensor(rows + 1, width, TensorFormat::F32)?;
            backend.write(&mut input, values)?;
        }
        Activations::Int8(values, scales) => {
            input = backend.tensor(rows + 1, width, TensorFormat::Int8)?;
            backend.write_int8(&mut input, values, scales)?;
        }
    }
    let mut out = backend.tensor(rows + 1, height, TensorFormat::F32)?;
    // What stands in the output before must not matter.
    let garbage = vec![1e30; rows * height];
    backend.write(&mut out, onto.unwrap_or(&garbage))?;
    let mut stream = step(backend, rows, 32)?;
    match onto {
        Some(_) => stream.linear_add(&input, weight, &mut out)?,
        None => stream.linear(&input, weight, &mut out)?,
    }
    stream.submit()?;
    stream.read(&out)
}

/// Rows of a table are copied exactly, whatever the format: an `i8` times an `f16` fits an `f32`.
/// `shape`: vocabulary, width, and tokens.
pub(super) fn embed_of<B: Backend>(
    backend: &B,
    inputs: &mut Inputs,
    format: FloatFormat,
    shape: (usize, usize, usize),
) -> Result<Check> {
    fn rows<B: Backend>(backend: &B, table: &MatrixSource, tokens: &[u32]) -> Result<Vec<f32>> {
        let weight = backend.linear(std::slice::from_ref(table))?;
        let mut out = backend.tensor(tokens.len() + 1, table.cols(), TensorFormat::F32)?;
        let mut stream = step(backend, tokens.len(), table.rows())?;
        stream.begin(&Step { input: Input::Tokens(tokens), position: 0, phase: Phase::Decode })?;
        stream.embed(&weight, &mut out)?;
        stream.submit()?;
        stream.read(&out)
    }
    let (vocabulary, hidden, count) = shape;
    let table = float_matrix(inputs, vocabulary, hidden, format);
    let mut tokens: Vec<u32> = (0..count).map(|_| inputs.below(vocabulary) as u32).collect();
    tokens[0] = vocabulary as u32 - 1;
    let got = rows(backend, &table, &tokens)?;
    let want = rows(&Reference::new(), &table, &tokens)?;
    let case = format!("{} [{vocabulary}, {hidden}], {count} tokens", format.0);
    Ok(compare("embed", case, &got, &want, |_| 0.0))
}

pub(super) fn embed<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(1);
    for format in FLOATS {
        for shape in [(1, 1, 1), (7, 31, 3), (33, 100, 17), (300, 260, 33)] {
            checks.push(embed_of(backend, &mut inputs, format, shape)?);
        }
    }
    Ok(checks)
}

pub(super) fn linear_float<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let shapes: [(&[usize], usize); 10] = [
        (&[1], 1),
        (&[5], 3),
        (&[7], 31),
        (&[16], 64),
        (&[33], 100),
        (&[40, 8, 8], 96),
        (&[3, 1, 2], 33),
        (&[130], 520),
        (&[34, 6], 544),
        (&[65, 65], 160),
    ];
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(2);
    for format in FLOATS {
        for (heights, width) in shapes {
            checks.extend(float_of(backend, &mut inputs, format, (heights, width), &ROWS)?);
        }
    }
    for format in FLOATS {
        checks.extend(largest_sums(backend, format)?);
        checks.extend(nothing_broken_is_mended(backend, format)?);
    }
    Ok(checks)
}

/// The largest sums there are, all of one sign: whoever adds integers of too few bits overflows here.
fn largest_sums<B: Backend>(backend: &B, format: FloatFormat) -> Result<Vec<Check>> {
    let (name, stored, target) = format;
    let (height, width) = (6, 1056);
    let one = match stored {
        FloatType::F32 => 1f32.to_le_bytes().to_vec(),
        FloatType::F16 => f16::ONE.to_le_bytes().to_vec(),
        FloatType::BF16 => bf16::ONE.to_le_bytes().to_vec(),
    };
    let ones = one.repeat(height * width).into();
    let stack = [target(MatrixSource::float("conformance", height, width, stored, ones))];
    let weight = backend.linear(&stack)?;
    let reference = Reference::new().linear(&stack)?;
    let mut checks = Vec::new();
    for rows in [1, 9] {
        let x = vec![-1.0; rows * width];
        let (shape, x) = ((rows, width, height), Activations::F32(&x));
        let got = product(backend, &weight, shape, x, None)?;
        let want = product(&Reference::new(), &reference, shape, x, None)?;
        let case = format!("{name} [{height}] x {width}, {rows} rows of -1");
        // Ones and their scale are met exactly by every level: sums are rounded, as in `float_of`.
        let tolerance = |i: usize| (width as f64 + 8.0) * U * f64::from(want[i]).abs();
        checks.push(compare("linear_float", case, &got, &want, tolerance));
    }
    Ok(checks)
}

/// One activation or one weight is not finite: neither may anything be that is made of it.
fn nothing_broken_is_mended<B: Backend>(backend: &B, format: FloatFormat) -> Result<Vec<Check>> {
    let (name, stored, target) = format;
    let (height, width) = (6, 544);
    let mut checks = Vec::new();
    let cases =
        [(f32::NAN, false), (f32::INFINITY, false), (f32::NAN, true), (f32::INFINITY, true)];
    for (broken, in_weights) in cases {
        let mut weights = vec![0.5; height * width];
        if in_weights {
            weights[2 * width + 520] = broken;
        }
        let data: Vec<u8> = match stored {
            FloatType::F32 => weights.iter().flat_map(|w| w.to_le_bytes()).collect(),
            FloatType::F16 => {
                weights.iter().flat_map(|&w| f16::from_f32(w).to_le_bytes()).collect()
            }
            FloatType::BF16 => {
                weights.iter().flat_map(|&w| bf16::from_f32(w).to_le_bytes()).collect()
            }
        };
        let matrix = MatrixSource::float("conformance", height, width, stored, data.into());
        let weight = backend.linear(&[target(matrix)])?;
        for rows in [1, 9] {
            let mut x = vec![0.25; rows * width];
            if !in_weights {
                x[(rows - 1) * width + 520] = broken;
            }
            let got = product(backend, &weight, (rows, width, height), Activations::F32(&x), None)?;
            let spoilt = |i: usize| match in_weights {
                true => i % height == 2,
                false => i / height == rows - 1,
            };
            let pass = got.iter().enumerate().all(|(i, y)| y.is_finite() != spoilt(i));
            let place = if in_weights { "a weight" } else { "an activation" };
            let case = format!("{name}, {broken} in {place}, {rows} rows");
            let error = if pass { 0.0 } else { 1.0 };
            checks.push(Check { operation: "linear_float", case, error, tolerance: 0.0, pass });
        }
    }
    Ok(checks)
}

/// A stack `(heights, width)` with steps of several `rows`, every second of which adds.
///
/// A dot product of `n` terms is within `(n + 4) u sum |x| |w|`: Q8 may scale each term or each
/// block, one or two roundings more, and the residual is one more. Where a backend
/// multiplies in [fixed point](Backend::fixed_point), see [`rounding`].
pub(super) fn float_of<B: Backend>(
    backend: &B,
    inputs: &mut Inputs,
    format: FloatFormat,
    (heights, width): (&[usize], usize),
    rows: &[usize],
) -> Result<Vec<Check>> {
    let stack: Vec<MatrixSource> =
        heights.iter().map(|&h| float_matrix(inputs, h, width, format)).collect();
    let weight = backend.linear(&stack)?;
    let reference = Reference::new().linear(&stack)?;
    let height = reference.rows();
    let weights: Vec<Vec<f32>> = (0..height).map(|row| reference.row(row)).collect();
    let levels = stack.iter().any(|part| part.format().has_block_scales());
    let fixed = levels && backend.fixed_point();
    let mut checks = Vec::new();
    for (i, &rows) in rows.iter().enumerate() {
        let x = inputs.rows(rows, width);
        let residual = inputs.floats(rows * height, 1.0);
        let onto = (i % 2 == 1).then_some(&residual[..]);
        let shape = (rows, width, height);
        let x_in = Activations::F32(&x);
        let got = product(backend, &weight, shape, x_in, onto)?;
        let want = product(&Reference::new(), &reference, shape, x_in, onto)?;
        let tolerance = |i: usize| {
            let x = &x[i / height * width..][..width];
            let products = x.iter().zip(&weights[i % height]);
            let sum: f64 = products.map(|(&x, &w)| f64::from(x * w).abs()).sum();
            let residual = onto.map_or(0.0, |onto| f64::from(onto[i]).abs());
            let rounding = match fixed {
                true => rounding(x, &weights[i % height], rows) + 4.0 * U * sum,
                false => 0.0,
            };
            (width as f64 + 4.0) * (U * sum + FLUSHED) + 2.0 * U * residual + rounding
        };
        let add = if onto.is_some() { ", added" } else { "" };
        let case = format!("{} {heights:?} x {width}, {rows} rows{add}", format.0);
        checks.push(compare("linear_float", case, &got, &want, tolerance));
    }
    Ok(checks)
}

/// What rounding activations, and from [`FIXED_TOKENS`] on weights, to fixed point can change in a product: half a step for each, and a fiftieth of it for the roundings of scales and
/// of their inverses; activations so small that the step is not a normal number become zero.
fn rounding(x: &[f32], weights: &[f32], tokens: usize) -> f64 {
    let round_weights = tokens >= FIXED_TOKENS;
    let largest = |v: &[f32]| v.iter().fold(0.0f64, |max, &v| max.max(f64::from(v).abs()));
    let sum = |v: &[f32]| v.iter().map(|&v| f64::from(v).abs()).sum::<f64>();
    let (step, weight_step) = (f64::from(ACTIVATION_STEP), f64::from(WEIGHT_STEP));
    let parts = x.chunks(FIXED_COLS).zip(weights.chunks(FIXED_COLS));
    let changes = parts.map(|(x, weights)| {
        let of_x = (0.51 * step * largest(x)).max(largest(x).min(FLUSHED / step));
        let of_weights = if round_weights { 0.51 * weight_step * largest(weights) } else { 0.0 };
        of_x * sum(weights) + of_weights * sum(x)
    });
    changes.sum()
}

pub(super) fn linear_ternary<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut inputs = Inputs::new(3);
    let mut stacks: Vec<(String, Vec<MatrixSource>)> = Vec::new();
    let unit: [(&[usize], usize); 8] = [
        (&[1], 1),
        (&[4], 3),
        (&[8], 31),
        (&[12], 64),
        (&[20], 100),
        (&[40, 8, 8], 96),
        (&[68], 260),
        (&[64, 64], 640),
    ];
    for (heights, width) in unit {
        let stack = heights.iter().map(|&h| packed_matrix(&mut inputs, h, width, 1.0)).collect();
        stacks.push((format!("packed {heights:?} x {width}"), stack));
    }
    stacks.push(scaled_stack(&mut inputs));
    let heights: [(&[usize], usize); 7] = [
        (&[1], 65),
        (&[2], 7),
        (&[3], 64),
        (&[7], 130),
        (&[66], 48),
        (&[5, 1, 3], 128),
        (&[11, 6, 35, 4], 81),
    ];
    for (heights, width) in heights {
        let stack = heights.iter().map(|&h| master_matrix(&mut inputs, h, width)).collect();
        stacks.push((format!("master {heights:?} x {width}"), stack));
    }
    // The largest sums: whoever adds in 16 bits overflows here.
    let ones = |code: u8| packed(9, 6912, 1.0, move || code);
    stacks.push(("all +1 [9] x 6912".into(), vec![ones(2)]));
    stacks.push(("all -1 [9] x 6912".into(), vec![ones(0)]));

    let mut checks = Vec::new();
    for stack in &stacks {
        checks.extend(ternary_of(backend, &mut inputs, stack, &ROWS)?);
    }
    Ok(checks)
}

/// Three ternary matrices of different scales, and what they are.
fn scaled_stack(inputs: &mut Inputs) -> (String, Vec<MatrixSource>) {
    let stack = [(64, 0.37), (16, 1.9e-3), (20, 2.3)];
    let stack = stack.map(|(h, scale)| packed_matrix(inputs, h, 192, scale)).to_vec();
    ("packed with scales [64, 16, 20] x 192".into(), stack)
}

/// A ternary stack with steps of several `rows`, every second of which adds.
///
/// Integer sums are exact, an `f32` holds them, and the two multiplications that follow are
/// rounded alike everywhere: bit-equal. Only where a sum with the residual follows, which a
/// compiler may fuse with the multiplication, is one rounding of each granted; with scales of 1
/// it is exact again.
pub(super) fn ternary_of<B: Backend>(
    backend: &B,
    inputs: &mut Inputs,
    (name, stack): &(String, Vec<MatrixSource>),
    rows: &[usize],
) -> Result<Vec<Check>> {
    let weight = backend.linear(stack)?;
    let reference = Reference::new().linear(stack)?;
    let (width, height) = (reference.cols(), reference.rows());
    let mut checks = Vec::new();
    for (i, &rows) in rows.iter().enumerate() {
        let unit_scales = stack.iter().all(|part| part.scale() == 1.0);
        let mut x: Vec<i8> =
            (0..rows * width).map(|_| (inputs.below(256) as i32 - 128) as i8).collect();
        // Row 0 is the largest activation throughout, row 1 the smallest, row 2 zero.
        for (row, value) in [127, -128, 0].into_iter().enumerate().take(rows) {
            x[row * width..][..width].fill(value);
        }
        let scales: Vec<f32> =
            (0..rows).map(|_| if unit_scales { 1.0 } else { inputs.unit().abs() + 1e-3 }).collect();
        let x_in = Activations::Int8(&x, &scales);
        let residual: Vec<f32> = (0..rows * height)
            .map(|_| if unit_scales { inputs.below(200) as f32 } else { inputs.unit() })
            .collect();
        let onto = (i % 2 == 1).then_some(&residual[..]);
        let shape = (rows, width, height);
        let got = product(backend, &weight, shape, x_in, onto)?;
        let want = product(&Reference::new(), &reference, shape, x_in, onto)?;
        let tolerance = |i: usize| match onto {
            Some(onto) if !unit_scales => {
                let (sum, residual) = (f64::from(want[i]), f64::from(onto[i]));
                2.0 * U * (sum.abs() + residual.abs())
            }
            _ => 0.0,
        };
        let add = if onto.is_some() { ", added" } else { "" };
        let case = format!("{name}, {rows} rows{add}");
        checks.push(compare("linear_ternary", case, &got, &want, tolerance));
    }
    Ok(checks)
}
