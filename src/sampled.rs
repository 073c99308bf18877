//! Sampled tokens between the step that chooses them and whoever reads them, for backends whose
//! operations are done when their call returns.

use std::collections::VecDeque;

use crate::backend::Input;
use crate::error::{Error, Result};
use crate::sampler::SampleStep;

/// Tokens that were sampled; nothing in place of one whose logits held NaN.
#[derive(Debug, Default)]
pub(crate) struct SampledTokens {
    /// Those since the last step of given tokens.
    since: Vec<Option<u32>>,
    unread: VecDeque<Option<u32>>,
    /// Whether the step runs on a sampled token.
    goes_on: bool,
}

impl SampledTokens {
    /// Starts a step: `tokens` become those that it runs on.
    pub(crate) fn begin(&mut self, input: Input<'_>, tokens: &mut Vec<u32>) -> Result<()> {
        tokens.clear();
        self.goes_on = matches!(input, Input::Sampled);
        match input {
            Input::Tokens(given) => {
                self.since.clear();
                self.unread.clear();
                tokens.extend_from_slice(given);
            }
            Input::Sampled => {
                let last = self.since.last().ok_or_else(nothing_sampled)?;
                tokens.push(last.ok_or_else(not_finite)?);
            }
        }
        Ok(())
    }

    /// Keeps what `choose` chooses in this step.
    pub(crate) fn sample(
        &mut self,
        step: &SampleStep<'_>,
        choose: impl FnOnce(&SampleStep<'_>) -> Option<u32>,
    ) {
        let token = if self.goes_on && step.repetition_penalty != 1.0 {
            let mut seen = step.seen.clone();
            self.since.iter().flatten().for_each(|&token| seen.insert(token));
            choose(&SampleStep { seen: &seen, ..*step })
        } else {
            choose(step)
        };
        self.since.push(token);
        self.unread.push_back(token);
    }

    /// The first that was not read.
    pub(crate) fn read(&mut self) -> Result<u32> {
        self.unread.pop_front().ok_or_else(nothing_sampled)?.ok_or_else(not_finite)
    }
}

fn nothing_sampled() -> Error {
    let (device, what) = ("the host".into(), "the next token".into());
    Error::Device { device, what, message: "no token was sampled".into() }
}

fn not_finite() -> Error {
    Error::NotFinite { what: "the logits".into() }
}
