//! The short form of `examples/soak.rs`: after minutes of a busy application in seconds, nothing is
//! held that was not held before.
#![cfg(feature = "demo")]

mod common;
mod soak_common;

use deltallm::{DeviceChoice, Model, ModelOptions};
use soak_common::{Held, Soak};

/// Host memory may grow so much between the middle and the end: allocators keep what they had, and
/// a software driver the machine code of a kernel that is used for the first time.
const GROWTH: u64 = 48 << 20;

/// Memory and handles are counted for the whole process: one test.
#[test]
fn nothing_is_left_over() {
    let on = |device| ModelOptions { device, threads: Some(2), ..ModelOptions::default() };
    let adapter = DeviceChoice::Named(common::test_adapter());
    // A software GPU takes a second for what a CPU does in a tenth.
    for (name, options, rounds, sessions, tokens) in
        [("cpu", on(DeviceChoice::Cpu), 6, 3, 200), ("gpu", on(adapter), 4, 2, 150)]
    {
        let model = Model::embedded(&options).expect("the model inside");
        let dir = tempfile::tempdir().expect("a directory");
        let mut soak = Soak::new(model, dir.path(), 7);
        let mut round = || {
            soak.round(2, sessions, tokens).unwrap_or_else(|error| panic!("{name}: {error}"));
            Held::now(soak.model())
        };
        // Kernels are compiled, pools filled, threads started.
        let warm = [round(), round()][1];
        let held: Vec<Held> = (0..rounds).map(|_| round()).collect();
        println!("{name}: {:?}\n  warm {warm:?}\n  then {held:?}", soak.counts);
        for (round, now) in held.iter().enumerate() {
            let case = format!("{name}, round {round}: {now:?}, after warming up {warm:?}");
            assert_eq!(now.device, warm.device, "device memory, {case}");
            assert_eq!(now.handles, warm.handles, "handles, {case}");
            assert_eq!(now.threads, warm.threads, "threads, {case}");
        }
        let (middle, end) = (held[rounds / 2 - 1].host, held[rounds - 1].host);
        if let (Some(middle), Some(end)) = (middle, end) {
            assert!(end <= middle + GROWTH, "{name}: host memory {middle} to {end} bytes");
        }
        let counts = soak.counts;
        assert!(counts.sessions >= 2 * sessions * rounds, "{counts:?}");
        assert!(counts.tokens >= 2 * sessions * tokens * rounds, "{counts:?}");
        assert!(counts.cancels > 5 && counts.left > 2 && counts.saved > 2, "{counts:?}");
        // What is left when every session is gone are the weights.
        let model = soak.model().clone();
        drop(soak);
        if let Some(device) = model.device_bytes() {
            let weights = model.weight_bytes();
            assert!(device >= weights, "{device} bytes on the device, {weights} of weights");
            println!("{name}: {weights} bytes of weights, {} of others", device - weights);
        }
    }
}
