//! What a device must offer: the few fused operations that a decoder layer is made of.
//!
//! The forward pass ([`crate::model`]) is written once against these traits. Three backends
//! implement them: [`crate::gpu::Gpu`] in WGSL, [`crate::cpu::Cpu`] with threads and SIMD, and
//! [`crate::reference::Reference`], which is written to be read and is the yardstick of the
//! other two.
//!
//! A [`Backend`] belongs to a device and is shared by all sessions; it makes weights, activations
//! and caches. A [`Operations`] stream belongs to one session and runs the operations in order.
//! On a GPU they are only recorded until [`Operations::submit`]; the results are read after it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::checkpoint::MatrixSource;
use crate::delta::{AttentionPolicy, CacheImage, Page, Phase};
use crate::error::Result;
pub use crate::formats::{
    ACTIVATION_STEP, Activation, AttentionShape, CacheFormat, FIXED_COLS, FIXED_TOKENS,
    MatrixFormat, Q8_BLOCK, WEIGHT_STEP,
};
use crate::sampler::SampleStep;

/// The number format of an activation tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorFormat {
    /// One `f32` an element.
    F32,
    /// BitNet's activations: one `i8` an element and one scale a row, `x ~ i8 * scale`.
    ///
    /// With `m = max(max |x|, 1e-5)` over the row, the element is
    /// `clamp(round_half_even(x * (127 / m)), -128, 127)` and the scale is `m / 127`
    /// (`BitLinear` of <https://arxiv.org/abs/2402.17764>, as in transformers).
    Int8,
}

/// What one session needs of its stream: how large anything it is asked can get.
#[derive(Clone, Copy, Debug)]
pub struct StreamShape {
    /// Tokens of the largest chunk.
    pub rows: usize,
    /// Tokens that the cache can hold.
    pub context: usize,
    /// The attention's shape.
    pub attention: AttentionShape,
    /// Width of the logits.
    pub vocabulary: usize,
}

/// What a model will be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelPlan {
    /// Of the token table.
    pub embedding: MatrixFormat,
    /// Of the matrices of a layer: those that read the residual stream, the output projection and the
    /// down projection. Widths decide whether rows can be quantised in blocks.
    pub body: [MatrixFormat; 3],
    /// Of the output head.
    pub head: MatrixFormat,
    /// Between gate and up projection.
    pub activation: Activation,
    /// Width between gate and down projection.
    pub intermediate: usize,
}

/// What a cache is made for.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheShape {
    /// The attention's shape.
    pub attention: AttentionShape,
    /// Tokens that it can hold. They are not reserved: memory grows with the text.
    pub context: usize,
    /// Tokens of the largest step.
    pub rows: usize,
    /// How keys and values are kept.
    pub policy: AttentionPolicy,
    /// The layer's row of [`Thresholds`](crate::delta::Thresholds), `[G]`, in place of the policy's
    /// one.
    pub thresholds: Option<Arc<[f32]>>,
}

/// The tokens of a step.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// These ids, within the vocabulary; at least one, at most [`StreamShape::rows`].
    Tokens(&'a [u32]),
    /// One token: the one that was sampled last, wherever it is. It need not have been read yet.
    Sampled,
}

impl Input<'_> {
    /// How many tokens these are.
    pub fn count(&self) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Sampled => 1,
        }
    }
}

/// What the operations of a step are about.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Its tokens.
    pub input: Input<'a>,
    /// Where the first of them stands in the text; the last must be within the context.
    pub position: usize,
    /// Which of the policy's windows holds.
    pub phase: Phase,
}

/// Bytes held on the device, or in host memory for a CPU backend.
pub trait Footprint {
    /// Bytes held, padding included.
    fn bytes(&self) -> u64;
}

/// Bytes held by a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct CacheBytes {
    /// Compressed pages, original keys, and what is needed to find them.
    pub keys: u64,
    /// Values with their scales.
    pub values: u64,
}

/// How keys and values lie in memory, for counting what an attention reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct CacheRows {
    /// Bytes of a token's original keys, all KV heads.
    pub key: u64,
    /// Bytes of a token's values with their scales, all KV heads.
    pub value: u64,
    /// Compressed pages, those of all KV heads counted as one.
    pub pages: u64,
    /// Bytes of these pages. A GPU tells them a step later: until then its last pages count as their
    /// headers alone.
    pub page_bytes: u64,
}

/// Keys and values of one layer.
pub trait KeyValueCache {
    /// Bytes held, padding and room to grow included.
    fn held(&self) -> CacheBytes;

    /// How its keys and values lie in memory.
    fn rows(&self) -> CacheRows;
}

/// What a stream has had its device do since it was made. All zero where operations are plain calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Activity {
    /// Kernels launched.
    pub launches: u64,
    /// Submissions to the device's queue.
    pub submissions: u64,
    /// Bytes that the host has read back.
    pub readback_bytes: u64,
}

/// How long the device was busy with one launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KernelTime {
    /// The kernel's name, that of its file under `shaders/`.
    pub kernel: &'static str,
    /// By the device's own clock.
    pub time: Duration,
}

/// How fast a device reads memory that no cache holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReadSpeed {
    /// Bytes a second, the best of several passes.
    pub bytes_per_second: f64,
    /// Bytes of a pass.
    pub bytes: u64,
    /// The wrapping sum of the `u32` that were read: that of [`read_pattern`], or something was left
    /// out.
    pub sum: u32,
}

/// Word `n` of the memory that [`Backend::read_speed`] reads.
pub fn read_pattern(n: u32) -> u32 {
    n.wrapping_mul(0x9e37_79b9) ^ 0x5bd1_e995
}

/// A device: makes what a model and its sessions hold.
///
/// Weights are immutable and shared. Activations and caches belong to one session.
pub trait Backend: Sized + Send + Sync + 'static {
    /// A weight matrix `[out, in]`, or several stacked over `out` that share their input.
    type Linear: Footprint + Send + Sync;
    /// An RMSNorm: its weight `[width]` and epsilon.
    type Norm: Footprint + Send + Sync;
    /// The rotary table: cosine and sine of each position and pair.
    type Rope: Footprint + Send + Sync;
    /// Activations `[rows, width]`; `rows` is set by the operation that writes it.
    type Tensor: Footprint + Send;
    /// Keys and values of one layer.
    type Cache: KeyValueCache + Send;
    /// Where a session's operations run; its footprint is what they need beside their tensors.
    type Stream: Operations<Self> + Footprint;

    /// Which device this is.
    fn device(&self) -> &DeviceInfo;

    /// Bytes of all that lies on the device and was made by this backend or a clone of it, whoever
    /// owns it; `None` where nobody counts.
    fn held(&self) -> Option<u64> {
        None
    }

    /// Announces a model, so that a device can make ready beside the loading of its weights. Whatever
    /// was not announced is made ready when it is needed.
    fn announce(&self, _plan: &ModelPlan) {}

    /// Makes sure that the device gets such a model right, but for its attention: where drivers are
    /// not to be trusted, it is asked for answers that are known.
    ///
    /// # Errors
    /// [`Error::WrongResults`](crate::Error::WrongResults) where it does not.
    fn vouch_for_model(&self, _plan: &ModelPlan) -> Result<()> {
        Ok(())
    }

    /// The same of attention.
    ///
    /// # Errors
    /// As [`Backend::vouch_for_model`].
    fn vouch_for_attention(&self, _head_dim: usize, _policy: &AttentionPolicy) -> Result<()> {
        Ok(())
    }

    /// Brings matrices that share their input width to the device, stacked in the order given.
    ///
    /// All are of one [`MatrixFormat`]. They are read in bounded pieces: host memory grows by
    /// megabytes, not by the matrix.
    ///
    /// # Errors
    /// Device out of memory or over its limits; an unreadable file.
    fn linear(&self, stack: &[MatrixSource]) -> Result<Self::Linear>;

    /// An RMSNorm with `weight` `[width]`.
    fn norm(&self, weight: &[f32], eps: f32) -> Result<Self::Norm>;

    /// Fails where the device has no room for a rotary table of `context` positions, before one is
    /// made.
    ///
    /// # Errors
    /// [`Error::DeviceLimit`](crate::Error::DeviceLimit).
    fn check_rope(&self, _context: usize, _head_dim: usize) -> Result<()> {
        Ok(())
    }

    /// The rotary table `[positions, D / 2]` of (cosine, sine).
    fn rope(&self, table: &[[f32; 2]], head_dim: usize) -> Result<Self::Rope>;

    /// Activations of up to `rows` tokens, zeros at first.
    fn tensor(&self, rows: usize, width: usize, format: TensorFormat) -> Result<Self::Tensor>;

    /// An empty cache of one layer.
    ///
    /// # Errors
    /// Device out of memory or over its limits; pages that are too large for such heads.
    fn cache(&self, shape: &CacheShape) -> Result<Self::Cache>;

    /// A stream for one session.
    fn stream(&self, shape: &StreamShape) -> Result<Self::Stream>;

    /// Writes `values` `[rows, width]` into an F32 tensor and sets its rows. For tests and tools.
    fn write(&self, tensor: &mut Self::Tensor, values: &[f32]) -> Result<()>;

    /// Writes an Int8 tensor: elements `[rows, width]` and one scale a row. For tests and tools.
    fn write_int8(&self, tensor: &mut Self::Tensor, values: &[i8], scales: &[f32]) -> Result<()>;

    /// Largest `top_k` that [`Operations::sample`] takes; `usize::MAX` where there is no limit.
    fn max_top_k(&self) -> usize;

    /// Steps that are worth having on their way, each on the token that the one before it samples,
    /// while the host waits for the first one's token: 0 where operations are done when their call
    /// returns.
    fn look_ahead(&self) -> usize;

    /// Whether [`Operations::linear`] multiplies weights of 8 or 4 bits in fixed point: activations
    /// are rounded to steps of [`ACTIVATION_STEP`] of the largest magnitude of each [`FIXED_COLS`]
    /// columns of a row. From [`FIXED_TOKENS`] on weights may be rounded likewise, to steps of
    /// [`WEIGHT_STEP`]: with weights like noise that adds less than a hundredth to the error that 8 bits
    /// have cost them, and more where one of [`FIXED_COLS`] is far greater than the others.
    fn fixed_point(&self) -> bool {
        false
    }

    /// Whether the device can go away while the program runs, so that what lies on it is gone.
    fn can_be_lost(&self) -> bool {
        false
    }

    /// Gives up a device that was lost: frees what can still be freed, whoever holds it.
    fn give_up(&self) {}

    /// Measures how fast the device reads `bytes` of its memory, or fewer where its limits are
    /// smaller: the ceiling of whatever is bound by memory. Takes some tenths of a second.
    ///
    /// # Errors
    /// No room for them; a device that did not read them all.
    fn read_speed(&self, bytes: u64) -> Result<ReadSpeed>;

    /// Measures how many multiply-adds a second the device makes of what is in registers, of the kind
    /// that weights of a format are multiplied by: the ceiling of whatever memory does not bound.
    /// Takes some tenths of a second.
    ///
    /// # Errors
    /// A fault of the device; a device that multiplied wrongly.
    fn multiply_speed(&self, format: MatrixFormat) -> Result<f64>;
}

/// The operations of one session, run in the order they are called.
///
/// Every operation reads the live rows of its input and sets the rows of its output. Shapes are
/// the caller's contract: the model checks them once when it is loaded.
pub trait Operations<B: Backend<Stream = Self>>: Send {
    /// Starts a step. One of given tokens forgets those that were sampled and not read.
    ///
    /// # Errors
    /// Tokens beyond the stream's shape; [`Input::Sampled`] where nothing was sampled.
    fn begin(&mut self, step: &Step<'_>) -> Result<()>;

    /// `out[t] = table[token t]`, `[T, hidden]`; `table` is a single matrix `[vocabulary, hidden]`.
    fn embed(&mut self, table: &B::Linear, out: &mut B::Tensor) -> Result<()>;

    /// RMSNorm of the given `rows` of `x` (F32) into rows `0..rows.len()` of `out`:
    /// `y = weight * (x / sqrt(mean(x^2) + eps))`, quantised where `out` is Int8.
    ///
    /// Source: RMSNorm, <https://arxiv.org/abs/1910.07467>, equation 4.
    fn norm(
        &mut self,
        x: &B::Tensor,
        rows: Range<usize>,
        norm: &B::Norm,
        out: &mut B::Tensor,
    ) -> Result<()>;

    /// `out = x W^T`, `[T, in] x [out, in] -> [T, out]`, out F32.
    ///
    /// `x` is Int8 for ternary weights, with exact `i32` sums:
    /// `out = sum(i8 * trit) * (scale of the row * scale of the matrix)`. Else `x` is F32; see
    /// [`Backend::fixed_point`].
    fn linear(&mut self, x: &B::Tensor, weight: &B::Linear, out: &mut B::Tensor) -> Result<()>;

    /// `out += x W^T`: [`Operations::linear`] onto the residual stream.
    fn linear_add(&mut self, x: &B::Tensor, weight: &B::Linear, out: &mut B::Tensor) -> Result<()>;

    /// Rotates queries and keys in `qkv` `[T, (H + 2 G) D]` and appends keys and values to the
    /// cache at the step's position, which is its length. Only the queries need to be rotated in
    /// place.
    ///
    /// Half-split rotation as in transformers: pairs are `(i, i + D / 2)`.
    /// Source: RoFormer, <https://arxiv.org/abs/2104.09864>, equation 34.
    fn rope_append(
        &mut self,
        qkv: &mut B::Tensor,
        rope: &B::Rope,
        cache: &mut B::Cache,
    ) -> Result<()>;

    /// Compresses the pages of keys that the step has completed, see
    /// [`encode_page`](crate::delta::encode_page); nothing where keys are plain.
    fn encode_keys(&mut self, cache: &mut B::Cache) -> Result<()>;

    /// Causal attention of the step's queries over the cache, `[T, H D]`:
    /// `softmax(q k^T / sqrt(D)) v` by online softmax; no `T x L` matrix is held.
    ///
    /// Of the keys a query sees those that [`ExactRule`](crate::delta::ExactRule) says exactly,
    /// and of the others what their pages stand for.
    fn attention(&mut self, qkv: &B::Tensor, cache: &B::Cache, out: &mut B::Tensor) -> Result<()>;

    /// `out = act(gate) * up` from `gate_up` `[T, 2 I]` (gate first), then `norm` where there is
    /// one (BitNet's ffn_sub_norm), quantised where `out` is Int8. `[T, I]`.
    fn gate(
        &mut self,
        gate_up: &B::Tensor,
        activation: Activation,
        norm: Option<&B::Norm>,
        out: &mut B::Tensor,
    ) -> Result<()>;

    /// Chooses a token from the last live row of `logits`; the host gets it by
    /// [`Operations::token`]. See [`SampleStep`] for the exact rule.
    ///
    /// In a step on [`Input::Sampled`] the tokens seen are those of the last step of given tokens,
    /// and what was sampled since: the device knows it before the host.
    fn sample(&mut self, logits: &B::Tensor, step: &SampleStep<'_>) -> Result<()>;

    /// Cuts a cache back to its first `length` tokens.
    ///
    /// Original keys beyond that are gone, and of those before it no more are there than were:
    /// the caller knows what can still be continued (see
    /// [`AttentionPolicy::recent_slots`]).
    fn truncate(&mut self, cache: &mut B::Cache, length: usize) -> Result<()>;

    /// Waits for all submitted work and reads a cache's compressed pages, `[G][pages]`.
    fn pages(&mut self, cache: &B::Cache) -> Result<Vec<Vec<Page>>>;

    /// Waits likewise and reads all that is in a cache; its original keys from `exact_from` on.
    fn save(&mut self, cache: &B::Cache, exact_from: usize) -> Result<CacheImage>;

    /// Puts into an empty cache what [`Operations::save`] has read, on whatever backend, from a
    /// cache of the same shape. The parts of the image have been checked.
    fn restore(&mut self, cache: &mut B::Cache, image: &CacheImage) -> Result<()>;

    /// Ends the step: a GPU starts to work. Does not wait.
    fn submit(&mut self) -> Result<()>;

    /// Waits until all submitted work is done.
    fn wait(&mut self) -> Result<()>;

    /// Waits for the first sampled token that was not read yet.
    ///
    /// # Errors
    /// [`Error::NotFinite`](crate::Error::NotFinite) where the logits held NaN; whatever was sampled
    /// after it is worth nothing.
    fn token(&mut self) -> Result<u32>;

    /// Waits for all submitted work and reads the live rows of an F32 tensor, `[rows, width]`.
    fn read(&mut self, tensor: &B::Tensor) -> Result<Vec<f32>>;

    /// Waits likewise and reads an Int8 tensor: elements `[rows, width]`, and a scale a row.
    fn read_int8(&mut self, tensor: &B::Tensor) -> Result<(Vec<i8>, Vec<f32>)>;

    /// What the device was asked to do so far.
    fn activity(&self) -> Activity {
        Activity::default()
    }

    /// Begins, or ceases, to time every launch by the device's own clock. That costs time itself:
    /// launches no longer overlap. Says whether the device can.
    fn time_kernels(&mut self, _on: bool) -> Result<bool> {
        Ok(false)
    }

    /// Waits for all submitted work and takes the times of the launches since the last call, in
    /// their order.
    fn kernel_times(&mut self) -> Result<Vec<KernelTime>> {
        Ok(Vec::new())
    }
}

/// What kind of processor a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The CPU backend.
    Cpu,
    /// A GPU that shares the CPU's memory.
    IntegratedGpu,
    /// A GPU with memory of its own.
    DiscreteGpu,
    /// A GPU lent by a hypervisor.
    VirtualGpu,
    /// A software renderer: a GPU interface computed by the CPU.
    SoftwareGpu,
    /// A GPU whose driver does not say.
    OtherGpu,
}

impl DeviceKind {
    /// The kind in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU",
            Self::IntegratedGpu => "integrated GPU",
            Self::DiscreteGpu => "discrete GPU",
            Self::VirtualGpu => "virtual GPU",
            Self::SoftwareGpu => "software GPU",
            Self::OtherGpu => "GPU",
        }
    }
}

/// Which device a model runs on, in words for people and bug reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The device's name, such as `llvmpipe (LLVM 15.0.6, 256 bits)`.
    pub name: String,
    /// What kind of processor it is.
    pub kind: DeviceKind,
    /// The interface it is reached by: `cpu`, `vulkan`, `metal`, `dx12`, `gl`.
    pub backend: String,
    /// The driver and its version; for the CPU, the SIMD kernels and threads in use.
    pub driver: String,
    /// Optional abilities in use, such as `f16` or `subgroups`.
    pub features: Vec<String>,
}
