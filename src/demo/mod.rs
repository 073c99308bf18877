//! The model inside: a small BitNet, so that the crate does something before anything is downloaded.
//!
//! It reads and tells stories of a synthetic world, and answers questions about what it was told;
//! `training/` makes it. It takes 2.5 MB of the program, and is left out with the feature `demo`.

use std::ops::ControlFlow;

use crate::checkpoint::{Bytes, Checkpoint};
use crate::error::Result;
use crate::model::{Model, ModelOptions};

/// What the model inside is, and what it is not, for people.
pub const DESCRIPTION: &str = "a small BitNet of 4.8 M parameters trained on a synthetic world of \
    people, places and objects; it knows only what you tell it";

/// The directory that stands for it in errors.
const NAME: &str = "embedded";

const FILES: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("config.json")),
    ("generation_config.json", include_bytes!("generation_config.json")),
    ("model.safetensors", include_bytes!("model.safetensors")),
    ("tokenizer.json", include_bytes!("tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("tokenizer_config.json")),
];

impl Checkpoint {
    /// The model inside this crate: see [`demo`](crate::demo).
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; a test opens it.
    pub fn embedded() -> Result<Self> {
        Self::from_memory(NAME, FILES.map(|(name, bytes)| (name, Bytes::from(bytes))))
    }
}

impl Model {
    /// The model inside this crate on the device of `options`: see [`demo`](crate::demo).
    ///
    /// # Errors
    /// No such device; too little device memory.
    pub fn embedded(options: &ModelOptions) -> Result<Self> {
        let carry_on = |_| ControlFlow::Continue(());
        Self::open_checkpoint(Checkpoint::embedded()?, options, carry_on)
    }
}
