//! What is compared: devices, attention modes, and the model that runs on them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use deltallm::backend::{DeviceInfo, DeviceKind};
use deltallm::checkpoint::synthetic::Synthetic;
use deltallm::checkpoint::{Bytes, Checkpoint};
use deltallm::delta::PolicyFile;
use deltallm::gpu::adapters;
use deltallm::{DeviceChoice, Error, Model, ModelOptions};

use crate::args::open_checkpoint;
use crate::attention_args::Attention;
use crate::output::{Failure, say};

/// A list of numbers, or `none`.
#[derive(Clone, Debug)]
pub struct Counts(pub Vec<usize>);

impl FromStr for Counts {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "none" {
            return Ok(Self(Vec::new()));
        }
        let number = |word: &str| {
            let word = word.trim();
            word.parse().map_err(|_| format!("{word:?} is not a number of tokens, nor `none`"))
        };
        text.split(',').map(number).collect::<Result<_, _>>().map(Self)
    }
}

/// A device that is measured.
pub struct Device {
    pub choice: DeviceChoice,
    pub info: DeviceInfo,
    /// Its name as tables have room for.
    pub name: String,
}

/// The devices of these choices, none twice; without one, every kind that people compare: the GPU,
/// and the CPU. Each is opened once, so that a wrong name is found before anything is measured.
pub fn devices(given: &[String], options: &ModelOptions) -> Result<Vec<Device>, Failure> {
    let mut choices = Vec::new();
    for text in given {
        for part in parts(text) {
            choices.push(part.parse().map_err(Failure::Usage)?);
        }
    }
    if choices.is_empty() {
        if adapters().iter().any(|adapter| adapter.kind != DeviceKind::SoftwareGpu) {
            choices.push(DeviceChoice::Gpu);
        } else {
            say!("no hardware GPU was found: measuring the CPU alone");
        }
        choices.push(DeviceChoice::Cpu);
    }
    let mut devices: Vec<Device> = Vec::new();
    for choice in choices {
        let options = ModelOptions { device: choice.clone(), ..options.clone() };
        let info = Model::device_of(&options)?;
        let identity =
            |info: &DeviceInfo| (info.name.clone(), info.backend.clone(), info.driver.clone());
        if devices.iter().any(|other| identity(&other.info) == identity(&info)) {
            continue;
        }
        // What was found is what is measured: a model that does not fit must not run elsewhere under
        // this name.
        let choice = match (choice, info.kind) {
            (DeviceChoice::Auto, DeviceKind::Cpu) => DeviceChoice::Cpu,
            (DeviceChoice::Auto, _) => DeviceChoice::Gpu,
            (choice, _) => choice,
        };
        let name = short(&choice, &info, &devices);
        devices.push(Device { choice, info, name });
    }
    Ok(devices)
}

/// A list at its commas, unless all of it is part of an adapter's name: some have commas in them.
fn parts(text: &str) -> Vec<&str> {
    let lower = text.to_lowercase();
    match adapters().iter().any(|adapter| adapter.name.to_lowercase().contains(&lower)) {
        true => vec![text],
        false => text.split(',').map(str::trim).collect(),
    }
}

/// What comes before a name's brackets, unlike the names of the others.
fn short(choice: &DeviceChoice, info: &DeviceInfo, others: &[Device]) -> String {
    let base = match info.kind {
        DeviceKind::Cpu if info.backend == "cpu" => match choice {
            DeviceChoice::CpuKernels(kernels) => format!("CPU {}", kernels.name()),
            _ => "CPU".to_owned(),
        },
        DeviceKind::Cpu => "reference".to_owned(),
        _ => info.name.split('(').next().unwrap_or_default().trim().to_owned(),
    };
    let (mut name, mut number) = (base.clone(), 2);
    while others.iter().any(|other| other.name == name) {
        name = format!("{base} {number}");
        number += 1;
    }
    name
}

/// An attention mode under the name that it was given by.
#[derive(Clone)]
pub struct Mode {
    pub name: String,
    pub attention: Attention,
}

/// The modes of these texts, none twice: dense, delta, paper, a policy as text, or a file that
/// `calibrate` has written.
pub fn modes(texts: &[String]) -> Result<Vec<Mode>, Error> {
    let mut modes: Vec<Mode> = Vec::new();
    for text in texts {
        let path = Path::new(text.trim());
        let mode = match path.extension().is_some_and(|extension| extension == "json") {
            true => {
                let PolicyFile { policy, thresholds, .. } = PolicyFile::read(path)?;
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                Mode { name, attention: Attention { policy, thresholds } }
            }
            false => {
                let attention = Attention { policy: text.parse()?, thresholds: None };
                Mode { name: text.trim().to_owned(), attention }
            }
        };
        let key = |mode: &Mode| (mode.attention.policy, mode.attention.thresholds.clone());
        if !modes.iter().any(|other| key(other) == key(&mode)) {
            modes.push(mode);
        }
    }
    Ok(modes)
}

/// The model that is measured, to be opened once for each device and mode.
pub enum Source {
    Directory(PathBuf),
    Embedded,
    /// Random weights in memory.
    Synthetic {
        name: String,
        files: Vec<(String, Bytes)>,
    },
}

impl Source {
    /// The model of these options. One of random weights gets the context that is needed: what it was
    /// trained for means nothing to it.
    pub fn new(
        model: Option<&Path>,
        synthetic: Option<&str>,
        context: usize,
    ) -> Result<Self, Failure> {
        let Some(name) = synthetic else {
            return Ok(model.map_or(Self::Embedded, |dir| Self::Directory(dir.to_owned())));
        };
        let Some(mut synthetic) = Synthetic::named(name) else {
            let known = Synthetic::NAMES.join(", ");
            return Err(Failure::Usage(format!("--synthetic {name}: known are {known}")));
        };
        synthetic.config.context = synthetic.config.context.max(context);
        say!("making random weights in the shape of {name}");
        Ok(Self::Synthetic { name: name.to_owned(), files: synthetic.files()? })
    }

    /// The checkpoint; weights in memory are not copied.
    pub fn open(&self) -> Result<Checkpoint, Failure> {
        match self {
            Self::Directory(dir) => open_checkpoint(Some(dir)),
            Self::Embedded => open_checkpoint(None),
            Self::Synthetic { name, files } => {
                Ok(Checkpoint::from_memory(format!("random {name}"), files.clone())?)
            }
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(dir) => write!(f, "{}", dir.display()),
            Self::Embedded => f.write_str("embedded"),
            Self::Synthetic { name, .. } => write!(f, "{name} with random weights"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_numbers_or_none() {
        let counts = |text: &str| text.parse::<Counts>().map(|counts| counts.0);
        assert_eq!(counts("128, 512"), Ok(vec![128, 512]));
        assert_eq!(counts("none"), Ok(vec![]));
        for bad in ["", "1,,2", "-1", "12x", "1.5", "none,1"] {
            assert!(counts(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn modes_are_named_as_they_were_given_and_none_comes_twice() {
        let texts = ["dense", "delta", "dense", "keys=int8 values=int4", "delta theta=0.7sigma"];
        let modes = modes(&texts.map(str::to_owned)).expect("modes");
        let names: Vec<&str> = modes.iter().map(|mode| &mode.name[..]).collect();
        assert_eq!(names, ["dense", "delta", "keys=int8 values=int4"]);
        for bad in ["", "dence", "theta=1", "not-there.json"] {
            assert!(super::modes(&[bad.to_owned()]).is_err(), "{bad:?}");
        }
    }
}
