//! What the GPU tests share.
#![allow(dead_code, reason = "each test takes what it needs")]

use deltallm::backend::Backend;
use deltallm::gpu::{Adapter, Gpu, GpuOptions, Select, Tuning, Tunings, adapters};

/// Options that take any adapter, hardware first.
pub fn any() -> GpuOptions {
    GpuOptions { select: Select::Named(String::new()), ..GpuOptions::default() }
}

/// Opens a device, or fails with what to do about it: a test that is skipped tests nothing.
pub fn open(options: GpuOptions) -> Gpu {
    Gpu::open(&options).unwrap_or_else(|error| {
        panic!(
            "{error}\nThese tests need a GPU or a software one: on Debian and Ubuntu \
             `apt-get install mesa-vulkan-drivers`, elsewhere Mesa's lavapipe or SwiftShader."
        )
    })
}

/// These options with a device of theirs tuned like this.
pub fn tuned(options: GpuOptions, tuning: Tuning) -> GpuOptions {
    let mut tunings = Tunings::default();
    tunings.insert(open(options.clone()).device(), tuning);
    GpuOptions { tunings, ..options }
}

/// An adapter with a matrix unit, without which a test fails. Tests that need it are ignored by default, so
/// that where there is none nobody takes them for passed; `tests/run.sh` runs them where there is one.
pub fn with_matrix_unit() -> Adapter {
    adapters().into_iter().find(|adapter| adapter.matrix_unit.is_some()).unwrap_or_else(|| {
        panic!("no adapter here has a matrix unit; `tests/drivers.sh mesa` brings one")
    })
}

/// The default of a device, but that a matrix unit is to make every tile.
pub fn wanting(options: &GpuOptions) -> Tuning {
    let mut tuning = Tuning::default_of(open(options.clone()).device().kind);
    for format in Tuning::FORMATS {
        tuning.tiles.of_mut(format).matrix_unit = true;
    }
    tuning
}

/// Options of an adapter with a matrix unit, tuned so that it makes every tile that it can.
pub fn by_matrix_unit() -> GpuOptions {
    let adapter = with_matrix_unit();
    let options = GpuOptions { select: Select::Named(adapter.name), ..GpuOptions::default() };
    let tuning = wanting(&options);
    tuned(options, tuning)
}
