//! What the GPU tests share.
#![allow(dead_code, reason = "each test takes what it needs")]

use deltallm::gpu::{Gpu, GpuOptions, Select};

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
