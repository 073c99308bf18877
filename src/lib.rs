//! Language models on the GPU that people already own.

pub mod backend;
pub mod checkpoint;
mod error;
pub mod gpu;
pub mod sampler;

pub use error::{Error, Result};
