//! Sampled tokens between the step that chooses them and whoever reads them, for backends whose
//! operations are done when their call returns.

use std::collections::VecDeque;

use crate::backend::Input;
use crate::error::{Error, Result};
use crate::sampler::SampleStep;

/// Tokens that were sampled; nothing in place of one whose logits held NaN.
#[derive(Debug, Default)]
pub(crate) struct SampledTokens {
    last: Option<u32>,
    unread: VecDeque<Option<u32>>,
    /// What the step runs on, where that was sampled.
    input: Option<u32>,
}

impl SampledTokens {
    /// Starts a step: `tokens` become those that it runs on.
    pub(crate) fn begin(&mut self, input: Input<'_>, tokens: &mut Vec<u32>) -> Result<()> {
        tokens.clear();
        match input {
            Input::Tokens(given) => {
                self.unread.clear();
                self.input = None;
                tokens.extend_from_slice(given);
            }
            Input::Sampled => {
                let last = self.last.ok_or_else(not_finite)?;
                self.input = Some(last);
                tokens.push(last);
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
        self.last = match self.input {
            Some(token) if step.repetition_penalty != 1.0 && !step.seen.contains(token) => {
                let mut seen = step.seen.clone();
                seen.insert(token);
                choose(&SampleStep { seen: &seen, ..*step })
            }
            _ => choose(step),
        };
        self.unread.push_back(self.last);
    }

    /// The first that was not read.
    pub(crate) fn read(&mut self) -> Result<u32> {
        let token = self.unread.pop_front().ok_or_else(|| Error::Device {
            device: "CPU".into(),
            what: "token".into(),
            message: "no token was sampled".into(),
        })?;
        token.ok_or_else(not_finite)
    }
}

fn not_finite() -> Error {
    Error::NotFinite { what: "the logits".into() }
}
