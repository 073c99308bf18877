//! `sample`: chooses the token on the device, so that eight bytes are read back and not a
//! vocabulary of logits.
//!
//! Rounds of `sample_best` (greedy) or `sample_top` each keep the best few candidates of every
//! block of 1024, until one block is left; `sample_draw` draws from it.

use super::buffer::Buffer;
use super::device::Device;
use super::recorder::Recorder;
use super::shader::{Binding, Kernel, PRECISE, Program, wgsl};
use super::stream::Stream;
use super::tensor::Tensor;
use crate::backend::{StreamShape, TensorFormat};
use crate::error::{Error, Result};
use crate::sampler::SampleStep;

/// Largest `top_k`: what one round keeps of a block, so that each round shrinks the list to a
/// quarter at least.
pub(super) const MAX_TOP_K: usize = 256;

/// Candidates that a workgroup takes.
const BLOCK: usize = 1024;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    count: u32,
    first: u32,
    penalty: f32,
    keep: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct DrawParams {
    count: u32,
    temperature: f32,
    min_p: f32,
    top_p: f32,
    draw: f32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Choice {
    token: u32,
    not_finite: u32,
}

const CHOICE_BYTES: u64 = size_of::<Choice>() as u64;

fn select_program(first: bool, file: &'static str) -> Program {
    let order = wgsl!("common/candidate_order.wgsl");
    let mut bindings = vec![(1, Binding::Read), (3, Binding::Write)];
    let parts = if first {
        bindings.push((2, Binding::Read));
        vec![PRECISE, order, wgsl!("common/candidates_logits.wgsl"), file]
    } else {
        vec![order, wgsl!("common/candidates_list.wgsl"), file]
    };
    Program { constants: Vec::new(), parts, bindings, f16: false }
}

pub(super) fn best_program(first: bool) -> Program {
    select_program(first, wgsl!("sample_best.wgsl"))
}

pub(super) fn top_program(first: bool) -> Program {
    select_program(first, wgsl!("sample_top.wgsl"))
}

pub(super) fn draw_program() -> Program {
    Program {
        constants: Vec::new(),
        parts: vec![wgsl!("sample_draw.wgsl")],
        bindings: vec![(1, Binding::Read), (2, Binding::Write)],
        f16: false,
    }
}

/// What sampling keeps between its dispatches, and where the token is read.
pub(super) struct Scratch {
    /// Candidates after the odd and the even rounds.
    lists: [Buffer; 2],
    /// The tokens in the context, a bit each.
    seen: Buffer,
    choice: Buffer,
    readback: Buffer,
    /// Whether a token was sampled since the last one was read.
    sampled: bool,
}

impl Scratch {
    pub(super) fn new(device: &Device, shape: &StreamShape) -> Result<Self> {
        let blocks = shape.vocabulary.div_ceil(BLOCK);
        let list = |blocks: usize| {
            device.storage("candidates of sampling", (blocks * MAX_TOP_K * 8) as u64)
        };
        let lists = [list(blocks)?, list((blocks * MAX_TOP_K).div_ceil(BLOCK))?];
        let seen = (shape.vocabulary.div_ceil(32) * 4) as u64;
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        Ok(Self {
            lists,
            seen: device.storage("the tokens of the context", seen)?,
            choice: device.storage("the sampled token", CHOICE_BYTES)?,
            readback: device.buffer("the sampled token", CHOICE_BYTES, usage)?,
            sampled: false,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        let buffers = [&self.lists[0], &self.lists[1], &self.seen, &self.choice, &self.readback];
        buffers.iter().map(|buffer| buffer.size()).sum()
    }

    /// Reduces the candidates to one sorted list of the best `keep`; gives where it is.
    fn reduce(
        &self,
        recorder: &mut Recorder,
        logits: &Buffer,
        first_round: Params,
    ) -> Result<&Buffer> {
        let keep = first_round.keep as usize;
        let kernel = |first| match keep {
            1 => Kernel::SampleBest { first },
            _ => Kernel::SampleTop { first },
        };
        let [odd, even] = &self.lists;
        let mut blocks = (first_round.count as usize).div_ceil(BLOCK);
        let buffers = [logits, odd, &self.seen];
        recorder.dispatch(kernel(true), &first_round, &buffers, [blocks, 1, 1])?;
        let (mut from, mut to) = (odd, even);
        while blocks > 1 {
            let count = blocks * keep;
            blocks = count.div_ceil(BLOCK);
            let params = Params { count: count as u32, first: 0, penalty: 1.0, keep: keep as u32 };
            recorder.dispatch(kernel(false), &params, &[from, to], [blocks, 1, 1])?;
            (from, to) = (to, from);
        }
        Ok(from)
    }
}

impl Stream {
    pub(super) fn sample_token(&mut self, logits: &Tensor, step: &SampleStep<'_>) -> Result<()> {
        let vocabulary = logits.width;
        let keep = if step.is_greedy() { 1 } else { step.top_k.min(vocabulary) };
        let fits = logits.rows > 0 && logits.format == TensorFormat::F32;
        let shapes = vocabulary > 0 && vocabulary <= self.shape.vocabulary;
        self.expect("sample", fits && shapes && (1..=MAX_TOP_K).contains(&keep), || {
            format!("top_k {} of {} rows of {vocabulary} logits", step.top_k, logits.rows)
        })?;
        if self.sampling.sampled {
            // The bits of the context's tokens are about to be written, before what is recorded.
            self.recorder.submit()?;
        }
        if step.repetition_penalty != 1.0 {
            let words = step.seen.words();
            let words = &words[..words.len().min(vocabulary.div_ceil(32))];
            self.device.write(&self.sampling.seen, 0, bytemuck::cast_slice(words))?;
        }
        let params = Params {
            count: vocabulary as u32,
            first: ((logits.rows - 1) * logits.stride()) as u32,
            penalty: step.repetition_penalty,
            keep: keep as u32,
        };
        let scratch = &self.sampling;
        let kept = scratch.reduce(&mut self.recorder, &logits.data, params)?;
        let params = DrawParams {
            count: keep as u32,
            temperature: step.temperature,
            min_p: step.min_p,
            top_p: step.top_p,
            draw: step.draw,
        };
        let buffers = [kept, &scratch.choice];
        self.recorder.dispatch(Kernel::SampleDraw, &params, &buffers, [1, 1, 1])?;
        self.recorder.copy((&scratch.choice, 0), (&scratch.readback, 0), CHOICE_BYTES);
        self.sampling.sampled = true;
        Ok(())
    }

    pub(super) fn sampled_token(&mut self) -> Result<u32> {
        self.expect("token", self.sampling.sampled, || "no token was sampled".to_owned())?;
        let bytes = self.recorder.read(&self.sampling.readback, CHOICE_BYTES)?;
        self.sampling.sampled = false;
        let choice: Choice = bytemuck::pod_read_unaligned(&bytes);
        if choice.not_finite != 0 {
            return Err(Error::NotFinite { what: "the logits".to_owned() });
        }
        Ok(choice.token)
    }
}
