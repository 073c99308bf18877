//! The options that commands share: which model, on which device, and how tokens are chosen.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use deltallm::checkpoint::Checkpoint;
use deltallm::model::WeightFormat;
use deltallm::{Cancel, DeviceChoice, Error, Model, ModelOptions, Sampling};

use crate::output::{Failure, load_bar, parameters, say};
use crate::remembered::gpu_options;

/// Which model, on which device.
#[derive(Args)]
pub struct ModelArgs {
    /// Model directory: config.json, model.safetensors (or an index and shards), tokenizer.json.
    /// Without it the model inside this program runs
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    #[command(flatten)]
    pub device: DeviceArgs,
}

/// On which device, in which format.
#[derive(Args)]
pub struct DeviceArgs {
    /// auto, gpu, cpu, cpu:INSTRUCTIONS, reference, or part of an adapter's name, as `deltallm devices`
    /// shows them [default: auto]
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
    /// 4 bits in blocks of 32, which costs accuracy
    Q4,
}

impl From<Weights> for WeightFormat {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::Stored => Self::Stored,
            Weights::Q8 => Self::Q8,
            Weights::Q4 => Self::Q4,
        }
    }
}

/// An open model.
pub struct OpenModel {
    pub model: Model,
    /// What was opened, for scripts: the directory, or `embedded`.
    pub name: String,
    /// What it is, for people.
    pub about: String,
}

impl ModelArgs {
    /// Opens the model with a progress bar, and says on standard error what the user did not ask
    /// for: the model inside, or the CPU.
    pub fn open(&self, cancel: &Cancel) -> Result<OpenModel, Failure> {
        let opened = self.open_quietly(cancel)?;
        if self.model.is_none() {
            say!("no --model: running {}", opened.about);
        }
        Ok(opened)
    }

    /// [`ModelArgs::open`] for a command that says what the model is itself.
    pub fn open_quietly(&self, cancel: &Cancel) -> Result<OpenModel, Failure> {
        let checkpoint = open_checkpoint(self.model.as_deref())?;
        let name = checkpoint.path().display().to_string();
        let model = self.device.open(checkpoint, cancel)?;
        let about = match &self.model {
            Some(_) => {
                let config = model.config();
                let size = parameters(config.parameters());
                format!("{name}, a {} of {size} parameters", config.architecture.name())
            }
            None => EMBEDDED.to_owned(),
        };
        Ok(OpenModel { model, name, about })
    }
}

#[cfg(feature = "demo")]
const EMBEDDED: &str = deltallm::demo::DESCRIPTION;
#[cfg(not(feature = "demo"))]
const EMBEDDED: &str = "";

/// The checkpoint in `dir`, or the one inside this program.
pub fn open_checkpoint(dir: Option<&Path>) -> Result<Checkpoint, Failure> {
    match dir {
        Some(dir) => Ok(Checkpoint::open(dir)?),
        #[cfg(feature = "demo")]
        None => Ok(Checkpoint::embedded()?),
        #[cfg(not(feature = "demo"))]
        None => Err(Failure::Usage(
            "no model was given, and this program was built without the feature `demo`, which has \
             one inside: name the directory of a model"
                .to_owned(),
        )),
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

    /// Brings a model to the device with a progress bar, and says so where it runs on the CPU although
    /// that was not asked for.
    pub fn open(&self, checkpoint: Checkpoint, cancel: &Cancel) -> Result<Model, Error> {
        let options = ModelOptions {
            device: self.device.clone().unwrap_or_default(),
            weights: self.weights.into(),
            threads: self.threads,
            gpu: gpu_options(),
        };
        let model = Model::open_checkpoint(checkpoint, &options, load_bar(cancel))?;
        if let Some(reason) = model.fallback() {
            say!("{reason}: using the CPU ({})", model.device().driver);
        }
        Ok(model)
    }
}

/// How tokens are chosen.
#[derive(Args)]
pub struct SamplingArgs {
    /// Randomness: 0 always takes the likeliest token [default: what the model's
    /// generation_config.json recommends, else 0, or 1 with another sampling option]
    #[arg(short, long)]
    temperature: Option<f32>,

    /// Draw from the K likeliest tokens; 0 from all [default: as recommended, else 40]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,

    /// Draw from the fewest tokens whose probabilities reach P [default: as recommended, else 0.95]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,

    /// Draw from tokens at least P times as likely as the likeliest [default: as recommended, else 0]
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,

    /// Make tokens that were there already less likely; 1 does nothing [default: as recommended, else
    /// 1]
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,

    /// The same seed gives the same text on the same device with the same number of threads
    /// [default: 0]
    #[arg(long)]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// Refuses values out of range, before a model is opened.
    ///
    /// # Errors
    /// Names the option and its range.
    pub fn check(&self) -> Result<(), Error> {
        self.sampling(&Sampling::default()).map(drop)
    }

    /// As the model recommends, but for what is given; an option that only matters to drawing makes
    /// it draw.
    ///
    /// # Errors
    /// A value out of its range.
    pub fn sampling(&self, recommended: &Sampling) -> Result<Sampling, Error> {
        let drawing = self.top_k.is_some()
            || self.top_p.is_some()
            || self.min_p.is_some()
            || self.seed.is_some();
        let temperature = match recommended.temperature {
            0.0 if drawing => 1.0,
            temperature => temperature,
        };
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(temperature),
            top_k: self.top_k.unwrap_or(recommended.top_k),
            top_p: self.top_p.unwrap_or(recommended.top_p),
            min_p: self.min_p.unwrap_or(recommended.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(recommended.repetition_penalty),
            seed: self.seed.unwrap_or(recommended.seed),
        };
        sampling.check()?;
        Ok(sampling)
    }
}
