//! The operations of one session; each is done when its call returns.

use std::ops::Range;
use std::sync::Arc;

use super::fixed::Fixed;
use super::tensor::Aligned;
use super::tiled::TokenTiles;
use super::{
    Cache, Cpu, Linear, Machine, Norm, Rope, Scratch, Tensor, attention, embed, encode_keys, gate,
    linear_float, linear_levels, linear_ternary, norm, rope_append, sample,
};
use crate::backend::{Activation, Footprint, MatrixFormat, Operations, Step, StreamShape};
use crate::delta::{CacheImage, Page, Phase};
use crate::error::Result;
use crate::sampled::SampledTokens;
use crate::sampler::SampleStep;

/// A session's stream, with the memory that its operations need besides tensors.
pub struct Stream {
    machine: Arc<Machine>,
    tokens: Vec<u32>,
    /// Where the step's first token stands in the text.
    position: usize,
    /// Which of the policy's windows holds.
    phase: Phase,
    scratch: Scratch,
    /// Activations of the last product with weights of 8 or 4 bits.
    fixed: Fixed,
    /// Activations of the last product in a unit for tiles.
    tiles: TokenTiles,
    /// Results of the segments of attention.
    partial: Aligned<f32>,
    /// Candidates of the last choice.
    candidates: Vec<u64>,
    sampled: SampledTokens,
}

impl Stream {
    pub(super) fn new(machine: Arc<Machine>, shape: &StreamShape) -> Self {
        let scratch = Scratch::new(machine.threads.count());
        Self {
            machine,
            tokens: Vec::with_capacity(shape.rows),
            position: 0,
            phase: Phase::Decode,
            scratch,
            fixed: Fixed::new(),
            tiles: TokenTiles::new(),
            partial: Aligned::zeros(0),
            candidates: Vec::new(),
            sampled: SampledTokens::default(),
        }
    }

    /// `out = x W^T`, or `out += x W^T` if `add`.
    fn product(&mut self, x: &Tensor, weight: &Linear, out: &mut Tensor, add: bool) {
        let Self { machine, scratch, fixed, tiles, .. } = self;
        let parts = &weight.parts[..];
        match parts.first().map(|part| part.format) {
            Some(MatrixFormat::Ternary) => {
                linear_ternary::linear(machine, (scratch, tiles), x, parts, out, add);
            }
            Some(format) if linear_levels::takes(machine, format, x.rows()) => {
                linear_levels::linear(machine, (scratch, fixed, tiles), x, parts, out, add);
            }
            _ => linear_float::linear(machine, scratch, x, parts, out, add),
        }
    }
}

impl Footprint for Stream {
    fn bytes(&self) -> u64 {
        let candidates = self.candidates.capacity() * size_of::<u64>();
        let kept = self.scratch.bytes() + self.fixed.bytes() + self.tiles.bytes();
        kept + self.partial.bytes() + candidates as u64
    }
}

impl Operations<Cpu> for Stream {
    fn begin(&mut self, step: &Step<'_>) -> Result<()> {
        self.sampled.begin(step.input, &mut self.tokens)?;
        (self.position, self.phase) = (step.position, step.phase);
        Ok(())
    }

    fn embed(&mut self, table: &Linear, out: &mut Tensor) -> Result<()> {
        embed::embed(&self.machine, &self.tokens, &table.parts[0], out);
        Ok(())
    }

    fn norm(
        &mut self,
        x: &Tensor,
        rows: Range<usize>,
        norm: &Norm,
        out: &mut Tensor,
    ) -> Result<()> {
        norm::norm(&self.machine, x, rows, norm, out);
        Ok(())
    }

    fn linear(&mut self, x: &Tensor, weight: &Linear, out: &mut Tensor) -> Result<()> {
        out.set_rows(x.rows());
        self.product(x, weight, out, false);
        Ok(())
    }

    fn linear_add(&mut self, x: &Tensor, weight: &Linear, out: &mut Tensor) -> Result<()> {
        self.product(x, weight, out, true);
        Ok(())
    }

    fn rope_append(&mut self, qkv: &mut Tensor, rope: &Rope, cache: &mut Cache) -> Result<()> {
        rope_append::rope_append(&self.machine, self.position, qkv, rope, cache);
        Ok(())
    }

    fn encode_keys(&mut self, cache: &mut Cache) -> Result<()> {
        encode_keys::encode_keys(&self.machine, cache);
        Ok(())
    }

    fn attention(&mut self, qkv: &Tensor, cache: &Cache, out: &mut Tensor) -> Result<()> {
        let Self { machine, scratch, partial, position, phase, .. } = self;
        attention::attention(machine, scratch, partial, (*position, *phase), qkv, cache, out);
        Ok(())
    }

    fn gate(
        &mut self,
        gate_up: &Tensor,
        activation: Activation,
        norm: Option<&Norm>,
        out: &mut Tensor,
    ) -> Result<()> {
        gate::gate(&self.machine, gate_up, activation, norm, out);
        Ok(())
    }

    fn sample(&mut self, logits: &Tensor, step: &SampleStep<'_>) -> Result<()> {
        let last = logits.row(logits.rows() - 1);
        let candidates = &mut self.candidates;
        self.sampled.sample(step, |step| sample::sample(last, step, candidates));
        Ok(())
    }

    fn truncate(&mut self, cache: &mut Cache, length: usize) -> Result<()> {
        cache.truncate(length);
        Ok(())
    }

    fn pages(&mut self, cache: &Cache) -> Result<Vec<Vec<Page>>> {
        Ok(cache.pages())
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
        let (rows, int8) = (tensor.rows(), tensor.int8());
        let values = int8.values[..rows * tensor.width()].to_vec();
        Ok((values, int8.scales[..rows].to_vec()))
    }
}
