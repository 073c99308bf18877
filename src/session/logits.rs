//! A given text run through a model for its logits: how well the model expects each token.

use std::sync::Arc;

use super::{Cancel, Session, check_fits, finite};
use crate::backend::Input;
use crate::delta::{AttentionPolicy, CacheStatistics, Thresholds};
use crate::error::{Error, Result};
use crate::model::{LOGITS_CHUNK, Model, Output, PREFILL_CHUNK, SessionShape};

/// Which part of a text is a prompt, and where logits begin to be of interest.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct LogitsOptions {
    /// How keys and values are kept.
    pub attention: AttentionPolicy,
    /// Thresholds of each layer and KV head in place of the policy's one, whose unit they are in.
    pub thresholds: Option<Thresholds>,
    /// Tokens that run as one prompt; the others are fed one by one, as in decoding. `None` takes
    /// the whole text.
    pub prompt: Option<usize>,
    /// The first token whose logits are wanted: those after it, which foretell the next one.
    pub from: usize,
}

/// A text on its way through a model, some tokens at a time, so that two runs of one text can be
/// compared without keeping all logits of either.
///
/// Runs of the same text with the same `prompt` and `from` give rows in the same portions.
#[derive(Debug)]
pub struct LogitsRun {
    session: Session,
    ids: Arc<[u32]>,
    prompt: usize,
    from: usize,
    /// Whether the last step has left logits that were not read, because that has failed.
    unread: bool,
}

impl LogitsRun {
    /// Begins to run `ids`.
    ///
    /// # Errors
    /// No token, one outside the vocabulary, more than the model's context; a policy out of range,
    /// thresholds of another shape; too little device memory.
    pub fn new(
        model: &Model,
        ids: impl Into<Arc<[u32]>>,
        options: &LogitsOptions,
        cancel: &Cancel,
    ) -> Result<Self> {
        let ids = ids.into();
        let limit = model.config().context;
        check_fits(ids.len(), limit, limit)?;
        let vocabulary = model.config().vocabulary;
        if let Some(&token) = ids.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(Error::TokenOutOfRange { token, vocabulary });
        }
        let context = ids.len().max(1);
        let shape = SessionShape {
            context,
            chunk: PREFILL_CHUNK.min(context),
            logit_rows: LOGITS_CHUNK.min(context),
            policy: options.attention,
            thresholds: options.thresholds.clone(),
        };
        let mut session = Session::with_shape(model, shape)?;
        session.cancel_with(cancel.clone());
        let prompt = options.prompt.unwrap_or(ids.len()).clamp(1, context);
        session.append(ids.get(..prompt).unwrap_or_default())?;
        Ok(Self { session, ids, prompt, from: options.from, unread: false })
    }

    /// The logits after the next tokens, `[tokens, vocabulary]`; `None` after the last one. After a
    /// fault the next call goes on at the same tokens.
    ///
    /// # Errors
    /// [`Error::Cancelled`], logits that are not finite, a fault of the device.
    pub fn next_rows(&mut self) -> Result<Option<Vec<f32>>> {
        loop {
            if self.unread {
                return self.rows().map(Some);
            }
            let session = &mut self.session;
            let start = session.decoder.length();
            if start == self.ids.len() {
                return Ok(None);
            }
            if session.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let in_prompt = start < self.prompt;
            if !in_prompt && session.tokens.len() == start {
                session.tokens.push(self.ids[start]);
            }
            let (part, wanted) = (if in_prompt { self.prompt } else { start + 1 }, self.from);
            let end = match start < wanted {
                true => part.min(wanted).min(start + PREFILL_CHUNK),
                false => part.min(start + LOGITS_CHUNK),
            };
            let phase = session.phase();
            let output = if start < wanted { Output::Nothing } else { Output::AllLogits };
            session.decoder.forward(Input::Tokens(&self.ids[start..end]), phase, output)?;
            if start < wanted {
                // One step at a time is on its way: work that is queued cannot be cancelled.
                session.decoder.wait()?;
            } else {
                self.unread = true;
            }
        }
    }

    /// Reads the logits of the last step.
    fn rows(&mut self) -> Result<Vec<f32>> {
        let rows = self.session.decoder.logits()?;
        self.unread = false;
        finite(rows).map_err(|error| self.session.blamed(error))
    }

    /// What the compressed keys are by now.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn statistics(&mut self) -> Result<CacheStatistics> {
        self.session.statistics()
    }
}

impl Model {
    /// Logits after every token of `ids`, run as one prompt: `sink` gets them in order, some rows of
    /// `[vocabulary]` at a time.
    ///
    /// # Errors
    /// As [`LogitsRun`], and whatever `sink` returns.
    pub fn logits(
        &self,
        ids: &[u32],
        policy: &AttentionPolicy,
        cancel: &Cancel,
        mut sink: impl FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        let options = LogitsOptions { attention: *policy, ..LogitsOptions::default() };
        let mut run = LogitsRun::new(self, ids, &options, cancel)?;
        while let Some(rows) = run.next_rows()? {
            sink(&rows)?;
        }
        Ok(())
    }
}
