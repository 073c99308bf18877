//! Language models on the GPU that people already own: the integrated one in a phone or laptop.
//!
//! `deltallm` opens Llama and BitNet b1.58 checkpoints as Hugging Face lays them out and runs them
//! as WGSL compute shaders over wgpu (Vulkan, Metal, DX12), or on the CPU with threads and SIMD.
//!
//! # A text in six lines
//!
//! ```no_run
//! use deltallm::{GenerateOptions, Model, ModelOptions, Session, SessionOptions};
//!
//! # fn main() -> deltallm::Result<()> {
//! let model = Model::open("path/to/model", &ModelOptions::default())?;
//! let mut session = Session::new(&model, &SessionOptions::default())?;
//! let prompt = model.tokenizer().encode("Once upon a time")?;
//! for piece in session.generate(&prompt, &GenerateOptions::default())? {
//!     print!("{}", piece?.text);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # How it is built
//!
//! ```text
//! text -> Tokenizer -> Session -> Transformer::forward -> logits -> sample -> text
//!                         |              |
//!                       Cache         Backend (Gpu | Cpu | Reference)
//! ```
//!
//! - [`checkpoint`] is what is on disk: configuration, tensors, and [`MatrixSource`], a weight
//!   matrix on its way from a mapped file to a device.
//! - [`model`] has the forward pass, written once. It speaks to a device through
//!   [`backend::Operations`], about a dozen fused operations that a decoder layer is made of.
//! - [`delta`] is the method: which keys are exact, how the others are compressed, to the bit, and
//!   what that costs. It knows no device.
//! - [`eval`] measures what a policy does to a model's accuracy.
//! - [`gpu`], [`cpu`] and [`mod@reference`] each implement them. [`mod@reference`] is slow and plain: read
//!   it to know what an operation does. [`conformance`] holds the other two against it.
//! - [`mod@bisect`] finds the operation that a driver gets wrong.
//! - [`mod@bench`] asks how fast a model runs, and how much of the memory's bandwidth it uses.
//! - [`eval`] asks what a policy costs: tasks, their metrics with standard errors, and the divergence
//!   from dense attention.
//! - [`Session`] is a text in progress: its cache, its sampling, its stream of pieces.
//! - `chat` (a feature) is a checkpoint's chat template and conversations in it; `demo` (a feature)
//!   is a small model inside the crate, `Model::embedded`.
//!
//! An operation has one name everywhere: `norm` is `shaders/norm.wgsl`, `src/gpu/norm.rs`,
//! `src/cpu/norm.rs`, [`Operations::norm`](backend::Operations::norm) and its row in the table of
//! [`conformance`]. Where a GPU needs several kernels for one, their names begin with it:
//! `shaders/attention_tiled.wgsl`.
//!
//! # What can be relied on
//!
//! - Integer arithmetic is exact: given the same 8-bit inputs, the sums of ternary products are
//!   bit-equal on every backend. So are compressed pages of keys that are equal.
//! - A fault is a [`Result`] that names the file, tensor, shape, limit or device. The library does
//!   not panic on a checkpoint or a prompt, whatever is in it, and it does not print or exit.
//! - The same seed gives the same text on the same device, also where that device is lost in the
//!   middle of it: see [`Model`](Model#lost-devices).
//!
//! [`MatrixSource`]: checkpoint::MatrixSource

pub mod backend;
pub mod bench;
pub mod bisect;
#[cfg(feature = "chat")]
pub mod chat;
pub mod checkpoint;
pub mod conformance;
mod contained;
pub mod cpu;
pub mod delta;
#[cfg(feature = "demo")]
pub mod demo;
mod error;
pub mod eval;
mod formats;
pub mod gpu;
pub mod model;
pub mod reference;
mod sampled;
pub mod sampler;
mod session;
mod stop;
mod tokenizer;
mod whole_file;

pub use error::{Error, Result};
pub use model::{DeviceChoice, Model, ModelOptions};
pub use sampler::Sampling;
pub use session::{
    Cancel, DEFAULT_CONTEXT, FinishReason, GenerateOptions, Generation, LogitsOptions, LogitsRun,
    Piece, Session, SessionOptions, Timings, check_context,
};
pub use tokenizer::Tokenizer;
pub use whole_file::write_whole;
