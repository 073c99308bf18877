//! `sample`: chooses the token on the device, so that eight bytes are read back and not a
//! vocabulary of logits.
//!
//! Rounds of `sample_best` (greedy) or `sample_top` each keep the best few candidates of every
//! block of 1024, until one block is left; `sample_draw` draws from it.

use std::collections::VecDeque;

use super::buffer::Buffer;
use super::device::Device;
use super::recorder::Recorder;
use super::shader::{Binding, Kernel, PRECISE, Program, wgsl};
use super::stream::Stream;
use super::tensor::Tensor;
use crate::backend::{Operations, StreamShape, TensorFormat};
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
    slot: u32,
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
        bindings: [1, 2, 3, 4]
            .map(|at| (at, if at == 1 { Binding::Read } else { Binding::Write }))
            .into(),
        f16: false,
    }
}

/// Tokens that can be sampled before the first of them is read.
const SLOTS: usize = 4;

/// A token that was sampled and not read.
struct Unread {
    slot: usize,
    /// The submission that copies it; nothing while it is only recorded.
    submission: Option<wgpu::SubmissionIndex>,
}

/// What sampling keeps between its dispatches, and where tokens are read.
pub(super) struct Scratch {
    /// Candidates after the odd and the even rounds.
    lists: [Buffer; 2],
    /// The tokens in the context, a bit each. Sampling adds its token.
    seen: Buffer,
    /// [`SLOTS`] choices.
    choices: Buffer,
    readbacks: [Buffer; SLOTS],
    unread: VecDeque<Unread>,
    /// The slot of the next token.
    next: usize,
    /// Whether a token was ever sampled.
    pub(super) any: bool,
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
        let readback = || device.buffer("the sampled token", CHOICE_BYTES, usage);
        Ok(Self {
            lists,
            seen: device.storage("the tokens of the context", seen)?,
            choices: device.storage("sampled tokens", SLOTS as u64 * CHOICE_BYTES)?,
            readbacks: [readback()?, readback()?, readback()?, readback()?],
            unread: VecDeque::with_capacity(SLOTS),
            next: 0,
            any: false,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        let buffers = [&self.seen, &self.choices].into_iter();
        buffers.chain(&self.lists).chain(&self.readbacks).map(Buffer::size).sum()
    }

    /// Lets go of the tokens that were not read.
    pub(super) fn forget(&mut self) {
        self.unread.clear();
    }

    /// All that was recorded is on its way.
    pub(super) fn submitted(&mut self, recorder: &Recorder) {
        for unread in self.unread.iter_mut().filter(|unread| unread.submission.is_none()) {
            unread.submission = recorder.submitted();
        }
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
        let left = SLOTS - self.sampling.unread.len();
        self.expect("sample", left > 0, || format!("{SLOTS} sampled tokens were not read"))?;
        if step.repetition_penalty != 1.0 && !self.step.sampled {
            // The bits of the context's tokens are about to be written, before what is recorded.
            if !self.sampling.unread.is_empty() {
                self.submit()?;
            }
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
        let slot = scratch.next;
        let params = DrawParams {
            count: keep as u32,
            temperature: step.temperature,
            min_p: step.min_p,
            top_p: step.top_p,
            draw: step.draw,
            slot: slot as u32,
        };
        let buffers = [kept, &scratch.choices, &self.tokens, &scratch.seen];
        self.recorder.dispatch(Kernel::SampleDraw, &params, &buffers, [1, 1, 1])?;
        let from = (&scratch.choices, slot as u64 * CHOICE_BYTES);
        self.recorder.copy(from, (&scratch.readbacks[slot], 0), CHOICE_BYTES);
        self.sampling.unread.push_back(Unread { slot, submission: None });
        self.sampling.next = (slot + 1) % SLOTS;
        self.sampling.any = true;
        Ok(())
    }

    /// Waits for the step that has sampled the first token that was not read, and for no later one.
    pub(super) fn sampled_token(&mut self) -> Result<u32> {
        if self.sampling.unread.front().is_some_and(|unread| unread.submission.is_none()) {
            self.submit()?;
        }
        let Some(Unread { slot, submission }) = self.sampling.unread.pop_front() else {
            return Err(self.fault("token", "no token was sampled"));
        };
        let readback = &self.sampling.readbacks[slot];
        let bytes = self.recorder.read_after(readback, CHOICE_BYTES, submission)?;
        let choice: Choice = bytemuck::pod_read_unaligned(&bytes);
        if choice.not_finite != 0 {
            return Err(Error::NotFinite { what: "the logits".to_owned() });
        }
        Ok(choice.token)
    }
}
