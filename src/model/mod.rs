//! A model on a device, and the forward pass that runs it.
//!
//! [`Model::open`] chooses the device, brings the weights to it and is then shared by any number
//! of [`Session`](crate::Session)s. The pass itself is `Transformer::forward` in
//! `transformer.rs`: one function for every architecture, written against
//! [`Operations`](crate::backend::Operations).

mod device;
mod journal;
mod memory;
mod not_finite;
mod placement;
mod probe;
mod steady;
mod transformer;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use device::DeviceChoice;
pub use memory::{MemoryUse, plan_memory};

use crate::backend::{Backend, DeviceInfo, Input, MatrixFormat, ReadSpeed};
use crate::bench::{Observed, Observer};
use crate::checkpoint::{Checkpoint, ModelConfig};
use crate::cpu::Cpu;
use crate::delta::{AttentionPolicy, CacheImage, Page, Phase, Thresholds};
use crate::error::Result;
use crate::gpu::GpuOptions;
use crate::reference::Reference;
use crate::sampler::SampleStep;
use crate::session::Cancel;
use crate::tokenizer::Tokenizer;
use placement::Placement;
use steady::Steady;
pub(crate) use transformer::Transformer;

/// How far a model has been loaded.
#[derive(Clone, Copy, Debug)]
pub struct LoadProgress {
    /// Bytes of the checkpoint that are on the device.
    pub bytes: u64,
    /// Bytes of the checkpoint.
    pub total: u64,
}

/// In which format float weights are kept on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum WeightFormat {
    /// As they are stored: bf16, f16 or f32.
    #[default]
    Stored,
    /// 8 bits in blocks of [`Q8_BLOCK`](crate::backend::Q8_BLOCK): about half of bf16. Ternary
    /// matrices stay ternary; embedding and head become 8 bits.
    Q8,
    /// 4 bits in blocks of as many, where rows are whole blocks, else 8: about a quarter of bf16.
    /// Ternary matrices stay ternary. Rounding to 4 bits costs accuracy.
    Q4,
}

/// How to open a model. `ModelOptions::default()` is right for most.
#[derive(Clone, Debug, Default)]
pub struct ModelOptions {
    /// Which device to run on.
    pub device: DeviceChoice,
    /// Format of float weights.
    pub weights: WeightFormat,
    /// Threads of the CPU backend; `None` takes every core.
    pub threads: Option<usize>,
    /// What the GPU backend may use.
    pub gpu: GpuOptions,
}

/// A model whose weights lie on a device. Cheap to clone; clones share the weights.
///
/// # Lost devices
///
/// A GPU may go away while it works: its driver is reset, it is unplugged, it runs out of memory, or
/// it hangs for longer than [`GpuOptions::time_limit`]. The call that finds this opens the adapter
/// again, loads the weights from the checkpoint's files, which stay open for that, and goes on; so
/// does each session with its own text, see [`Session`](crate::Session#lost-devices). A warning is
/// logged. Where the adapter does not come back, or is lost for a third time within one call, that
/// call fails with [`Error::DeviceNotRestored`](crate::Error::DeviceNotRestored), and the next one
/// tries again; where no device was asked for by name, [`DeviceChoice::Auto`], the CPU takes over
/// instead, and [`Model::device`] and [`Model::fallback`] say so from then on.
///
/// A device that is lost while the model is opened is an error at once, and one that is lost while it
/// is measured, in [`Bench`](crate::bench::Bench), too.
#[derive(Clone)]
pub struct Model {
    placement: Arc<Placement>,
    tokenizer: Arc<Tokenizer>,
    fallback: Option<Arc<str>>,
    load_time: Duration,
}

impl Model {
    /// Opens a model directory with its weights on the device of `options`.
    ///
    /// # Errors
    /// A file, field, tensor or shape that is wrong; no such device; too little device memory.
    pub fn open(dir: impl AsRef<Path>, options: &ModelOptions) -> Result<Self> {
        Self::open_with_progress(dir, options, |_| ControlFlow::Continue(()))
    }

    /// [`Model::open`], telling `progress` after each tensor how far it is; `Break` makes it stop
    /// with [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn open_with_progress(
        dir: impl AsRef<Path>,
        options: &ModelOptions,
        progress: impl FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Self> {
        Self::open_checkpoint(Checkpoint::open(dir)?, options, progress)
    }

    /// [`Model::open_with_progress`] of a checkpoint that is open already, or in memory.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_checkpoint(
        checkpoint: Checkpoint,
        options: &ModelOptions,
        progress: impl FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Self> {
        Self::open_observed(checkpoint, options, None, progress)
    }

    /// [`Model::open_checkpoint`]; what its operations cost is left with an `observer`.
    pub(crate) fn open_observed(
        checkpoint: Checkpoint,
        options: &ModelOptions,
        observer: Option<&Arc<Observer>>,
        mut progress: impl FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Self> {
        let start = Instant::now();
        let tokenizer = Tokenizer::open(&checkpoint)?;
        let weights = options.weights;
        let mut fallback = None;
        let engine: Arc<dyn Engine> = match device::open(options)? {
            device::Opened::Reference => {
                load(Reference::new(), &checkpoint, weights, observer, &mut progress)?
            }
            device::Opened::Cpu(cpu, reason) => {
                fallback = reason;
                load(cpu, &checkpoint, weights, observer, &mut progress)?
            }
            device::Opened::Gpu(gpu) => {
                let name = gpu.device().name.clone();
                match load(gpu, &checkpoint, weights, observer, &mut progress) {
                    // A GPU that was not asked for by name, and that cannot hold the model or
                    // computes nonsense, is no reason to give up. Some drivers lose a device that has
                    // no memory left.
                    Err(error)
                        if options.device == DeviceChoice::Auto
                            && (error.is_lost_device()
                                || error.is_too_small_a_device()
                                || error.is_wrong_device()) =>
                    {
                        log::warn!("{name}: {error}");
                        fallback = Some(match error.is_wrong_device() {
                            true => format!("the GPU is wrong ({error})"),
                            false => format!("the model does not fit on the GPU ({error})"),
                        });
                        let cpu = Cpu::new(options.threads)?;
                        load(cpu, &checkpoint, weights, observer, &mut progress)?
                    }
                    loaded => loaded?,
                }
            }
        };
        let placement = Placement::new(checkpoint, options, engine, observer.is_some());
        Ok(Self {
            placement: Arc::new(placement),
            tokenizer: Arc::new(tokenizer),
            fallback: fallback.map(Into::into),
            load_time: start.elapsed(),
        })
    }

    /// What the checkpoint's configuration says.
    pub fn config(&self) -> &ModelConfig {
        &self.placement.checkpoint.config
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The device that the weights lie on.
    pub fn device(&self) -> &DeviceInfo {
        self.placement.device()
    }

    /// Why the model runs on the CPU although no device was asked for by name.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref().or_else(|| self.placement.moved())
    }

    /// Time that [`Model::open`] took.
    pub fn load_time(&self) -> Duration {
        self.load_time
    }

    /// Bytes of the weights on the device.
    pub fn weight_bytes(&self) -> u64 {
        self.engine().weight_bytes()
    }

    /// Bytes held on the model's device, its weights and all of its sessions: what is left when those
    /// are gone is as it was before them. `None` where nobody counts, as on the CPU.
    pub fn device_bytes(&self) -> Option<u64> {
        self.engine().device_bytes()
    }

    /// The device that a model with these options would lie on, which is opened and closed again.
    ///
    /// # Errors
    /// No such device, or a driver that refuses.
    pub fn device_of(options: &ModelOptions) -> Result<DeviceInfo> {
        Ok(match device::open(options)? {
            device::Opened::Reference => Reference::new().device().clone(),
            device::Opened::Cpu(cpu, _) => cpu.device().clone(),
            device::Opened::Gpu(gpu) => gpu.device().clone(),
        })
    }

    #[cfg(feature = "chat")]
    pub(crate) fn files(&self) -> &crate::checkpoint::Files {
        &self.placement.checkpoint.files
    }

    /// Of the device that the model is on now.
    pub(crate) fn engine(&self) -> Arc<dyn Engine> {
        self.placement.current().1
    }

    /// Makes the caches and activations of a session.
    pub(crate) fn start(&self, shape: SessionShape) -> Result<Box<dyn Decoder>> {
        if self.placement.recovers {
            return Ok(Box::new(Steady::start(&self.placement, shape)?));
        }
        self.engine().start(shape)
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("config", self.config())
            .field("device", self.device())
            .finish_non_exhaustive()
    }
}

fn load<B: Backend>(
    backend: B,
    checkpoint: &Checkpoint,
    weights: WeightFormat,
    observer: Option<&Arc<Observer>>,
    progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
) -> Result<Arc<dyn Engine>> {
    Ok(match observer {
        None => Arc::new(Transformer::load(backend, checkpoint, weights, progress)?),
        Some(observer) => {
            let backend = Observed::new(backend, Arc::clone(observer));
            Arc::new(Transformer::load(backend, checkpoint, weights, progress)?)
        }
    })
}

/// What a step is to make beside its cache entries.
#[derive(Clone, Copy)]
pub(crate) enum Output<'a> {
    /// Nothing: more of the prompt follows.
    Nothing,
    /// A token after the last one, chosen on the device.
    Sample(&'a SampleStep<'a>),
    /// The logits of the last token.
    LastLogits,
    /// The logits of every token of the step.
    AllLogits,
}

/// Tokens of a prompt that run through the layers together.
///
/// Enough to use the device well; small enough that a step stays below a second on an integrated
/// GPU and that activations take megabytes.
pub(crate) const PREFILL_CHUNK: usize = 256;

/// Tokens a step where the logits of each are wanted: 32 rows of 128,256 logits take 16 MB.
pub(crate) const LOGITS_CHUNK: usize = 32;

/// How large a session may get.
#[derive(Clone, Debug)]
pub(crate) struct SessionShape {
    /// Tokens that the cache holds.
    pub context: usize,
    /// Tokens of the largest step.
    pub chunk: usize,
    /// Tokens of a step whose logits can be wanted.
    pub logit_rows: usize,
    /// How keys and values are kept.
    pub policy: AttentionPolicy,
    /// Of the model's layers and KV heads.
    pub thresholds: Option<Thresholds>,
}

impl SessionShape {
    pub(crate) fn new(context: usize, policy: AttentionPolicy) -> Self {
        let chunk = PREFILL_CHUNK.min(context);
        Self { context, chunk, logit_rows: 1, policy, thresholds: None }
    }
}

/// A [`Transformer`] on some backend.
pub(crate) trait Engine: Send + Sync {
    fn device(&self) -> &DeviceInfo;
    fn weight_bytes(&self) -> u64;
    fn device_bytes(&self) -> Option<u64>;
    fn max_top_k(&self) -> usize;
    fn look_ahead(&self) -> usize;
    fn read_speed(&self, bytes: u64) -> Result<ReadSpeed>;
    fn multiply_speed(&self, format: MatrixFormat) -> Result<f64>;
    /// See [`Backend::can_be_lost`].
    fn can_be_lost(&self) -> bool;
    /// See [`Backend::give_up`].
    fn give_up(&self);
    /// Makes the caches and activations of a session.
    fn start(self: Arc<Self>, shape: SessionShape) -> Result<Box<dyn Decoder>>;
}

/// What [`Decoder::probe`] gives a layer's queries, keys and values to.
pub(crate) type Probe<'a> = &'a mut dyn FnMut(usize, &[f32]) -> Result<()>;

/// A session's run of a [`Transformer`] on some backend.
pub(crate) trait Decoder: Send {
    /// Tokens in the cache.
    fn length(&self) -> usize;
    /// Cuts the cache back to at most its first `length` tokens.
    fn truncate(&mut self, length: usize);
    /// Does now what [`Decoder::truncate`] has put off until the next step.
    fn settle(&mut self) -> Result<()>;
    /// Whether the original keys that the next token of a phase sees are all still there: those of
    /// a compressed cache are overwritten in time, and a text cut far back has to be run again.
    fn can_continue(&self, phase: Phase) -> bool;
    /// Takes original keys before a position as overwritten, as they were in another cache of the
    /// same text.
    fn forget_originals(&mut self, from: usize);
    /// Appends tokens: at least one, at most a chunk, all in the vocabulary, within the context. Where
    /// they are given, the steps since the last given ones must have had their tokens read, or have
    /// been cut off.
    fn forward(&mut self, input: Input<'_>, phase: Phase, output: Output<'_>) -> Result<()>;
    /// The same without any output; `probe` gets each layer's index and its queries, keys and
    /// values, `[T, (H + 2 G) D]`, of which the queries are rotated. Where a device was lost on the
    /// way it gets them again, from the first layer on.
    fn probe(&mut self, tokens: &[u32], phase: Phase, probe: Probe<'_>) -> Result<()>;
    /// Runs a text from its beginning, and says in words where it first holds NaN or infinity; nothing
    /// where it does not. The cache is empty then.
    fn find_not_finite(&mut self, tokens: &[u32], cancel: &Cancel) -> Result<Option<String>>;
    /// The compressed pages of each layer, `[layers][G][pages]`.
    fn pages(&mut self) -> Result<Vec<Vec<Vec<Page>>>>;
    /// All that is in the cache of a layer.
    fn save(&mut self, layer: usize) -> Result<CacheImage>;
    /// Puts into an empty cache what [`Decoder::save`] has read of each layer.
    fn restore(&mut self, images: &Arc<[CacheImage]>) -> Result<()>;
    /// Waits until the device has done all steps.
    fn wait(&mut self) -> Result<()>;
    /// Waits for the token of the first [`Output::Sample`] that was not read.
    fn token(&mut self) -> Result<u32>;
    /// Waits for the logits of the last step, `[rows, vocabulary]`.
    fn logits(&mut self) -> Result<Vec<f32>>;
    /// Bytes held on the device.
    fn memory(&self) -> MemoryUse;
    /// What stops it while it takes up a text on another device.
    fn cancel_with(&mut self, _cancel: &Cancel) {}
}
