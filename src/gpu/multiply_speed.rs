//! How fast the device multiplies what is in registers: the ceiling of what memory does not bound.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::device::Device;
use super::recorder::Recorder;
use super::shader::{Abilities, Binding, Kernel, Program, dot, wgsl};
use crate::backend::{DeviceKind, MatrixFormat};
use crate::error::Result;

/// Invocations of a workgroup.
const INVOCATIONS: usize = 64;

/// Workgroups: enough for the widest GPU to fill itself several times.
const WORKGROUPS: usize = 8192;

/// The same of software renderers, which run them one after the other.
const SOFTWARE_WORKGROUPS: usize = 128;

/// Products of an invocation: 256 times 8 vectors of 4 lanes.
const PRODUCTS: usize = 256 * 8 * 4;

/// Timed submissions, of which the fastest counts.
const ROUNDS: usize = 5;

/// Time that a timed submission takes at least, so that submitting it does not count.
const LONG_ENOUGH: Duration = Duration::from_millis(20);

pub(super) fn program(bytes: bool, abilities: Abilities) -> Program {
    Program {
        constants: vec![("BYTES", bytes.into())],
        parts: vec![dot(abilities), wgsl!("multiply_speed.wgsl")],
        bindings: vec![(1, Binding::Read), (2, Binding::Write)],
        f16: false,
    }
}

/// Whether an invocation has left what it should.
fn is_right(bytes: bool, sum: u32) -> bool {
    // 32 lanes that have come to 2; rounding is the device's.
    if bytes { sum == sum_of_bytes() } else { (f32::from_bits(sum) - 64.0).abs() < 1e-3 }
}

/// The twin of the shader's `bytes`.
fn sum_of_bytes() -> u32 {
    let dot = |a: u32, b: u32| {
        let products = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
        products.map(|(a, b)| i32::from(a as i8) * i32::from(b as i8)).sum::<i32>() as u32
    };
    let mut sum = 0u32;
    for first in 0..8 {
        for (start, factor) in FACTORS[0].into_iter().zip(FACTORS[1]) {
            let mut a = start.wrapping_add(first);
            for _ in 0..256 {
                a = a.wrapping_add(dot(a, factor));
            }
            sum = sum.wrapping_add(a);
        }
    }
    sum
}

/// Bytes to start with, and to multiply by.
const FACTORS: [[u32; 4]; 2] =
    [[0x0102_0304, 0x1112_1314, 0x2122_2324, 0x3132_3334], [0x0101_ff01, 0x0201_0103, 1, 0x7f]];

/// Multiply-adds a second, of the kind that weights of a format are multiplied by.
pub(super) fn measure(device: &Arc<Device>, format: MatrixFormat) -> Result<f64> {
    let bytes = format == MatrixFormat::Ternary;
    let software = device.info.kind == DeviceKind::SoftwareGpu;
    let groups = if software { SOFTWARE_WORKGROUPS } else { WORKGROUPS };
    let factors = device.storage("factors", size_of_val(&FACTORS) as u64)?;
    let floats = [[0.5f32; 4], [1.0; 4]];
    let given: &[u8] =
        if bytes { bytemuck::cast_slice(&FACTORS) } else { bytemuck::cast_slice(&floats) };
    device.write(&factors, 0, given)?;
    let size = (groups * INVOCATIONS * 4) as u64;
    let sums = device.storage("sums", size)?;
    let mut recorder = Recorder::new(Arc::clone(device))?;
    let mut multiply = |passes: u32| -> Result<Duration> {
        let start = Instant::now();
        for _ in 0..passes {
            let kernel = Kernel::MultiplySpeed { bytes };
            recorder.dispatch(kernel, &0u32, &[&factors, &sums], [groups, 1, 1])?;
        }
        recorder.submit()?;
        device.wait(None)?;
        Ok(start.elapsed())
    };
    // The first may have to compile it.
    multiply(1)?;
    let once = multiply(1)?;
    let passes = LONG_ENOUGH.div_duration_f64(once.max(Duration::from_nanos(1))).ceil();
    let passes = passes.clamp(1.0, 256.0) as u32;
    let mut best = once;
    for _ in 0..ROUNDS {
        best = best.min(multiply(passes)? / passes);
    }
    let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
    let readback = device.buffer("reading sums", size, usage)?;
    recorder.copy((&sums, 0), (&readback, 0), size);
    let found: Vec<u32> = bytemuck::pod_collect_to_vec(&recorder.read(&readback, size)?);
    // All are alike.
    let wrong = found.iter().any(|&sum| sum != found[0]);
    if wrong || !is_right(bytes, found[0]) {
        let message = "what the device multiplied for its speed is not right";
        return Err(device.fault("measuring", message));
    }
    let lanes = if bytes { 4 } else { 1 };
    let products = groups * INVOCATIONS * PRODUCTS * lanes;
    Ok(products as f64 / best.as_secs_f64().max(1e-9))
}
