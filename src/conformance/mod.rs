//! The one table of operations: each is run on awkward inputs and compared with
//! [`crate::reference`].
//!
//! The tests walk this table for every backend: an operation that is not in the table does not exist.
//! A device is asked some of it before it is trusted with a model, see [`known`].
//!
//! # Tolerances
//! None is tuned. Each is a bound of the rounding error of any reasonable order of evaluation, in
//! terms of the unit roundoff `u = 2^-24`: a sum of `n` products is within
//! `(n + c) u sum |a| |b|` of the exact one (Higham, *Accuracy and Stability of Numerical
//! Algorithms*, 3.1). The small constants leave room for what WGSL allows a GPU: 2.5 ULP for a
//! division, 2 ULP for an inverse square root, `3 + 2 |x|` ULP for `exp(x)`, and results below
//! the smallest normal number flushed to zero. One ULP is at most `2 u` of the value.

mod attention;
mod caches;
mod compressed;
pub mod known;
mod linear;
mod rows;
mod sample;

use half::f16;

use crate::backend::{AttentionShape, Backend, Input, Operations, Step, StreamShape};
use crate::delta::Phase;
use crate::error::Result;
use crate::sampler::Draws;

/// Unit roundoff of `f32`.
const U: f64 = 1.0 / (1 << 24) as f64;

/// What flushing results below the smallest normal number can cost.
const FLUSHED: f64 = f32::MIN_POSITIVE as f64;

/// How one case of one operation went.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    /// The operation's name, that of its shader and of its file in the CPU backend.
    pub operation: &'static str,
    /// The input, in words.
    pub case: String,
    /// The error of the element that comes nearest to its tolerance or exceeds it most.
    pub error: f64,
    /// The tolerance of that element.
    pub tolerance: f64,
    /// Whether all elements are within their tolerance.
    pub pass: bool,
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { operation, case, error, tolerance, pass } = self;
        let verdict = if *pass { "ok" } else { "FAILED" };
        write!(f, "{operation}: {case}: {verdict}: error {error:.3e}, tolerance {tolerance:.3e}")
    }
}

/// One operation's row of the table.
pub struct Operation<B> {
    /// The operation's name.
    pub name: &'static str,
    /// Runs all its cases on a backend and on the reference.
    pub run: fn(&B) -> Result<Vec<Check>>,
}

/// All operations.
pub fn table<B: Backend>() -> [Operation<B>; 9] {
    [
        Operation { name: "embed", run: linear::embed },
        Operation { name: "norm", run: rows::norm },
        Operation { name: "linear_ternary", run: linear::linear_ternary },
        Operation { name: "linear_float", run: linear::linear_float },
        Operation { name: "rope_append", run: attention::rope_append },
        Operation { name: "encode_keys", run: compressed::encode_keys },
        Operation { name: "attention", run: attention::attention },
        Operation { name: "gate", run: rows::gate },
        Operation { name: "sample", run: sample::sample },
    ]
}

/// Runs the whole table.
///
/// # Errors
/// Where the backend itself fails; wrong results are [`Check`]s that do not pass.
pub fn run<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    for operation in table::<B>() {
        checks.extend((operation.run)(backend)?);
    }
    Ok(checks)
}

/// Compares `got` with `want`; `tolerance` gives the bound of each element's absolute error.
fn compare(
    operation: &'static str,
    case: String,
    got: &[f32],
    want: &[f32],
    tolerance: impl Fn(usize) -> f64,
) -> Check {
    let error = |i: usize| (f64::from(got[i]) - f64::from(want[i])).abs();
    measure(operation, case, got.len(), want.len(), |i| (error(i), tolerance(i)))
}

/// Reports the worst of `found` elements, each given as (error, tolerance).
fn measure(
    operation: &'static str,
    case: String,
    found: usize,
    expected: usize,
    element: impl Fn(usize) -> (f64, f64),
) -> Check {
    if found != expected {
        let (error, tolerance) = (f64::INFINITY, 0.0);
        let case = format!("{case}: {found} elements instead of {expected}");
        return Check { operation, case, error, tolerance, pass: false };
    }
    let mut check = Check { operation, case, error: 0.0, tolerance: 0.0, pass: true };
    let mut worst = -1.0;
    for i in 0..found {
        let (error, tolerance) = element(i);
        // Written so that NaN fails.
        let pass = error <= tolerance;
        let share = match (pass, error == 0.0) {
            (true, true) => 0.0,
            (true, false) => error / tolerance,
            (false, _) if error.is_nan() => f64::INFINITY,
            (false, _) => error / tolerance.max(f64::MIN_POSITIVE),
        };
        check.pass &= pass;
        if share > worst {
            (worst, check.error, check.tolerance) = (share, error, tolerance);
        }
    }
    check
}

/// A stream whose attention does not matter, at the start of a step of `rows` tokens.
fn step<B: Backend>(backend: &B, rows: usize, vocabulary: usize) -> Result<B::Stream> {
    let attention = AttentionShape { heads: 2, kv_heads: 1, head_dim: 32 };
    let shape = StreamShape { rows: rows.max(1), context: rows.max(1), attention, vocabulary };
    let mut stream = backend.stream(&shape)?;
    let tokens = vec![0; rows];
    stream.begin(&Step { input: Input::Tokens(&tokens), position: 0, phase: Phase::Decode })?;
    Ok(stream)
}

/// Deterministic inputs.
struct Inputs(Draws);

impl Inputs {
    fn new(seed: u64) -> Self {
        Self(Draws::new(seed))
    }

    /// Uniform in [-1, 1).
    fn unit(&mut self) -> f32 {
        2.0 * self.0.draw() - 1.0
    }

    /// An integer in `0..end`.
    fn below(&mut self, end: usize) -> usize {
        ((f64::from(self.0.draw()) * end as f64) as usize).min(end - 1)
    }

    /// Uniform in [-1, 1) times `scale`.
    fn floats(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.unit() * scale).collect()
    }

    /// The same, rounded to what an F16 cache can hold.
    fn halves(&mut self, len: usize, scale: f32) -> Vec<f32> {
        self.floats(len, scale).into_iter().map(|x| f16::from_f32(x).to_f32()).collect()
    }

    /// Rows `[rows, width]` of all magnitudes: ordinary, huge, tiny, all zero, and ordinary with
    /// one outlier.
    fn rows(&mut self, rows: usize, width: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(rows * width);
        for row in 0..rows {
            let scale = [1.0, 1e12, 1e-12, 0.0, 1.0][row % 5];
            out.extend(self.floats(width, scale));
            if row % 5 == 4 {
                out[row * width + width / 2] = -1e4;
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::Reference;

    #[test]
    fn the_reference_conforms_to_itself() {
        for check in run(&Reference::new()).expect("the reference does not fail") {
            assert!(check.pass, "{check}");
        }
    }

    #[test]
    fn nan_and_wrong_lengths_do_not_pass() {
        let check = |got: &[f32]| compare("x", String::new(), got, &[1.0], |_| 1.0);
        assert!(check(&[1.5]).pass);
        assert!(!check(&[2.5]).pass);
        assert!(!check(&[f32::NAN]).pass);
        assert!(!check(&[]).pass);
    }
}
