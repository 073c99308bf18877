//! What this program remembers of GPUs, in the user's cache directory.

use std::path::PathBuf;

use deltallm::gpu::{GpuOptions, Tunings};
use etcetera::BaseStrategy as _;

/// Where a file is remembered; nothing where the system does not say where caches are.
pub fn path(file: &str) -> Option<PathBuf> {
    let folders = etcetera::base_strategy::choose_native_strategy().ok()?;
    Some(folders.cache_dir().join("deltallm").join(file))
}

/// Where `tune` remembers what it found.
pub fn tunings_path() -> Option<PathBuf> {
    path("tunings.json")
}

/// What `tune` has remembered on this machine. A file that cannot be read is no reason not to run.
pub fn tunings() -> Tunings {
    match tunings_path().filter(|path| path.exists()).map(Tunings::read) {
        None => Tunings::default(),
        Some(Ok(tunings)) => tunings,
        Some(Err(error)) => {
            log::warn!("{error}: GPUs run as if they were not tuned; `deltallm tune` mends it");
            Tunings::default()
        }
    }
}

/// How every command opens a GPU: as it was tuned, and tested once for each driver and build.
pub fn gpu_options() -> GpuOptions {
    let findings = path("self-tests.json");
    GpuOptions { tunings: tunings(), findings, ..GpuOptions::default() }
}
