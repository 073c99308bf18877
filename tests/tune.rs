//! What `tune` takes and what it does not.

mod gpu_common;

use std::ops::ControlFlow;

use deltallm::Error;
use deltallm::backend::{Backend as _, MatrixFormat};
use deltallm::gpu::{Cut, Fault, Faults, GpuOptions, Sabotage, Tuning, Tunings, tune};
use gpu_common::{any, open};

#[test]
fn what_loses_the_device_is_not_taken_and_the_rest_is_measured() {
    let device = open(any()).device().clone();
    let mut before = Tuning::default_of(device.kind);
    before.cuts.q4 = Cut { workgroup: 128, rows: 8 };
    let mut tunings = Tunings::default();
    tunings.insert(&device, before);
    let faults = Faults::possible();
    let options = GpuOptions { tunings, faults: faults.clone(), ..any() };
    // The fourth way, before anything is known of it; and the third, while it is measured.
    let ways = Cut::all(MatrixFormat::Q8).count();
    let tuned = tune(&options, &[MatrixFormat::Q8], &mut |done, _| {
        if done == 3 || done == ways + 2 {
            faults.inject(Fault::Lost, 0, 1);
        }
        ControlFlow::Continue(())
    });
    let tuned = tuned.expect("the other ways work");
    assert_eq!(tuned.cuts.len(), ways);
    for (at, cut) in tuned.cuts.iter().enumerate() {
        let works = ![2, 3].contains(&at);
        assert_eq!((cut.right, cut.speed > 0.0), (works, works), "{cut:?}");
        assert!(works || cut.way != tuned.tuning.cuts.q8, "{cut:?}");
    }
    assert!(tuned.tiles.iter().all(|tile| tile.right && tile.speed > 0.0), "{:?}", tuned.tiles);
    // What was not measured is as it was.
    let mut expected = before;
    (expected.cuts.q8, expected.tiles.q8) = (tuned.tuning.cuts.q8, tuned.tuning.tiles.q8);
    assert_eq!(tuned.tuning, expected);
}

#[test]
fn wrong_results_are_not_taken() {
    let sabotage = Sabotage(vec!["linear_ternary_tiled".to_owned()]);
    let options = GpuOptions { sabotage, ..any() };
    let tuned = tune(&options, &[MatrixFormat::Ternary], &mut |_, _| ControlFlow::Continue(()));
    let error = tuned.expect_err("no tile is right").to_string();
    assert!(error.contains("ternary") && error.contains("gives right results"), "{error}");
}

#[test]
fn tuning_ends_when_it_is_told_to() {
    let mut calls = 0;
    let tuned = tune(&any(), &Tuning::FORMATS, &mut |done, total| {
        assert!(done < total);
        calls += 1;
        if done == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(tuned, Err(Error::Cancelled)), "{tuned:?}");
    assert_eq!(calls, 3);
    // Nothing to measure is no error.
    let tuned = tune(&any(), &[], &mut |_, _| ControlFlow::Continue(())).expect("nothing to do");
    assert_eq!(tuned.tuning, Tuning::default_of(tuned.device.kind));
    assert!(tuned.cuts.is_empty() && tuned.tiles.is_empty());
}
