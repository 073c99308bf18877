//! Language models on the GPU that people already own.

pub mod backend;
pub mod checkpoint;
pub mod conformance;
pub mod cpu;
mod error;
pub mod gpu;
pub mod model;
pub mod reference;
pub mod sampler;
mod session;
mod stop;
mod tokenizer;

pub use error::{Error, Result};
pub use model::{DeviceChoice, Model, ModelOptions};
pub use sampler::Sampling;
pub use session::{
    Cancel, DEFAULT_CONTEXT, FinishReason, GenerateOptions, Generation, Piece, Session,
    SessionOptions, Timings,
};
pub use tokenizer::Tokenizer;
