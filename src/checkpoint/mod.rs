//! What is on disk.

mod matrix;

pub use matrix::{Bytes, FloatType, MatrixSource};
