//! Language models on the GPU that people already own.

pub mod backend;
pub mod checkpoint;
pub mod conformance;
pub mod cpu;
mod error;
pub mod reference;
pub mod sampler;

pub use error::{Error, Result};
