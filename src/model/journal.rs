//! How a cache came about, step by step, so that the same one can be made again on another device.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Decoder, Output};
use crate::backend::Input;
use crate::delta::{CacheImage, Phase};
use crate::error::{Error, Result};
use crate::sampler::{SampleStep, TokenSet};
use crate::session::Cancel;

/// Steps of decoding that are on their way together: enough to keep a device busy, few enough that
/// cancelling takes effect soon.
const STRIDE: usize = 16;

/// The steps that a cache was made by, in their order.
///
/// A cache depends on more than its tokens. A compressed one keeps what the windows of prompt and
/// decoding have let through, and kernels for one token round differently from those for many. So
/// what was one step is one step when it is replayed, on the same tokens in the same phase.
pub(super) struct Journal {
    done: Vec<Run>,
    /// Steps whose result was not read yet, or may be read again. All but the first run on a sampled
    /// token.
    unread: VecDeque<Unread>,
    /// Tokens of all of them.
    length: usize,
    /// Where repetition is penalised: the tokens of the context, as far as the host knows them.
    seen: TokenSet,
}

/// A part of the cache.
enum Run {
    /// What was restored from a file or from another place of the text, of which the first `kept`
    /// tokens are left.
    Restored { images: Arc<[CacheImage]>, kept: usize },
    /// A step over several tokens, of which the first `kept` are left.
    Step { tokens: Vec<u32>, phase: Phase, kept: usize },
    /// Steps of decoding over one token each.
    Decoded(Vec<u32>),
}

/// A step with a result.
struct Unread {
    /// Nothing for the token that the step before it samples.
    tokens: Option<Vec<u32>>,
    phase: Phase,
    wanted: Wanted,
}

enum Wanted {
    /// This, over the tokens in [`Journal::seen`].
    Token(Sample),
    LastLogits,
    AllLogits,
}

/// A [`SampleStep`] without the tokens seen. The number drawn is part of it: what is sampled again is
/// not drawn again.
#[derive(Clone, Copy)]
struct Sample {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    draw: f32,
}

impl Run {
    fn kept(&self) -> usize {
        match self {
            Self::Restored { kept, .. } | Self::Step { kept, .. } => *kept,
            Self::Decoded(tokens) => tokens.len(),
        }
    }

    fn keep(&mut self, count: usize) {
        match self {
            Self::Restored { kept, .. } | Self::Step { kept, .. } => *kept = count,
            Self::Decoded(tokens) => tokens.truncate(count),
        }
    }
}

impl Unread {
    fn count(&self) -> usize {
        self.tokens.as_ref().map_or(1, Vec::len)
    }
}

impl Journal {
    pub(super) fn new() -> Self {
        let (done, unread, seen) = (Vec::new(), VecDeque::new(), TokenSet::default());
        Self { done, unread, length: 0, seen }
    }

    /// Tokens in the cache.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Takes note of a step that is on its way.
    ///
    /// # Errors
    /// Given tokens after one that was sampled, run and never read: nobody could run it again.
    pub(super) fn record(
        &mut self,
        input: Input<'_>,
        phase: Phase,
        output: Output<'_>,
    ) -> Result<()> {
        let tokens = match input {
            Input::Sampled => None,
            Input::Tokens(tokens) => {
                self.let_go()?;
                Some(tokens.to_vec())
            }
        };
        if let (Output::Sample(step), Some(_)) = (output, &tokens)
            && step.repetition_penalty != 1.0
        {
            self.seen.clone_from(step.seen);
        }
        let wanted = match output {
            Output::Nothing => None,
            Output::Sample(step) => Some(Wanted::Token(Sample::of(step))),
            Output::LastLogits => Some(Wanted::LastLogits),
            Output::AllLogits => Some(Wanted::AllLogits),
        };
        match wanted {
            None => self.push(tokens.ok_or_else(lost_track)?, phase),
            Some(wanted) => self.unread.push_back(Unread { tokens, phase, wanted }),
        }
        self.length += input.count();
        Ok(())
    }

    /// Takes note that the first sampled token was read, or could not be.
    pub(super) fn read(&mut self, token: Option<u32>) {
        let Some(Unread { tokens, phase, .. }) = self.unread.pop_front() else {
            return;
        };
        self.push(tokens.unwrap_or_default(), phase);
        let Some(token) = token else { return };
        if (token as usize / 32) < self.seen.words().len() {
            self.seen.insert(token);
        }
        if let Some(next) = self.unread.front_mut() {
            next.tokens.get_or_insert_with(|| vec![token]);
        }
    }

    /// Takes note that an empty cache was restored.
    pub(super) fn restored(&mut self, images: &Arc<[CacheImage]>) {
        let kept = images.first().map_or(0, |image| image.length);
        self.clear();
        self.length = kept;
        self.done.push(Run::Restored { images: Arc::clone(images), kept });
    }

    /// Takes note that the cache was cut back to its first `length` tokens.
    pub(super) fn truncate(&mut self, length: usize) {
        if length == 0 {
            return self.clear();
        }
        while let Some(last) = self.unread.back()
            && self.length - last.count() >= length
        {
            self.length -= last.count();
            self.unread.pop_back();
        }
        if self.length <= length {
            return;
        }
        // What is left of a step has no result.
        while let Some(Unread { tokens, phase, .. }) = self.unread.pop_front() {
            self.push(tokens.unwrap_or_default(), phase);
        }
        while let Some(last) = self.done.last_mut() {
            let start = self.length - last.kept();
            if start < length {
                last.keep(length - start);
                break;
            }
            self.length = start;
            self.done.pop();
        }
        self.length = length;
    }

    fn clear(&mut self) {
        self.done.clear();
        self.unread.clear();
        self.length = 0;
    }

    /// Whoever gives tokens does without the results of earlier steps.
    fn let_go(&mut self) -> Result<()> {
        while let Some(Unread { tokens, phase, .. }) = self.unread.pop_front() {
            self.push(tokens.ok_or_else(lost_track)?, phase);
        }
        Ok(())
    }

    fn push(&mut self, tokens: Vec<u32>, phase: Phase) {
        let decoded = phase == Phase::Decode && tokens.len() == 1;
        match self.done.last_mut() {
            Some(Run::Decoded(before)) if decoded => before.extend(tokens),
            _ if decoded => self.done.push(Run::Decoded(tokens)),
            _ => self.done.push(Run::Step { kept: tokens.len(), tokens, phase }),
        }
    }

    /// Makes the cache again in an empty one, with the results that were not read.
    ///
    /// # Errors
    /// A fault of the device; [`Error::Cancelled`].
    pub(super) fn replay(&self, decoder: &mut dyn Decoder, cancel: &Cancel) -> Result<()> {
        for run in &self.done {
            let start = decoder.length();
            match run {
                Run::Restored { images, .. } => decoder.restore(images)?,
                Run::Step { tokens, phase, .. } => {
                    decoder.forward(Input::Tokens(tokens), *phase, Output::Nothing)?;
                }
                Run::Decoded(tokens) => {
                    for tokens in tokens.chunks(STRIDE) {
                        stop_if_cancelled(cancel)?;
                        for token in tokens {
                            let input = Input::Tokens(std::slice::from_ref(token));
                            decoder.forward(input, Phase::Decode, Output::Nothing)?;
                        }
                        decoder.wait()?;
                    }
                }
            }
            decoder.truncate(start + run.kept());
            stop_if_cancelled(cancel)?;
            // As in a prompt: one step at a time is on its way.
            decoder.wait()?;
        }
        for Unread { tokens, phase, wanted } in &self.unread {
            let input = tokens.as_deref().map_or(Input::Sampled, Input::Tokens);
            match wanted {
                Wanted::Token(sample) => {
                    let step = sample.step(&self.seen);
                    decoder.forward(input, *phase, Output::Sample(&step))?;
                }
                Wanted::LastLogits => decoder.forward(input, *phase, Output::LastLogits)?,
                Wanted::AllLogits => decoder.forward(input, *phase, Output::AllLogits)?,
            }
        }
        Ok(())
    }
}

impl Sample {
    fn of(step: &SampleStep<'_>) -> Self {
        let SampleStep { temperature, top_k, top_p, min_p, repetition_penalty, draw, .. } = *step;
        Self { temperature, top_k, top_p, min_p, repetition_penalty, draw }
    }

    fn step<'a>(&self, seen: &'a TokenSet) -> SampleStep<'a> {
        let Self { temperature, top_k, top_p, min_p, repetition_penalty, draw } = *self;
        SampleStep { temperature, top_k, top_p, min_p, repetition_penalty, seen, draw }
    }
}

fn stop_if_cancelled(cancel: &Cancel) -> Result<()> {
    if cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
}

fn lost_track() -> Error {
    let (device, what) = ("the host".into(), "a step".into());
    Error::Device { device, what, message: "a sampled token was run and never read".into() }
}
