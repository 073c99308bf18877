//! What is on disk, or in memory: a model directory as Hugging Face lays it out.
//!
//! [`Checkpoint::open`] reads `config.json`, `generation_config.json` and the headers of the
//! safetensors files, and checks them; [`Checkpoint::from_memory`] does the same with files that are
//! in memory. Weights are mapped one by one, as [`MatrixSource`]s, when [`crate::model`] brings them
//! to a device.

mod config;
mod files;
mod header;
mod json;
mod matrix;
pub mod synthetic;
mod tensors;

use std::path::Path;
use std::sync::Arc;

pub use config::{Architecture, Llama3Scaling, ModelConfig, RopeConfig, Ternary};
pub(crate) use files::{Files, read_bounded};
pub(crate) use header::read_header;
pub(crate) use json::Object;
pub use matrix::{Bytes, FloatType, MatrixSource};
pub use tensors::{TensorInfo, Tensors};

use crate::error::{Error, Result};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// A model whose configuration and tensor headers have been read.
#[derive(Debug)]
pub struct Checkpoint {
    pub(crate) files: Files,
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
        Self::read(Files::Directory(dir))
    }

    /// Opens a model whose files are in memory, such as in the program itself: by the names that
    /// they have in a directory, which `name` stands for in errors. Nothing is copied.
    ///
    /// ```no_run
    /// use deltallm::checkpoint::{Bytes, Checkpoint};
    ///
    /// # fn main() -> deltallm::Result<()> {
    /// # static CONFIG: &[u8] = b"";
    /// # static TOKENIZER: &[u8] = b"";
    /// # let weights: Vec<u8> = Vec::new();
    /// let checkpoint = Checkpoint::from_memory(
    ///     "asset",
    ///     [
    ///         ("config.json", Bytes::from(CONFIG)), // a &'static [u8], as of include_bytes!
    ///         ("tokenizer.json", Bytes::from(TOKENIZER)),
    ///         ("model.safetensors", Bytes::from(weights)), // a Vec<u8>
    ///     ],
    /// )?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_memory<N: Into<String>>(
        name: impl AsRef<Path>,
        files: impl IntoIterator<Item = (N, Bytes)>,
    ) -> Result<Self> {
        let files = files.into_iter().map(|(name, bytes)| (name.into(), bytes)).collect();
        Self::read(Files::Memory { name: name.as_ref().to_owned(), files: Arc::new(files) })
    }

    /// The directory, or what stands for it.
    pub fn path(&self) -> &Path {
        self.files.root()
    }

    fn read(files: Files) -> Result<Self> {
        let mut config = ModelConfig::read(&files)?;
        let tensors = Tensors::open(&files)?;
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
        Ok(Self { files, config, tensors })
    }
}
