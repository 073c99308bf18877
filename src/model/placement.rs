//! Where the weights of a model lie, and how they get to a device again after theirs was lost.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::device::Opened;
use super::{DeviceChoice, Engine, ModelOptions, device, load};
use crate::backend::{Backend, DeviceInfo};
use crate::checkpoint::Checkpoint;
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::session::Cancel;

/// How often a lost device is looked for before it counts as gone.
const OPENINGS: u32 = 3;

/// Time between two of these: a driver that resets its device takes about a second.
const PAUSE: Duration = Duration::from_millis(500);

/// The weights on a device, and all that is needed to bring them to one again: the checkpoint, whose
/// files stay open and are mapped anew when they are read.
pub(super) struct Placement {
    pub checkpoint: Checkpoint,
    options: ModelOptions,
    /// Whether a lost device is replaced. What is being measured would rather fail.
    pub recovers: bool,
    /// How many devices were lost before the engine's.
    generation: AtomicU64,
    engine: Mutex<Arc<dyn Engine>>,
    device: DeviceInfo,
    /// The CPU, where the model has gone on there, and why.
    moved: OnceLock<(DeviceInfo, String)>,
}

impl Placement {
    pub(super) fn new(
        checkpoint: Checkpoint,
        options: &ModelOptions,
        engine: Arc<dyn Engine>,
        observed: bool,
    ) -> Self {
        Self {
            checkpoint,
            options: options.clone(),
            recovers: engine.can_be_lost() && !observed,
            generation: AtomicU64::new(0),
            device: engine.device().clone(),
            engine: Mutex::new(engine),
            moved: OnceLock::new(),
        }
    }

    /// The device that the weights lie on. One that is opened in place of a lost one is the same.
    pub(super) fn device(&self) -> &DeviceInfo {
        self.moved.get().map_or(&self.device, |(device, _)| device)
    }

    /// Why the model has gone on on the CPU.
    pub(super) fn moved(&self) -> Option<&str> {
        self.moved.get().map(|(_, reason)| &reason[..])
    }

    fn lock(&self) -> MutexGuard<'_, Arc<dyn Engine>> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine, and the generation of its device. Waits where the weights are being brought to
    /// another one.
    pub(super) fn current(&self) -> (u64, Arc<dyn Engine>) {
        let engine = self.lock();
        (self.generation(), Arc::clone(&engine))
    }

    /// How many devices were lost before this one.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Replaces the device of a generation, unless another session has done so already.
    ///
    /// `lost` says how it was lost. `on_cpu` does not look for the device again, which was lost too
    /// often.
    ///
    /// # Errors
    /// Why it cannot be replaced; [`Error::Cancelled`].
    pub(super) fn restore(
        &self,
        generation: u64,
        lost: &str,
        on_cpu: bool,
        cancel: &Cancel,
    ) -> Result<()> {
        let mut engine = self.lock();
        if self.generation() != generation {
            return Ok(());
        }
        engine.give_up();
        *engine = if on_cpu {
            self.move_lost_to_cpu(lost, "it was lost again and again", cancel)?
        } else {
            match self.reopen(cancel) {
                Err(reason) if self.may_move() && does_not_come_back(&reason) => {
                    self.move_lost_to_cpu(lost, &reason.to_string(), cancel)?
                }
                engine => engine?,
            }
        };
        self.generation.store(generation + 1, Ordering::Release);
        Ok(())
    }

    /// Has the model go on on the CPU, since the device of a generation computes something wrongly; not
    /// where another session has done so already.
    ///
    /// # Errors
    /// As [`Placement::restore`].
    pub(super) fn leave(&self, generation: u64, why: &Error, cancel: &Cancel) -> Result<()> {
        let mut engine = self.lock();
        if self.generation() != generation {
            return Ok(());
        }
        engine.give_up();
        log::warn!("{why}: the model goes on on the CPU");
        *engine = self.move_to_cpu(format!("the GPU is wrong ({why})"), cancel)?;
        self.generation.store(generation + 1, Ordering::Release);
        Ok(())
    }

    /// Opens the same adapter again, on which the text will be the same, and loads the weights.
    fn reopen(&self, cancel: &Cancel) -> Result<Arc<dyn Engine>> {
        let device = DeviceChoice::Named(self.device.name.clone());
        let options = ModelOptions { device, ..self.options.clone() };
        for opening in 1.. {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            match device::open(&options) {
                Ok(Opened::Gpu(gpu)) => return self.load(gpu, cancel),
                Ok(_) => break,
                Err(error) if opening == OPENINGS => return Err(error),
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
        // Nothing but a GPU has a name.
        Err(Error::NoAdapter { wanted: self.device.name.clone(), found: Vec::new() })
    }

    /// Whether the CPU may take over: as where a model is opened, only if no device was asked for.
    pub(super) fn may_move(&self) -> bool {
        self.options.device == DeviceChoice::Auto && self.moved.get().is_none()
    }

    fn move_lost_to_cpu(
        &self,
        lost: &str,
        reason: &str,
        cancel: &Cancel,
    ) -> Result<Arc<dyn Engine>> {
        let engine = self.move_to_cpu(format!("the GPU was lost ({lost}; {reason})"), cancel)?;
        log::warn!("{lost}; {reason}: the model goes on on the CPU");
        Ok(engine)
    }

    fn move_to_cpu(&self, reason: String, cancel: &Cancel) -> Result<Arc<dyn Engine>> {
        let engine = self.load(Cpu::new(self.options.threads)?, cancel)?;
        // It cannot have moved before: the CPU is never lost.
        let _ = self.moved.set((engine.device().clone(), reason));
        Ok(engine)
    }

    fn load<B: Backend>(&self, backend: B, cancel: &Cancel) -> Result<Arc<dyn Engine>> {
        self.checkpoint.tensors.check_unchanged()?;
        let mut progress = |_| match cancel.is_cancelled() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        load(backend, &self.checkpoint, self.options.weights, None, &mut progress)
    }
}

/// Whether trying again is in vain. What loses a device while it is loaded may lose it once only.
fn does_not_come_back(reason: &Error) -> bool {
    !matches!(reason, Error::Cancelled) && !reason.is_lost_device()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::DeviceKind;
    use crate::gpu::{Fault, Faults, Gpu, GpuOptions, Sabotage, Select};
    use crate::model::Model;
    use crate::tokenizer::Tokenizer;
    use crate::{GenerateOptions, Session, SessionOptions};

    /// A model on the first adapter as if nobody had asked for that one; by name only would a software
    /// adapter be taken.
    fn automatic(gpu: GpuOptions) -> Model {
        let dir = format!("{}/tests/fixtures/llama-32", env!("CARGO_MANIFEST_DIR"));
        let checkpoint = Checkpoint::open(dir).expect("a fixture");
        let tokenizer = Arc::new(Tokenizer::open(&checkpoint).expect("a tokenizer"));
        let gpu = GpuOptions { select: Select::Named(String::new()), ..gpu };
        let options = ModelOptions { gpu, ..ModelOptions::default() };
        let gpu = Gpu::open(&options.gpu).expect("an adapter");
        let keep_on = &mut |_| ControlFlow::Continue(());
        let engine = load(gpu, &checkpoint, options.weights, None, keep_on).expect("it loads");
        let placement = Arc::new(Placement::new(checkpoint, &options, engine, false));
        Model { placement, tokenizer, fallback: None, load_time: Duration::ZERO }
    }

    /// What a session asks for shows only when it begins.
    #[test]
    fn the_cpu_takes_over_what_the_gpu_computes_wrongly() {
        let sabotage = Sabotage(vec!["attention_tiled".into()]);
        let model = automatic(GpuOptions { sabotage, ..GpuOptions::default() });
        assert_ne!(model.device().kind, DeviceKind::Cpu);
        let mut session = Session::new(&model, &SessionOptions::default()).expect("on the CPU");
        assert_eq!(model.device().kind, DeviceKind::Cpu);
        let reason = model.fallback().expect("a reason");
        assert!(reason.contains("attention"), "{reason}");
        let pieces = session.generate(&[5, 6, 7], &GenerateOptions::default()).expect("a prompt");
        assert!(pieces.filter(|piece| piece.is_ok()).count() > 1);
    }

    #[test]
    fn the_cpu_takes_over_where_no_device_was_asked_for() {
        // Gone, and lost again and again.
        for gone in [true, false] {
            let faults = Faults::possible();
            let (faults_of_it, self_test) = (faults.clone(), false);
            let gpu = GpuOptions { faults: faults_of_it, self_test, ..GpuOptions::default() };
            let model = automatic(gpu);
            let mut session = Session::new(&model, &SessionOptions::default()).expect("a session");
            let options = GenerateOptions { ignore_eos: true, ..GenerateOptions::default() };
            let mut pieces = session.generate(&[5, 6, 7], &options).expect("prompt");
            assert_eq!(pieces.by_ref().take(9).filter(|piece| piece.is_ok()).count(), 9);
            assert!(model.fallback().is_none() && model.device().kind != DeviceKind::Cpu);
            if gone {
                faults.inject(Fault::Lost, 0, 1);
                faults.inject(Fault::Gone, 0, u64::MAX);
            } else {
                faults.inject(Fault::LostUnnoticed, 0, u64::MAX);
            }
            let tokens: Vec<u32> = pieces.filter_map(|p| p.expect("a piece").token).collect();
            assert_eq!(tokens.len(), options.max_tokens - 9);
            assert_eq!(model.device().kind, DeviceKind::Cpu);
            let reason = model.fallback().expect("a reason");
            assert!(reason.contains("lost"), "{reason}");
            drop(session);
            assert_eq!(faults.held(), 0);
            assert!(Session::new(&model, &SessionOptions::default()).is_ok());
        }
    }
}
