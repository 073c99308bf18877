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
pub(crate) use json::{Object, read_bounded};
pub use matrix::{Bytes, FloatType, MatrixSource};
pub use tensors::{TensorInfo, Tensors};

use crate::error::{Error, Result};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

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
        let mut config = ModelConfig::read(&dir)?;
        let tensors = Tensors::open(&dir)?;
        // A configuration that says nothing of tying has a head of its own if the tensor is there.
        let has_head = tensors.contains(HEAD);
        let tied = config.tied_head.unwrap_or(!has_head);
        if tied && has_head && !tensors.are_equal(HEAD, EMBEDDING)? {
            return Err(Error::Unsupported {
                path: tensors.path().to_owned(),
                what: format!(
                    "tie_word_embeddings with a {HEAD:?} that differs from the embedding"
                ),
                supported: String::new(),
            });
        }
        config.tied_head = Some(tied);
        Ok(Self { dir, config, tensors })
    }
}
