//! A session's decoder that outlives its device.

use std::sync::Arc;
use std::time::Instant;

use super::journal::Journal;
use super::placement::Placement;
use super::{Decoder, MemoryUse, Output, Probe, SessionShape};
use crate::backend::Input;
use crate::delta::{CacheImage, Originals, Page, Phase};
use crate::error::{Error, Result};
use crate::session::Cancel;

/// How often one call may lose its device and go on on the same one, opened again.
const ATTEMPTS: u32 = 2;

/// A decoder on whatever device the model is: where that is lost, the model gets another one, the
/// cache is made again as it was made, and the call that has failed is made once more.
///
/// That takes as long as the steps of the text took in all: a prompt runs chunk by chunk, what was
/// decoded runs token by token, because anything else could change the cache, and with it the text.
pub(super) struct Steady {
    placement: Arc<Placement>,
    shape: SessionShape,
    /// The generation of the device that `run` is on.
    generation: u64,
    /// Nothing where a device was lost, until another one has been made ready.
    run: Option<Box<dyn Decoder>>,
    /// Until all is restored.
    lost: Option<Lost>,
    journal: Journal,
    originals: Originals,
    cancel: Cancel,
}

/// A device that was lost.
struct Lost {
    generation: u64,
    /// What its error said.
    how: String,
}

impl Steady {
    pub(super) fn start(placement: &Arc<Placement>, shape: SessionShape) -> Result<Self> {
        let mut steady = Self {
            placement: Arc::clone(placement),
            generation: 0,
            run: None,
            lost: None,
            journal: Journal::new(),
            originals: Originals::new(&shape.policy, shape.context, shape.chunk),
            cancel: Cancel::default(),
            shape,
        };
        match steady.steadily(|_| Ok(())) {
            // What the session asks of it the device computes wrongly.
            Err(why) if why.is_wrong_device() && placement.may_move() => {
                placement.leave(steady.generation, &why, &steady.cancel)?;
                steady.steadily(|_| Ok(()))?;
            }
            started => started?,
        }
        Ok(steady)
    }

    /// Makes a call, and makes it again where it has lost its device, as often as is sensible.
    fn steadily<T>(&mut self, mut call: impl FnMut(&mut dyn Decoder) -> Result<T>) -> Result<T> {
        let mut attempts = 0;
        loop {
            let error = match self.ready(attempts > ATTEMPTS).and_then(&mut call) {
                Err(error) if error.is_lost_device() => error,
                Err(reason) if self.run.is_none() => return Err(self.not_ready(reason)),
                done => return done,
            };
            self.run = None;
            let how = self.lost.take().map_or_else(|| error.to_string(), |lost| lost.how);
            self.lost = Some(Lost { generation: self.generation, how });
            if attempts >= ATTEMPTS && !self.placement.may_move() {
                return Err(self.not_ready(error));
            }
            attempts += 1;
        }
    }

    /// The error where there is no decoder, for this reason.
    fn not_ready(&self, reason: Error) -> Error {
        match (&self.lost, reason) {
            (_, Error::Cancelled) => Error::Cancelled,
            (Some(Lost { how, .. }), reason) => {
                Error::DeviceNotRestored { lost: how.clone(), reason: Box::new(reason) }
            }
            // A session that is being made, or that follows another one to its new device.
            (None, reason) => reason,
        }
    }

    /// The decoder on the model's device, which is made again where there is none; on the CPU if it
    /// must.
    fn ready(&mut self, on_cpu: bool) -> Result<&mut dyn Decoder> {
        if self.generation != self.placement.generation() {
            // Another session has found the device lost.
            self.run = None;
        }
        let run = match self.run.take() {
            Some(run) => run,
            None => self.rebuild(on_cpu)?,
        };
        Ok(&mut **self.run.insert(run))
    }

    fn rebuild(&mut self, on_cpu: bool) -> Result<Box<dyn Decoder>> {
        let start = Instant::now();
        if let Some(Lost { generation, how }) = &self.lost {
            self.placement.restore(*generation, how, on_cpu, &self.cancel)?;
        }
        let (generation, engine) = self.placement.current();
        self.generation = generation;
        let mut run = engine.start(self.shape.clone())?;
        self.journal.replay(&mut *run, &self.cancel)?;
        run.forget_originals(self.originals.from());
        if let Some(Lost { how, .. }) = self.lost.take() {
            let (tokens, seconds) = (self.journal.length(), start.elapsed().as_secs_f64());
            log::warn!("{how}; model and {tokens} tokens of text were restored in {seconds:.1} s");
        }
        Ok(run)
    }
}

impl Decoder for Steady {
    fn length(&self) -> usize {
        self.journal.length()
    }

    fn truncate(&mut self, length: usize) {
        self.journal.truncate(length);
        if length == 0 {
            self.originals.restart(0);
        }
        if let Some(run) = &mut self.run {
            run.truncate(length);
        }
    }

    fn settle(&mut self) -> Result<()> {
        self.steadily(|run| run.settle())
    }

    fn can_continue(&self, phase: Phase) -> bool {
        let policy = &self.shape.policy;
        self.originals.can_continue(policy, phase, self.journal.length())
    }

    fn forget_originals(&mut self, from: usize) {
        self.originals.forget(from);
        if let Some(run) = &mut self.run {
            run.forget_originals(from);
        }
    }

    fn forward(&mut self, input: Input<'_>, phase: Phase, output: Output<'_>) -> Result<()> {
        self.originals.write_until(self.journal.length() + input.count());
        self.steadily(|run| run.forward(input, phase, output))?;
        self.journal.record(input, phase, output)
    }

    fn probe(&mut self, tokens: &[u32], phase: Phase, probe: Probe<'_>) -> Result<()> {
        self.originals.write_until(self.journal.length() + tokens.len());
        self.steadily(|run| run.probe(tokens, phase, probe))?;
        self.journal.record(Input::Tokens(tokens), phase, Output::Nothing)
    }

    fn find_not_finite(&mut self, tokens: &[u32], cancel: &Cancel) -> Result<Option<String>> {
        self.truncate(0);
        self.steadily(|run| run.find_not_finite(tokens, cancel))
    }

    fn pages(&mut self) -> Result<Vec<Vec<Vec<Page>>>> {
        self.steadily(|run| run.pages())
    }

    fn save(&mut self, layer: usize) -> Result<CacheImage> {
        self.steadily(|run| run.save(layer))
    }

    fn restore(&mut self, images: &Arc<[CacheImage]>) -> Result<()> {
        self.steadily(|run| run.restore(images))?;
        self.journal.restored(images);
        self.originals.restart(images.last().map_or(0, |image| image.exact_from));
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        self.steadily(|run| run.wait())
    }

    fn token(&mut self) -> Result<u32> {
        let token = self.steadily(|run| run.token());
        match &token {
            Ok(token) => self.journal.read(Some(*token)),
            Err(Error::NotFinite { .. }) => self.journal.read(None),
            Err(_) => {}
        }
        token
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        self.steadily(|run| run.logits())
    }

    fn memory(&self) -> MemoryUse {
        self.run.as_ref().map(|run| run.memory()).unwrap_or_default()
    }

    fn cancel_with(&mut self, cancel: &Cancel) {
        self.cancel = cancel.clone();
    }
}
