//! Places in a text that a session goes back to time and again, for what is measured repeatedly.

use std::sync::Arc;

use super::Session;
use crate::backend::Input;
use crate::delta::{CacheImage, Phase};
use crate::error::{Error, Result};
use crate::model::Output;

/// A place in a session's text, with all that is needed to be there again.
pub(crate) struct Place {
    length: usize,
    /// Of each layer; none where keys are plain, which are still there when a text is cut back.
    images: Arc<[CacheImage]>,
}

impl Session {
    /// Appends `tokens` as a prompt and runs them all; none is chosen after them.
    ///
    /// # Errors
    /// As [`Session::generate`].
    pub(crate) fn fill(&mut self, tokens: &[u32]) -> Result<()> {
        let before = (self.tokens.len(), self.prompt);
        self.prefill(tokens)?;
        let (pending, phase) = (&self.tokens[self.decoder.length()..], self.phase());
        let run = self.decoder.forward(Input::Tokens(pending), phase, Output::Nothing);
        let run = run.and_then(|()| self.decoder.wait());
        if run.is_err() {
            self.take_back(before);
        }
        run
    }

    /// The place where the text ends, all of which must have been run.
    ///
    /// # Errors
    /// A fault of the device; [`Error::Cancelled`].
    pub(crate) fn place(&mut self) -> Result<Place> {
        self.settle();
        let mut images = Vec::new();
        let length = self.tokens.len();
        if !self.shape.policy.is_dense() && length > 0 {
            for layer in 0..self.model.config().layers {
                if self.cancel.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                images.push(self.decoder.save(layer)?);
            }
        }
        Ok(Place { length, images: images.into() })
    }

    /// Goes back to a place from which `next` tokens of a prompt follow, or decoding where there are
    /// none, and does all that this takes; says whether the cache had to be restored, because the
    /// original keys that are needed had been overwritten.
    ///
    /// # Errors
    /// A fault of the device.
    pub(crate) fn go_back(&mut self, place: &Place, next: usize) -> Result<bool> {
        self.truncate(place.length);
        let phase = match next {
            0 => Phase::Decode,
            _ => Phase::Prefill { length: place.length + next },
        };
        let restored = !self.decoder.can_continue(phase) && !place.images.is_empty();
        if restored {
            self.decoder.truncate(0);
            self.decoder.restore(&place.images)?;
        }
        self.decoder.settle()?;
        self.decoder.wait()?;
        Ok(restored)
    }
}

#[cfg(all(test, feature = "demo"))]
mod tests {
    use super::*;
    use crate::{DeviceChoice, Model, ModelOptions, SessionOptions};

    /// A text that goes on from a place gives the same logits each time, also where its original keys
    /// had been overwritten.
    #[test]
    fn a_place_is_the_same_each_time() {
        let options = ModelOptions { device: DeviceChoice::Cpu, ..ModelOptions::default() };
        let model = Model::embedded(&options).expect("the model inside");
        for policy in ["dense", "delta page=16 window=16", "paper page=16", "keys=int8 values=int4"]
        {
            let attention = policy.parse().expect("a policy");
            let options = SessionOptions { attention, ..SessionOptions::default() };
            let mut session = Session::new(&model, &options).expect("a session");
            let ids: Vec<u32> = (0..800).map(|i| 3 + i * 7 % 1000).collect();
            session.fill(&ids[..100]).expect("runs");
            session.fill(&ids[100..150]).expect("runs");
            assert_eq!(session.tokens().len(), 150);
            let place = session.place().expect("a place");
            let first = session.evaluate(&ids[150..750]).expect("logits");
            let restored = session.go_back(&place, 600).expect("back");
            assert_eq!(restored, !session.policy().is_dense(), "{policy}");
            assert_eq!(session.evaluate(&ids[150..750]).expect("logits"), first, "{policy}");
            session.go_back(&place, 0).expect("back");
            let decoded = session.evaluate(&ids[150..151]).expect("logits");
            assert!(!session.go_back(&place, 0).expect("back"), "{policy}");
            assert_eq!(session.evaluate(&ids[150..151]).expect("logits"), decoded, "{policy}");
        }
    }
}
