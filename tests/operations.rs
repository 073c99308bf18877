//! Walks the table of operations: every backend must agree with the reference on all of it.

use deltallm::backend::Backend;
use deltallm::conformance;
use deltallm::cpu::{Cpu, Kernels};
use deltallm::reference::Reference;

/// Runs the table and lists all that does not pass.
fn conforms<B: Backend>(backend: &B) {
    let checks = conformance::run(backend).expect("the backend runs");
    let failed: Vec<String> =
        checks.iter().filter(|check| !check.pass).map(ToString::to_string).collect();
    let device = backend.device();
    assert!(
        failed.is_empty(),
        "{} ({}): {} of {} checks failed:\n{}",
        device.name,
        device.driver,
        failed.len(),
        checks.len(),
        failed.join("\n")
    );
}

#[test]
fn the_reference_conforms() {
    conforms(&Reference::new());
}

/// With one thread and with several, on all instructions that this machine has.
#[test]
fn the_cpu_conforms() {
    for kernels in Kernels::available() {
        for threads in [1, 3] {
            conforms(
                &Cpu::with_kernels(Some(threads), kernels).expect("the kernels are available"),
            );
        }
    }
}
