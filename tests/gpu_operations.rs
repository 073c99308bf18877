//! The table of operations on whatever adapter this machine has, a software one included, with and
//! without each optional ability.

mod gpu_common;

use deltallm::backend::Backend;
use deltallm::conformance;
use deltallm::gpu::{Gpu, GpuOptions};
use gpu_common::{any, open};

fn conforms(options: GpuOptions) {
    let gpu: Gpu = open(options);
    let device = gpu.device().clone();
    let mut count = 0;
    let mut failed = Vec::new();
    for operation in conformance::table::<Gpu>() {
        let checks =
            (operation.run)(&gpu).unwrap_or_else(|error| panic!("{}: {error}", operation.name));
        count += checks.len();
        failed.extend(checks.iter().filter(|check| !check.pass).map(ToString::to_string));
    }
    assert!(
        failed.is_empty(),
        "{device:?}: {} of {count} checks failed:\n{}",
        failed.len(),
        failed.join("\n")
    );
}

#[test]
fn conforms_as_the_adapter_offers() {
    conforms(any());
}

#[test]
fn conforms_on_the_floor() {
    conforms(GpuOptions { floor_limits: true, f16: false, subgroups: false, ..any() });
}

#[test]
fn conforms_with_f16_alone() {
    conforms(GpuOptions { subgroups: false, ..any() });
}

#[test]
fn conforms_with_subgroups_alone() {
    conforms(GpuOptions { f16: false, ..any() });
}

/// Blocks of 16 KiB cut most matrices of the table into several.
#[test]
fn conforms_with_matrices_in_pieces() {
    conforms(GpuOptions { max_matrix_block: Some(16 << 10), ..any() });
}
