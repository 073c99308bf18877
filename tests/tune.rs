//! What `tune` takes and what it does not.

mod gpu_common;

use std::ops::ControlFlow;

use deltallm::Error;
use deltallm::backend::{Backend as _, MatrixFormat};
use deltallm::gpu::{
    Cut, Fault, Faults, GpuOptions, Measurement, Packing, Sabotage, Select, Tile, Tuning, Tunings,
    tune,
};
use gpu_common::{any, open, with_matrix_unit};

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

/// Both are measured, and what is fastest with one token is taken, whatever it makes of many.
#[test]
fn the_packing_of_the_fastest_product_of_one_token_is_taken() {
    let formats = [MatrixFormat::Ternary, MatrixFormat::F32];
    let tuned = tune(&any(), &formats, &mut |_, _| ControlFlow::Continue(())).expect("a tuning");
    let ternary = |cut: &&Measurement<Cut>| cut.format == MatrixFormat::Ternary;
    let cuts: Vec<_> = tuned.cuts.iter().filter(ternary).collect();
    for packing in Packing::ALL {
        let of = cuts.iter().filter(|cut| cut.packing == Some(packing));
        assert_eq!(of.clone().count(), Cut::all(MatrixFormat::Ternary).count());
        for cut in of {
            assert!(cut.right, "{cut:?}");
            // A field may end in rows that are not there, and a table of scales is counted, too.
            let a_byte = cut.speed / cut.bytes;
            assert!((a_byte / packing.fields() as f64 - 1.0).abs() < 1e-2, "{cut:?}: {a_byte}");
        }
    }
    let fastest = cuts.iter().max_by(|a, b| a.speed.total_cmp(&b.speed)).expect("cuts");
    assert_eq!(
        (Some(tuned.tuning.packing), tuned.tuning.cuts.ternary),
        (fastest.packing, fastest.way)
    );
    let of_tiles = tuned.tiles.iter().map(|tile| (tile.format, tile.packing));
    for (format, packing) in of_tiles {
        let expected = (format == MatrixFormat::Ternary).then_some(tuned.tuning.packing);
        assert_eq!(packing, expected);
    }
    let plain = tuned.tiles.iter().filter(|tile| !tile.way.matrix_unit);
    assert_eq!(
        plain.count(),
        formats.map(|format| Tile::all(format).count()).iter().sum::<usize>()
    );
}

/// What a matrix unit can make is measured with it and without, and what is faster is what is remembered:
/// of a device that was opened with its unit, and is found again without.
#[test]
#[ignore = "needs a GPU with a matrix unit"]
fn a_matrix_unit_is_measured_where_there_is_one() {
    let adapter = with_matrix_unit();
    let unit = adapter.matrix_unit.expect("chosen for it");
    let options = GpuOptions { select: Select::Named(adapter.name), ..GpuOptions::default() };
    let formats = [MatrixFormat::Ternary, MatrixFormat::F16];
    let mut go_on = |_, _| ControlFlow::Continue(());
    let tuned = tune(&options, &formats, &mut go_on).expect("a tuning");
    for format in formats {
        let of = tuned.tiles.iter().filter(|tile| tile.format == format);
        let by_unit = of.clone().filter(|tile| tile.way.matrix_unit);
        let expected = Tile::all_by(unit, format).count();
        assert!(expected > 0 && by_unit.count() == expected, "{format:?}");
        for tile in of.clone() {
            assert!(tile.right, "{tile:?}");
        }
        let fastest = of.max_by(|a, b| a.speed.total_cmp(&b.speed)).expect("tiles");
        assert_eq!(*tuned.tuning.tiles.of(format), fastest.way);
    }
    let mut tunings = Tunings::default();
    tunings.insert(&tuned.device, tuned.tuning);
    assert_eq!(tunings.of(open(options).device()), Some(tuned.tuning));
}

/// Whatever is not measured stays: a packing, too.
#[test]
fn a_packing_stays_where_ternary_weights_are_not_measured() {
    let device = open(any()).device().clone();
    let before = Tuning { packing: Packing::Five, ..Tuning::default_of(device.kind) };
    let mut tunings = Tunings::default();
    tunings.insert(&device, before);
    let options = GpuOptions { tunings, ..any() };
    let mut go_on = |_, _| ControlFlow::Continue(());
    let tuned = tune(&options, &[MatrixFormat::F32], &mut go_on).expect("a tuning");
    assert_eq!(tuned.tuning.packing, Packing::Five);
    assert!(tuned.cuts.iter().all(|cut| cut.packing.is_none()));
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
