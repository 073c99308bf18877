//! Cases of `rope_append` and `attention`.
//!
//! Nothing reads a cache but attention, so both run together. `rope_append` is judged by the
//! rotated queries and, with an F32 cache, by what attention sees of the keys. `attention` is
//! judged on rotations by quarter turns, which are exact, and on keys and values that an F16
//! cache holds exactly: what differs then is attention alone.

use super::{Check, FLUSHED, Inputs, U, compare};
use crate::backend::{
    AttentionShape, Backend, CacheFormat, CacheShape, Operations, Step, StreamShape, TensorFormat,
};
use crate::delta::{AttentionPolicy, Phase};
use crate::error::Result;
use crate::reference::Reference;

/// A few steps over one cache.
struct Case {
    name: String,
    shape: AttentionShape,
    format: CacheFormat,
    /// `[positions, D / 2]`.
    table: Vec<[f32; 2]>,
    /// `[tokens, (H + 2 G) D]`.
    qkv: Vec<f32>,
    /// Tokens of each step, and whether its attention is computed.
    steps: Vec<(usize, bool)>,
}

/// What a case gives, a row for each token of the steps that compute attention.
#[derive(Default)]
struct Output {
    /// `[rows, H D]`, rotated.
    queries: Vec<f32>,
    /// `[rows, H D]`.
    attention: Vec<f32>,
}

impl Case {
    fn tokens(&self) -> usize {
        self.steps.iter().map(|step| step.0).sum()
    }

    fn run<B: Backend>(&self, backend: &B) -> Result<Output> {
        let width = self.shape.width();
        let rows = self.steps.iter().map(|step| step.0).max().unwrap_or(1);
        // One more than is used: a kernel that reads to the end of the cache is found out.
        let context = self.tokens() + 1;
        let stream_shape = StreamShape { rows, context, attention: self.shape, vocabulary: 32 };
        let mut stream = backend.stream(&stream_shape)?;
        let rope = backend.rope(&self.table, self.shape.head_dim)?;
        let policy = AttentionPolicy::plain(self.format);
        let mut cache =
            backend.cache(&CacheShape { attention: self.shape, context, rows, policy })?;
        let mut qkv = backend.tensor(rows, self.shape.qkv_width(), TensorFormat::F32)?;
        let mut out = backend.tensor(rows, width, TensorFormat::F32)?;
        let mut output = Output::default();
        let mut position = 0;
        let mut rest = &self.qkv[..];
        for &(rows, attend) in &self.steps {
            let (chunk, tail) = rest.split_at(rows * self.shape.qkv_width());
            rest = tail;
            backend.write(&mut qkv, chunk)?;
            let tokens = vec![0; rows];
            stream.begin(&Step { tokens: &tokens, position, phase: Phase::Decode })?;
            stream.rope_append(&mut qkv, &rope, &mut cache)?;
            if attend {
                stream.attention(&qkv, &cache, &mut out)?;
            }
            stream.submit()?;
            position += rows;
            if attend {
                let rotated = stream.read(&qkv)?;
                for row in rotated.chunks_exact(self.shape.qkv_width()) {
                    output.queries.extend(&row[..width]);
                }
                output.attention.extend(stream.read(&out)?);
            }
        }
        Ok(output)
    }

    /// Element-wise bound of the error of `attention`.
    ///
    /// A score is a dot product of `D` terms, so that its error is at most
    /// `(D + 4) u |q| |k| / sqrt(D)` (Cauchy-Schwarz), to which comes `key_error`, that of the
    /// rotation and the rounding of the keys, relative to `|q| |k|`. A weight has twice the error
    /// of the scores (its own and the maximum's) and that of `exp`, at most
    /// `3 + 2 |x|` ULP of which `w |x| <= 1 / e` times `w`'s share matters; sums over up to `L`
    /// positions add `L u` twice, above and below the fraction bar, and rescaling by blocks as
    /// much again. All of it is relative to `sum w |v|`.
    fn bound(&self, key_error: f64) -> Result<Vec<f64>> {
        let AttentionShape { heads, kv_heads, head_dim } = self.shape;
        let longest = |from: usize, count: usize| {
            let rows = self.qkv.chunks_exact(self.shape.qkv_width());
            let heads = rows.flat_map(|row| row[from..].chunks_exact(head_dim).take(count));
            heads.map(norm).fold(0.0, f64::max)
        };
        let product = longest(0, heads) * longest(heads * head_dim, kv_heads);
        let scale = (head_dim as f64).sqrt();
        let score = ((head_dim as f64 + 4.0) * U + key_error) * product / scale;
        let span = (2.0 * product / scale).min(88.0);
        let length = self.tokens() as f64;
        let relative = 2.0 * score + 2.0 * U * (2.0 * (3.0 + 2.0 * span) + 4.0) + 4.0 * length * U;

        // The same softmax over |v|.
        let mut absolute = self.qkv.clone();
        for row in absolute.chunks_exact_mut(self.shape.qkv_width()) {
            for v in &mut row[(heads + kv_heads) * head_dim..] {
                *v = v.abs();
            }
        }
        let absolute = Self {
            qkv: absolute,
            table: self.table.clone(),
            steps: self.steps.clone(),
            name: String::new(),
            ..*self
        };
        let sums = absolute.run(&Reference::new())?.attention;
        Ok(sums.iter().map(|&sum| relative.min(2.0) * f64::from(sum) + length * FLUSHED).collect())
    }
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim }
}

/// A table of real angles, as a model has them.
fn angles(positions: usize, head_dim: usize) -> Vec<[f32; 2]> {
    let pairs = head_dim / 2;
    let entry = |i: usize| {
        let (position, pair) = ((i / pairs) as f64, (i % pairs) as f64);
        let angle = position * 10_000f64.powf(-pair / pairs as f64);
        [angle.cos() as f32, angle.sin() as f32]
    };
    (0..positions * pairs).map(entry).collect()
}

/// A table of quarter turns.
fn quarter_turns(positions: usize, head_dim: usize) -> Vec<[f32; 2]> {
    let turn = |i: usize| [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]][(i * 7 + i / 5) % 4];
    (0..positions * head_dim / 2).map(turn).collect()
}

pub(super) fn rope_append<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(6);
    let cases = [
        (shape(1, 1, 2), vec![(3, true)]),
        (shape(2, 1, 32), vec![(5, true), (1, true), (2, true)]),
        (shape(4, 2, 64), vec![(1, true), (17, true)]),
        (shape(4, 1, 80), vec![(33, true), (1, true)]),
        (shape(5, 1, 96), vec![(2, true), (3, true)]),
        (shape(10, 2, 128), vec![(7, true), (1, true)]),
        (shape(2, 2, 256), vec![(4, true), (1, true)]),
        // Far into a context.
        (shape(2, 1, 64), vec![(64, false), (64, false), (64, false), (3, true), (1, true)]),
    ];
    for (shape, steps) in cases {
        for format in [CacheFormat::F32, CacheFormat::F16] {
            let tokens: usize = steps.iter().map(|step| step.0).sum();
            let case = Case {
                name: format!("{shape:?}, {tokens} tokens, {format:?}"),
                shape,
                format,
                table: angles(tokens + 1, shape.head_dim),
                qkv: inputs.floats(tokens * shape.qkv_width(), 2.0),
                steps: steps.clone(),
            };
            let (got, want) = (case.run(backend)?, case.run(&Reference::new())?);
            // Two products and their sum: each element is within 3 u of |x cos| + |y sin|, which
            // is at most |x| + |y|, of inputs below 2.
            let name = format!("{}, queries", case.name);
            let tolerance = |_| 3.0 * U * 4.0;
            checks.push(compare("rope_append", name, &got.queries, &want.queries, tolerance));
            // Keys have that error, too. In F16 each of them may round the other way, though few
            // will: one unit in the last place, 2^-10.
            let rounding = match format {
                CacheFormat::F32 => 0.0,
                CacheFormat::F16 => 1.0 / 1024.0,
            };
            let bound = case.bound(2.0 * 6.0 * U + rounding)?;
            let name = format!("{}, keys", case.name);
            let (got, want) = (&got.attention, &want.attention);
            checks.push(compare("rope_append", name, got, want, |i| bound[i]));
        }
    }
    Ok(checks)
}

pub(super) fn attention<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(7);
    let fill = |chunks: usize, last: &[(usize, bool)]| {
        let mut steps = vec![(64, false); chunks];
        steps.extend(last);
        steps
    };
    let cases = [
        (shape(1, 1, 2), vec![(1, true), (3, true)]),
        (shape(2, 2, 32), vec![(17, true), (1, true), (2, true)]),
        (shape(4, 2, 64), vec![(33, true), (1, true)]),
        (shape(4, 1, 80), vec![(5, true), (18, true)]),
        (shape(5, 1, 96), vec![(3, true), (1, true)]),
        (shape(10, 2, 128), vec![(16, true), (15, true), (1, true)]),
        (shape(2, 1, 256), vec![(9, true), (1, true)]),
        // Long enough that a decode step is split over the sequence; a chunk that starts far in.
        (shape(4, 1, 64), fill(11, &[(1, true), (1, true)])),
        (shape(8, 2, 32), fill(8, &[(17, true), (1, true)])),
        (shape(5, 1, 128), fill(5, &[(3, true)])),
    ];
    for (shape, steps) in cases {
        for format in [CacheFormat::F32, CacheFormat::F16] {
            // Ordinary scores; scores of thousands, where a softmax that does not subtract its
            // maximum overflows; and queries of zero, which attend to all positions alike.
            for (kind, scale) in [("ordinary", 1.0), ("extreme", 3000.0), ("zero", 0.0)] {
                let tokens: usize = steps.iter().map(|step| step.0).sum();
                let mut qkv = inputs.halves(tokens * shape.qkv_width(), 1.0);
                for row in qkv.chunks_exact_mut(shape.qkv_width()) {
                    row[..shape.width()].iter_mut().for_each(|q| *q *= scale);
                }
                let case = Case {
                    name: format!("{shape:?}, {tokens} tokens, {format:?}, {kind}"),
                    shape,
                    format,
                    table: quarter_turns(tokens + 1, shape.head_dim),
                    qkv,
                    steps: steps.clone(),
                };
                let (got, want) = (case.run(backend)?, case.run(&Reference::new())?);
                let name = format!("{}, queries", case.name);
                checks.push(compare("rope_append", name, &got.queries, &want.queries, |_| 0.0));
                let (got, want) = (&got.attention, &want.attention);
                let bound = case.bound(0.0)?;
                checks.push(compare("attention", case.name, got, want, |i| bound[i]));
            }
        }
    }
    checks.extend(weights_sum_to_one(backend)?);
    checks.extend(chunks_do_not_matter(backend)?);
    Ok(checks)
}

/// Attention over values of 1 is 1.
fn weights_sum_to_one<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let shape = shape(4, 2, 64);
    let steps = vec![(64, false), (64, false), (5, true), (1, true)];
    let tokens = 134;
    let mut qkv = Inputs::new(8).floats(tokens * shape.qkv_width(), 2.0);
    for row in qkv.chunks_exact_mut(shape.qkv_width()) {
        row[(shape.heads + shape.kv_heads) * shape.head_dim..].fill(1.0);
    }
    let table = angles(tokens + 1, shape.head_dim);
    let (name, format) = (String::new(), CacheFormat::F16);
    let got = Case { name, shape, format, table, qkv, steps }.run(backend)?.attention;
    let want = vec![1.0; 6 * shape.width()];
    let tolerance = |_| 4.0 * tokens as f64 * U;
    Ok(vec![compare("attention", "weights sum to one".into(), &got, &want, tolerance)])
}

/// A prompt at once, in chunks, and token by token is the same.
fn chunks_do_not_matter<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let shape = shape(4, 2, 64);
    let tokens = 37;
    let qkv = Inputs::new(9).halves(tokens * shape.qkv_width(), 1.0);
    let case = |steps| {
        let (name, format, qkv) = (String::new(), CacheFormat::F16, qkv.clone());
        Case { name, shape, format, table: quarter_turns(tokens + 1, shape.head_dim), qkv, steps }
    };
    let whole = case(vec![(tokens, true)]);
    let want = whole.run(backend)?.attention;
    let bound = whole.bound(0.0)?;
    let mut checks = Vec::new();
    for (name, steps) in [
        ("token by token is as at once", vec![(1, true); tokens]),
        ("in chunks is as at once", vec![(16, true), (20, true), (1, true)]),
    ] {
        let got = case(steps).run(backend)?.attention;
        checks.push(compare("attention", name.into(), &got, &want, |i| 2.0 * bound[i]));
    }
    Ok(checks)
}
