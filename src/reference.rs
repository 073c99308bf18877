//! The yardstick: every operation in plain scalar Rust, written to be read beside the papers.
//!
//! [`Reference`] shares no code with the fast backends but for the encoding of pages and values in
//! [`crate::delta`], which must be the same to the bit and is held against [`crate::delta::plain`].
//! Sums of floats run in `f64`, so that the distance of a backend from the reference is, to a very
//! good approximation, that backend's own rounding error; [`crate::conformance`] compares the two.
//! Sums of integers are exact `i32`.
//!
//! Shapes are written `[rows, columns]`, row-major, with `T` the tokens of the step, `H` query
//! heads, `G` KV heads, `D` elements of a head, and `I` the width of the feed-forward layer.
//!
//! # Panics
//! Operations panic where shapes or formats break the contract of [`crate::backend`].

mod cache;

use std::ops::Range;
use std::time::Instant;

use half::f16;

use crate::backend::{
    Activation, AttentionShape, Backend, CacheShape, DeviceInfo, DeviceKind, Footprint,
    MatrixFormat, Operations, Q8_BLOCK, ReadSpeed, Step, StreamShape, TensorFormat, read_pattern,
};
use crate::checkpoint::{Bytes, FloatType, MatrixSource};
use crate::delta::{
    AttentionPolicy, CacheImage, ExactRule, Page, PageLayout, Phase, encode_page, encode_value,
};
use crate::error::Result;
use crate::sampled::SampledTokens;
use crate::sampler::SampleStep;
pub use cache::Cache;

/// The reference backend.
#[derive(Clone, Debug)]
pub struct Reference {
    info: DeviceInfo,
}

impl Reference {
    /// A reference backend; it has no state.
    pub fn new() -> Self {
        let info = DeviceInfo {
            name: "reference".into(),
            kind: DeviceKind::Cpu,
            backend: "reference".into(),
            driver: "scalar, 1 thread".into(),
            features: Vec::new(),
        };
        Self { info }
    }
}

impl Default for Reference {
    fn default() -> Self {
        Self::new()
    }
}

/// Weight matrices stacked over their outputs, in the formats of [`MatrixSource`].
#[derive(Debug)]
pub struct Linear {
    parts: Vec<Matrix>,
}

/// One encoded matrix `[rows, cols]`.
#[derive(Debug)]
struct Matrix {
    rows: usize,
    cols: usize,
    format: MatrixFormat,
    /// `[storage_rows, row_bytes]`.
    values: Bytes,
    /// Q8 and Q4 only: `[rows, ceil(cols / 32)]`.
    block_scales: Vec<f16>,
    /// Ternary: what the product is multiplied by; else 1.
    scale: f32,
}

impl Matrix {
    fn new(source: &MatrixSource) -> Self {
        let mut block_scales = Vec::new();
        let values = source.borrow().unwrap_or_else(|| {
            let mut values = Vec::new();
            let (stride, scale_stride) = (source.row_bytes(), source.row_scales());
            let all = 0..source.storage_rows();
            source.encode(all, stride, scale_stride, &mut values, &mut block_scales);
            values.into()
        });
        let (rows, cols) = (source.rows(), source.cols());
        Self { rows, cols, format: source.format(), values, block_scales, scale: source.scale() }
    }

    /// Weights of output `row`, `[cols]`; trits for a ternary matrix, whose scale is left out.
    fn row(&self, row: usize) -> Vec<f32> {
        let cols = self.cols;
        let floats = |stored: FloatType| {
            let row_bytes = cols * stored.bytes();
            let mut out = vec![0.0; cols];
            stored.decode(&self.values[row * row_bytes..][..row_bytes], &mut out);
            out
        };
        match self.format {
            MatrixFormat::F32 => floats(FloatType::F32),
            MatrixFormat::F16 => floats(FloatType::F16),
            MatrixFormat::BF16 => floats(FloatType::BF16),
            MatrixFormat::Q8 => {
                let scales = &self.block_scales[row * cols.div_ceil(Q8_BLOCK)..];
                let levels = &self.values[row * cols..][..cols];
                let level =
                    |(c, &b): (usize, &u8)| f32::from(b as i8) * scales[c / Q8_BLOCK].to_f32();
                levels.iter().enumerate().map(level).collect()
            }
            MatrixFormat::Q4 => {
                let scales = &self.block_scales[row * (cols / Q8_BLOCK)..];
                let bytes = &self.values[row * (cols / 2)..];
                let level = |c: usize| f32::from(bytes[c / 2] >> (4 * (c % 2)) & 15) - 8.0;
                (0..cols).map(|c| level(c) * scales[c / Q8_BLOCK].to_f32()).collect()
            }
            MatrixFormat::Ternary => {
                let quarter = self.rows.div_ceil(4);
                let (field, packed_row) = (row / quarter, row % quarter);
                let packed = &self.values[packed_row * cols..][..cols];
                packed.iter().map(|b| f32::from(b >> (2 * field) & 3) - 1.0).collect()
            }
        }
    }
}

impl Linear {
    /// Output width: the sum over the stack.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.rows).sum()
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.parts[0].cols
    }

    /// Effective weights of output `row` of the stack, `[cols]`, with the matrix's scale.
    ///
    /// For a ternary matrix they are trit times scale.
    pub fn row(&self, mut row: usize) -> Vec<f32> {
        for part in &self.parts {
            if row < part.rows {
                return part.row(row).into_iter().map(|w| w * part.scale).collect();
            }
            row -= part.rows;
        }
        panic!("row outside the stack");
    }
}

impl Footprint for Linear {
    fn bytes(&self) -> u64 {
        self.parts.iter().map(|p| (p.values.len() + p.block_scales.len() * 2) as u64).sum()
    }
}

/// An RMSNorm: its weight `[width]` and epsilon.
#[derive(Debug)]
pub struct Norm {
    weight: Vec<f32>,
    eps: f32,
}

impl Footprint for Norm {
    fn bytes(&self) -> u64 {
        self.weight.len() as u64 * 4
    }
}

/// Cosine and sine, `[positions, D / 2]`.
#[derive(Debug)]
pub struct Rope {
    table: Vec<[f32; 2]>,
}

impl Footprint for Rope {
    fn bytes(&self) -> u64 {
        self.table.len() as u64 * 8
    }
}

/// Activations of up to `capacity` tokens, `[rows, width]`.
#[derive(Debug)]
pub struct Tensor {
    rows: usize,
    width: usize,
    capacity: usize,
    elements: Elements,
}

#[derive(Debug)]
enum Elements {
    F32(Vec<f32>),
    /// Elements and one scale a row.
    Int8(Vec<i8>, Vec<f32>),
}

impl Tensor {
    /// Row `t` of an F32 tensor, `[width]`.
    fn row(&self, t: usize) -> &[f32] {
        &self.floats()[t * self.width..][..self.width]
    }

    /// The live rows of an F32 tensor, `[rows, width]`.
    fn floats(&self) -> &[f32] {
        match &self.elements {
            Elements::F32(values) => &values[..self.rows * self.width],
            Elements::Int8(..) => panic!("an F32 tensor is needed"),
        }
    }

    /// Sets the number of live rows.
    fn set_rows(&mut self, rows: usize) {
        assert!(rows <= self.capacity, "{rows} rows in a tensor of {}", self.capacity);
        self.rows = rows;
    }

    /// Writes row `t` from `y` `[width]`, quantised where the tensor is Int8.
    fn set_row(&mut self, t: usize, y: &[f32]) {
        assert_eq!(y.len(), self.width, "row width");
        match &mut self.elements {
            Elements::F32(values) => values[t * self.width..][..self.width].copy_from_slice(y),
            Elements::Int8(values, scales) => {
                let out = &mut values[t * self.width..][..self.width];
                scales[t] = quantize(y, out);
            }
        }
    }
}

impl Footprint for Tensor {
    fn bytes(&self) -> u64 {
        match &self.elements {
            Elements::F32(values) => values.len() as u64 * 4,
            Elements::Int8(values, scales) => values.len() as u64 + scales.len() as u64 * 4,
        }
    }
}

/// BitNet's activation quantisation of one row; returns the scale. See [`TensorFormat::Int8`].
fn quantize(x: &[f32], out: &mut [i8]) -> f32 {
    let max = x.iter().fold(1e-5f32, |m, v| m.max(v.abs()));
    let inverse = 127.0 / max;
    for (o, v) in out.iter_mut().zip(x) {
        *o = (v * inverse).round_ties_even().clamp(-128.0, 127.0) as i8;
    }
    max / 127.0
}

/// A stream of reference operations; each is done when its call returns.
#[derive(Debug)]
pub struct Stream {
    attention: AttentionShape,
    tokens: Vec<u32>,
    position: usize,
    phase: Phase,
    sampled: SampledTokens,
}

impl Footprint for Stream {
    fn bytes(&self) -> u64 {
        4 * self.tokens.len() as u64
    }
}

impl Backend for Reference {
    type Linear = Linear;
    type Norm = Norm;
    type Rope = Rope;
    type Tensor = Tensor;
    type Cache = Cache;
    type Stream = Stream;

    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn linear(&self, stack: &[MatrixSource]) -> Result<Linear> {
        assert!(stack.windows(2).all(|w| w[0].cols() == w[1].cols()), "input widths differ");
        Ok(Linear { parts: stack.iter().map(Matrix::new).collect() })
    }

    fn norm(&self, weight: &[f32], eps: f32) -> Result<Norm> {
        Ok(Norm { weight: weight.to_vec(), eps })
    }

    fn rope(&self, table: &[[f32; 2]], _head_dim: usize) -> Result<Rope> {
        Ok(Rope { table: table.to_vec() })
    }

    fn tensor(&self, rows: usize, width: usize, format: TensorFormat) -> Result<Tensor> {
        let elements = match format {
            TensorFormat::F32 => Elements::F32(vec![0.0; rows * width]),
            TensorFormat::Int8 => Elements::Int8(vec![0; rows * width], vec![0.0; rows]),
        };
        Ok(Tensor { rows: 0, width, capacity: rows, elements })
    }

    fn cache(&self, shape: &CacheShape) -> Result<Cache> {
        let CacheShape { attention: shape, context, policy, ref thresholds, .. } = *shape;
        let rows = context * shape.kv_heads;
        Ok(Cache {
            shape,
            policy,
            layout: PageLayout::new(&policy, shape.head_dim)?,
            thresholds: thresholds.clone(),
            length: 0,
            keys: vec![0.0; rows * shape.head_dim],
            pages: vec![Vec::new(); shape.kv_heads],
            reconstruction: vec![Vec::new(); shape.kv_heads],
            values: vec![0.0; rows * shape.head_dim],
            value_rows: vec![0; rows * policy.value_row_bytes(shape.head_dim)],
        })
    }

    fn stream(&self, shape: &StreamShape) -> Result<Stream> {
        let attention = shape.attention;
        let (tokens, position, phase) = (Vec::new(), 0, Phase::Decode);
        Ok(Stream { attention, tokens, position, phase, sampled: SampledTokens::default() })
    }

    fn write(&self, tensor: &mut Tensor, values: &[f32]) -> Result<()> {
        tensor.set_rows(values.len() / tensor.width);
        for (t, row) in values.chunks_exact(tensor.width).enumerate() {
            tensor.set_row(t, row);
        }
        Ok(())
    }

    fn write_int8(&self, tensor: &mut Tensor, values: &[i8], scales: &[f32]) -> Result<()> {
        tensor.set_rows(scales.len());
        match &mut tensor.elements {
            Elements::Int8(elements, row_scales) => {
                elements[..values.len()].copy_from_slice(values);
                row_scales[..scales.len()].copy_from_slice(scales);
            }
            Elements::F32(_) => panic!("an Int8 tensor is needed"),
        }
        Ok(())
    }

    fn max_top_k(&self) -> usize {
        usize::MAX
    }

    fn look_ahead(&self) -> usize {
        0
    }

    fn read_speed(&self, bytes: u64) -> Result<ReadSpeed> {
        let words: Vec<u32> = (0..bytes as u32 / 4).map(read_pattern).collect();
        let start = Instant::now();
        let sum = words.iter().fold(0, |sum: u32, word| sum.wrapping_add(*word));
        let bytes = 4 * words.len() as u64;
        let seconds = start.elapsed().as_secs_f64().max(1e-9);
        Ok(ReadSpeed { bytes_per_second: bytes as f64 / seconds, bytes, sum })
    }

    fn multiply_speed(&self, _format: MatrixFormat) -> Result<f64> {
        let (count, start) = (1 << 20, Instant::now());
        let (half, one) = std::hint::black_box((0.5f64, 1.0f64));
        std::hint::black_box((0..count).fold(one, |sum, _| sum * half + one));
        Ok(f64::from(count) / start.elapsed().as_secs_f64().max(1e-9))
    }
}

impl Operations<Reference> for Stream {
    fn begin(&mut self, step: &Step<'_>) -> Result<()> {
        self.sampled.begin(step.input, &mut self.tokens)?;
        self.position = step.position;
        self.phase = step.phase;
        Ok(())
    }

    fn embed(&mut self, table: &Linear, out: &mut Tensor) -> Result<()> {
        out.set_rows(self.tokens.len());
        for (t, &token) in self.tokens.iter().enumerate() {
            out.set_row(t, &table.row(token as usize));
        }
        Ok(())
    }

    fn norm(
        &mut self,
        x: &Tensor,
        rows: Range<usize>,
        norm: &Norm,
        out: &mut Tensor,
    ) -> Result<()> {
        out.set_rows(rows.len());
        for (t, row) in rows.enumerate() {
            out.set_row(t, &rms_norm(x.row(row), norm));
        }
        Ok(())
    }

    fn linear(&mut self, x: &Tensor, weight: &Linear, out: &mut Tensor) -> Result<()> {
        out.set_rows(x.rows);
        for t in 0..x.rows {
            out.set_row(t, &product(x, t, weight));
        }
        Ok(())
    }

    fn linear_add(&mut self, x: &Tensor, weight: &Linear, out: &mut Tensor) -> Result<()> {
        for t in 0..x.rows {
            let y = product(x, t, weight);
            let sum: Vec<f32> = out.row(t).iter().zip(&y).map(|(o, y)| o + y).collect();
            out.set_row(t, &sum);
        }
        Ok(())
    }

    fn rope_append(&mut self, qkv: &mut Tensor, rope: &Rope, cache: &mut Cache) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim } = self.attention;
        for t in 0..qkv.rows {
            let position = self.position + t;
            let angles = &rope.table[position * head_dim / 2..][..head_dim / 2];
            let mut row = qkv.row(t).to_vec();
            // Queries and keys are neighbours; values are not rotated.
            for head in row.chunks_exact_mut(head_dim).take(heads + kv_heads) {
                rotate(head, angles);
            }
            let (keys, values) = row[heads * head_dim..].split_at(kv_heads * head_dim);
            let at = cache.at(position, 0);
            for (i, &key) in keys.iter().enumerate() {
                cache.keys[at + i] = cache.round(key);
            }
            let AttentionPolicy { values: format, exact, .. } = cache.policy;
            for (kv_head, value) in values.chunks_exact(head_dim).enumerate() {
                let mut bytes = Vec::new();
                encode_value(format, exact, value, &mut bytes);
                cache.set_value(position, kv_head, &bytes);
            }
            qkv.set_row(t, &row);
        }
        cache.length = self.position + qkv.rows;
        Ok(())
    }

    fn encode_keys(&mut self, cache: &mut Cache) -> Result<()> {
        let Some(layout) = cache.layout else { return Ok(()) };
        let PageLayout { tokens, head_dim, .. } = layout;
        for kv_head in 0..cache.shape.kv_heads {
            let theta = cache.thresholds.as_ref().map(|thetas| thetas[kv_head]);
            let layout = layout.with_theta(theta);
            for page in cache.pages[kv_head].len()..cache.length / tokens {
                let keys = cache.originals(page * tokens..(page + 1) * tokens, kv_head);
                let before = &cache.reconstruction[kv_head];
                let previous = before.len().checked_sub(head_dim).map(|last| &before[last..]);
                let page = encode_page(&layout, &keys, previous);
                cache.push_page(kv_head, page);
            }
        }
        Ok(())
    }

    fn attention(&mut self, qkv: &Tensor, cache: &Cache, out: &mut Tensor) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim } = cache.shape;
        let rule = cache.policy.rule(self.phase);
        out.set_rows(qkv.rows);
        for t in 0..qkv.rows {
            let mut y = Vec::with_capacity(heads * head_dim);
            for head in 0..heads {
                let query = &qkv.row(t)[head * head_dim..][..head_dim];
                let kv_head = head / (heads / kv_heads);
                y.extend(attend(query, kv_head, self.position + t, &rule, cache));
            }
            out.set_row(t, &y);
        }
        Ok(())
    }

    fn gate(
        &mut self,
        gate_up: &Tensor,
        activation: Activation,
        norm: Option<&Norm>,
        out: &mut Tensor,
    ) -> Result<()> {
        out.set_rows(gate_up.rows);
        for t in 0..gate_up.rows {
            let (gate, up) = gate_up.row(t).split_at(gate_up.width / 2);
            let y =
                gate.iter().zip(up).map(|(&g, &u)| (activate(g, activation) * f64::from(u)) as f32);
            let y: Vec<f32> = y.collect();
            match norm {
                Some(norm) => out.set_row(t, &rms_norm(&y, norm)),
                None => out.set_row(t, &y),
            }
        }
        Ok(())
    }

    fn sample(&mut self, logits: &Tensor, step: &SampleStep<'_>) -> Result<()> {
        let last = logits.row(logits.rows - 1);
        self.sampled.sample(step, |step| sample(last, step));
        Ok(())
    }

    fn truncate(&mut self, cache: &mut Cache, length: usize) -> Result<()> {
        cache.truncate(length);
        Ok(())
    }

    fn pages(&mut self, cache: &Cache) -> Result<Vec<Vec<Page>>> {
        Ok(cache.pages.clone())
    }

    fn save(&mut self, cache: &Cache, exact_from: usize) -> Result<CacheImage> {
        Ok(cache.save(exact_from))
    }

    fn restore(&mut self, cache: &mut Cache, image: &CacheImage) -> Result<()> {
        cache.restore(image);
        Ok(())
    }

    fn submit(&mut self) -> Result<()> {
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }

    fn token(&mut self) -> Result<u32> {
        self.sampled.read()
    }

    fn read(&mut self, tensor: &Tensor) -> Result<Vec<f32>> {
        Ok(tensor.floats().to_vec())
    }

    fn read_int8(&mut self, tensor: &Tensor) -> Result<(Vec<i8>, Vec<f32>)> {
        match &tensor.elements {
            Elements::Int8(values, scales) => {
                Ok((values[..tensor.rows * tensor.width].to_vec(), scales[..tensor.rows].to_vec()))
            }
            Elements::F32(_) => panic!("an Int8 tensor is needed"),
        }
    }
}

/// `weight * x / sqrt(mean(x^2) + eps)`, `[width]` (<https://arxiv.org/abs/1910.07467>, equation 4).
fn rms_norm(x: &[f32], norm: &Norm) -> Vec<f32> {
    let squares: f64 = x.iter().map(|&v| f64::from(v).powi(2)).sum();
    let rms = (squares / x.len() as f64 + f64::from(norm.eps)).sqrt();
    let scaled = |(&v, &w): (&f32, &f32)| (f64::from(w) * (f64::from(v) / rms)) as f32;
    x.iter().zip(&norm.weight).map(scaled).collect()
}

/// Row `t` of `x W^T`, `[out]`.
fn product(x: &Tensor, t: usize, weight: &Linear) -> Vec<f32> {
    let columns = t * x.width..(t + 1) * x.width;
    let mut y = Vec::with_capacity(weight.rows());
    for part in &weight.parts {
        assert_eq!(part.cols, x.width, "input width");
        for row in 0..part.rows {
            let w = part.row(row);
            y.push(match (&x.elements, part.format) {
                (Elements::Int8(values, scales), MatrixFormat::Ternary) => {
                    let products = values[columns.clone()]
                        .iter()
                        .zip(&w)
                        .map(|(&x, &w)| i32::from(x) * w as i32);
                    products.sum::<i32>() as f32 * (scales[t] * part.scale)
                }
                (Elements::F32(values), format) if format != MatrixFormat::Ternary => {
                    let products = values[columns.clone()]
                        .iter()
                        .zip(&w)
                        .map(|(&x, &w)| f64::from(x) * f64::from(w));
                    products.sum::<f64>() as f32
                }
                _ => panic!("{:?} weights do not multiply this tensor", part.format),
            });
        }
    }
    y
}

/// Rotates each pair `(i, i + D / 2)` of a head `[D]` by its angle
/// (<https://arxiv.org/abs/2104.09864>, equation 34, halves instead of neighbours).
fn rotate(head: &mut [f32], angles: &[[f32; 2]]) {
    let (first, second) = head.split_at_mut(angles.len());
    for ((a, b), &[cos, sin]) in first.iter_mut().zip(second).zip(angles) {
        let (x, y) = (f64::from(*a), f64::from(*b));
        let (cos, sin) = (f64::from(cos), f64::from(sin));
        *a = (x * cos - y * sin) as f32;
        *b = (y * cos + x * sin) as f32;
    }
}

/// `softmax(q k^T / sqrt(D)) v` of one query head `[D]` over positions `0..=last`, `[D]`
/// (<https://arxiv.org/abs/1706.03762>, equation 1), of keys as `rule` has them seen.
fn attend(query: &[f32], kv_head: usize, last: usize, rule: &ExactRule, cache: &Cache) -> Vec<f32> {
    let head_dim = cache.shape.head_dim;
    let score = |position: usize| {
        let key = cache.key(rule, last, position, kv_head);
        let dot: f64 = query.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
        dot / (head_dim as f64).sqrt()
    };
    let scores: Vec<f64> = (0..=last).map(score).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; head_dim];
    for (position, weight) in weights.iter().enumerate() {
        for (o, &v) in out.iter_mut().zip(&cache.values[cache.at(position, kv_head)..]) {
            *o += weight / sum * f64::from(v);
        }
    }
    out.into_iter().map(|o| o as f32).collect()
}

/// The activation of the gate.
fn activate(x: f32, activation: Activation) -> f64 {
    let x = f64::from(x);
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Relu2 => x.max(0.0).powi(2),
    }
}

/// The rule of [`SampleStep`] over `logits` `[vocabulary]`; nothing where one is NaN, or where the
/// largest is infinite and weights would be NaN.
fn sample(logits: &[f32], step: &SampleStep<'_>) -> Option<u32> {
    if logits.iter().any(|l| l.is_nan()) {
        return None;
    }
    let penalised = |(id, &logit): (usize, &f32)| {
        let id = id as u32;
        let logit = match (step.seen.contains(id), logit > 0.0) {
            (false, _) => logit,
            (true, true) => logit / step.repetition_penalty,
            (true, false) => logit * step.repetition_penalty,
        };
        (logit, id)
    };
    let mut candidates: Vec<(f32, u32)> = logits.iter().enumerate().map(penalised).collect();
    // A stable sort: equal logits stay in the order of their ids.
    candidates.sort_by(|a, b| b.0.partial_cmp(&a.0).expect("no NaN"));
    let first = candidates[0];
    if !first.0.is_finite() {
        return None;
    }
    if step.is_greedy() {
        return Some(first.1);
    }
    if step.top_k > 0 {
        candidates.truncate(step.top_k);
    }
    let weight = |logit: f32| ((logit - first.0) / step.temperature).exp();
    let mut weights: Vec<f32> = candidates.iter().map(|c| weight(c.0)).collect();
    let total: f32 = weights.iter().sum();
    // Falling weights: those of at least min_p are a prefix, and the first weight, 1, is in it.
    weights.retain(|&w| w >= step.min_p);
    if let Some(last) = first_where(&weights, |sum| sum >= step.top_p * total) {
        weights.truncate(last + 1);
    }
    let left: f32 = weights.iter().sum();
    let chosen = first_where(&weights, |sum| sum > step.draw * left);
    Some(candidates[chosen.unwrap_or(weights.len() - 1)].1)
}

/// The first index whose prefix sum, itself included, fulfils `condition`.
fn first_where(weights: &[f32], condition: impl Fn(f32) -> bool) -> Option<usize> {
    let mut sum = 0.0f32;
    weights.iter().position(|w| {
        sum += w;
        condition(sum)
    })
}
