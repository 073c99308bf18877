//! The options of every command that runs a model: which, and on which device.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use deltallm::checkpoint::synthetic::Synthetic;
use deltallm::model::WeightFormat;
use deltallm::{Cancel, DeviceChoice, Error, Model, ModelOptions};

use crate::output::{load_bar, say};

/// Which model, on which device.
#[derive(Args)]
pub struct ModelArgs {
    /// Model directory: config.json, model.safetensors (or an index and shards), tokenizer.json.
    /// Without it a tiny model with random weights runs, whose text is noise
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    #[command(flatten)]
    pub device: DeviceArgs,
}

/// On which device, in which format.
#[derive(Args)]
pub struct DeviceArgs {
    /// auto, gpu, cpu, reference, or part of an adapter's name as `deltallm devices` shows it
    /// [default: auto]
    #[arg(long)]
    device: Option<DeviceChoice>,

    /// Format of float weights on the device
    #[arg(long, value_enum, default_value_t = Weights::Stored)]
    pub weights: Weights,

    /// Threads of the CPU backend [default: one a core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

/// Format of float weights.
#[derive(Clone, Copy, ValueEnum)]
pub enum Weights {
    /// As in the file: bf16, f16 or f32
    Stored,
    /// 8 bits in blocks of 32
    Q8,
}

impl From<Weights> for WeightFormat {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::Stored => Self::Stored,
            Weights::Q8 => Self::Q8,
        }
    }
}

/// An open model, with the directory that it was made in if it was made up.
pub struct OpenModel {
    pub model: Model,
    /// What was opened, for people.
    pub name: String,
    /// Removed when the model is.
    _made_up: Option<tempfile::TempDir>,
}

impl ModelArgs {
    /// Opens the model with a progress bar, and says on standard error what the user did not ask
    /// for: made-up weights, or the CPU.
    pub fn open(&self, cancel: &Cancel) -> Result<OpenModel, Error> {
        let (dir, made_up) = match &self.model {
            Some(dir) => (dir.clone(), None),
            None => {
                let made_up = make_up()?;
                say!("no --model: running a tiny model with random weights; its text is noise");
                (made_up.path().to_owned(), Some(made_up))
            }
        };
        let model = self.device.open(&dir, cancel)?;
        let name = match self.model {
            Some(_) => dir.display().to_string(),
            None => "random weights".to_owned(),
        };
        // On Unix what is mapped outlives its name: nothing is left behind, however the program ends.
        let made_up = made_up.filter(|_| !cfg!(unix));
        Ok(OpenModel { model, name, _made_up: made_up })
    }
}

impl DeviceArgs {
    /// Refuses the options that choose a device.
    pub fn refuse(&self, allowed: &str) -> Result<(), Error> {
        let given = [
            self.device.as_ref().map(|device| ("device", device.to_string())),
            self.threads.map(|threads| ("threads", threads.to_string())),
        ];
        match given.into_iter().flatten().next() {
            None => Ok(()),
            Some((name, value)) => {
                Err(Error::Parameter { name, value, allowed: allowed.to_owned() })
            }
        }
    }

    /// Opens the model in `dir` with a progress bar, and says so where it runs on the CPU although
    /// that was not asked for.
    pub fn open(&self, dir: &Path, cancel: &Cancel) -> Result<Model, Error> {
        let options = ModelOptions {
            device: self.device.clone().unwrap_or_default(),
            weights: self.weights.into(),
            threads: self.threads,
            ..ModelOptions::default()
        };
        let model = Model::open_with_progress(dir, &options, load_bar(cancel))?;
        if let Some(reason) = model.fallback() {
            say!("{reason}: using the CPU ({})", model.device().driver);
        }
        Ok(model)
    }
}

fn make_up() -> Result<tempfile::TempDir, Error> {
    let parent = std::env::temp_dir();
    let dir = tempfile::Builder::new()
        .prefix("deltallm-")
        .tempdir_in(&parent)
        .map_err(|source| Error::Io { path: parent, source })?;
    if let Some(tiny) = Synthetic::named("tiny") {
        tiny.write(dir.path())?;
    }
    Ok(dir)
}
