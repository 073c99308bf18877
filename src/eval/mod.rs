//! How well a model does under a policy, measured on texts.

mod divergence;

pub use divergence::{Divergence, divergence, divergences};
