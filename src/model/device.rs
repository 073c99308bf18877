//! Which device a model runs on.

use std::fmt;
use std::str::FromStr;

use super::ModelOptions;
use crate::cpu::{Cpu, Kernels};
use crate::error::{Error, Result};
use crate::gpu::{Gpu, Select};

/// Which device to run on, as `--device` spells it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// `auto`: a hardware GPU, and where there is none, or it cannot hold the model, the CPU.
    #[default]
    Auto,
    /// `gpu`: a hardware GPU, or an error.
    Gpu,
    /// `cpu`: the CPU backend.
    Cpu,
    /// `cpu:avx2` and the like, see [`Kernels::key`]: the CPU backend with these instructions, to
    /// compare them, or to see what another processor would do.
    CpuKernels(Kernels),
    /// `reference`: the plain, slow yardstick that the other backends are tested against.
    Reference,
    /// Any other text: the first adapter whose name contains it, in any case. The only way to
    /// choose a software adapter.
    Named(String),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        Ok(match text.to_ascii_lowercase().as_str() {
            // Most likely a shell variable that is not set.
            "" => {
                return Err(
                    "auto, gpu, cpu, reference, or part of an adapter's name is needed".into()
                );
            }
            "auto" => Self::Auto,
            "gpu" => Self::Gpu,
            "cpu" => Self::Cpu,
            "reference" => Self::Reference,
            lower => match lower.strip_prefix("cpu:") {
                Some(kernels) => Self::CpuKernels(kernels.parse()?),
                None => Self::Named(text.to_owned()),
            },
        })
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CpuKernels(kernels) => return write!(f, "cpu:{}", kernels.key()),
            Self::Auto => "auto",
            Self::Gpu => "gpu",
            Self::Cpu => "cpu",
            Self::Reference => "reference",
            Self::Named(name) => name,
        })
    }
}

/// A device that is ready to be loaded.
pub(super) enum Opened {
    Gpu(Gpu),
    /// With the reason, where the CPU was not asked for.
    Cpu(Cpu, Option<String>),
    Reference,
}

pub(super) fn open(options: &ModelOptions) -> Result<Opened> {
    let cpu = || Cpu::new(options.threads);
    let gpu = |select| Gpu::open(&crate::gpu::GpuOptions { select, ..options.gpu.clone() });
    match &options.device {
        DeviceChoice::Reference => Ok(Opened::Reference),
        DeviceChoice::Cpu => Ok(Opened::Cpu(cpu()?, None)),
        DeviceChoice::CpuKernels(kernels) => {
            Ok(Opened::Cpu(Cpu::with_kernels(options.threads, *kernels)?, None))
        }
        DeviceChoice::Gpu => gpu(Select::Hardware).map(Opened::Gpu),
        DeviceChoice::Named(name) => {
            gpu(Select::Named(name.clone())).map(Opened::Gpu).map_err(|error| match error {
                Error::NoAdapter { wanted, found } => {
                    let wanted = format!("{wanted} (the CPU is chosen by `cpu`)");
                    Error::NoAdapter { wanted, found }
                }
                error => error,
            })
        }
        DeviceChoice::Auto => match gpu(Select::Hardware) {
            Ok(gpu) => Ok(Opened::Gpu(gpu)),
            Err(Error::NoAdapter { .. }) => {
                Ok(Opened::Cpu(cpu()?, Some("no hardware GPU was found".into())))
            }
            Err(error) => {
                log::warn!("{error}");
                Ok(Opened::Cpu(cpu()?, Some(format!("the GPU could not be opened ({error})"))))
            }
        },
    }
}
