//! What is on disk: a model directory as Hugging Face lays it out.
//!
//! [`Checkpoint::open`] reads `config.json`, `generation_config.json` and the headers of the
//! safetensors files, and checks them. Weights are mapped one by one, as
//! [`MatrixSource`]s, when [`crate::model`] brings them to a device.

mod config;
mod json;
mod matrix;
pub mod synthetic;
mod tensors;

use std::path::{Path, PathBuf};

pub use config::{Architecture, Llama3Scaling, ModelConfig, RopeConfig, Ternary};
pub(crate) use json::Object;
pub use matrix::{Bytes, FloatType, MatrixSource};
pub use tensors::{TensorInfo, Tensors};

use crate::error::{Error, Result};

/// A model directory whose configuration and tensor headers have been read.
#[derive(Debug)]
pub struct Checkpoint {
    /// The directory.
    pub dir: PathBuf,
    /// What `config.json` says.
    pub config: ModelConfig,
    /// The tensors by name.
    pub tensors: Tensors,
}

impl Checkpoint {
    /// Opens a model directory.
    ///
    /// # Errors
    /// Names the file and the field or tensor that is missing, malformed or not supported.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref().to_owned();
        if !dir.is_dir() {
            let message = if dir.exists() {
                "is a file; a model is a directory with config.json, model.safetensors and \
                 tokenizer.json"
            } else {
                "does not exist"
            };
            return Err(Error::Malformed { path: dir, message: message.into() });
        }
        let config = ModelConfig::read(&dir)?;
        let tensors = Tensors::open(&dir)?;
        let biased = |name: &str| name.starts_with("model.layers.") && name.ends_with(".bias");
        if let Some((name, _)) = tensors.iter().find(|(name, _)| biased(name)) {
            return Err(Error::Unsupported {
                path: tensors.path().to_owned(),
                what: format!("tensor {name:?}"),
                supported: "linears without bias are".into(),
            });
        }
        Ok(Self { dir, config, tensors })
    }
}
