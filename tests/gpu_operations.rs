//! The table of operations on whatever adapter this machine has, a software one included, with and
//! without each optional ability.

mod gpu_common;

use deltallm::backend::{Backend, DeviceKind};
use deltallm::conformance;
use deltallm::gpu::{Cut, Gpu, GpuOptions, Packing, Select, Tile, Tuning};
use gpu_common::{any, by_matrix_unit, open, tuned, wanting, with_matrix_unit};

fn conforms(options: GpuOptions) {
    some_conform(options, "");
}

/// The operations whose names begin like this.
fn some_conform(options: GpuOptions, names: &str) {
    let gpu: Gpu = open(options);
    let device = gpu.device().clone();
    let mut count = 0;
    let mut failed = Vec::new();
    let table = conformance::table::<Gpu>();
    for operation in table.into_iter().filter(|operation| operation.name.starts_with(names)) {
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

/// Where the adapter has no more than that, it is what `conforms_as_the_adapter_offers` has asked.
#[test]
fn conforms_with_f16_alone() {
    if offers("subgroups") {
        conforms(GpuOptions { subgroups: false, ..any() });
    }
}

/// Likewise.
#[test]
fn conforms_with_subgroups_alone() {
    if offers("f16") {
        conforms(GpuOptions { f16: false, ..any() });
    }
}

fn offers(feature: &str) -> bool {
    open(any()).device().features.iter().any(|name| name == feature)
}

#[test]
fn products_conform_without_packed_dots() {
    some_conform(GpuOptions { packed_dot: false, ..any() }, "linear_ternary");
}

/// Blocks of 16 KiB cut most matrices of the table into several.
#[test]
fn conforms_with_matrices_in_pieces() {
    conforms(GpuOptions { max_matrix_block: Some(16 << 10), ..any() });
}

/// In one buffer and cut into pieces, of which some hold parts of two matrices.
#[test]
fn products_conform_with_five_weights_in_a_byte() {
    let pieces = |bytes| GpuOptions { max_matrix_block: Some(bytes), ..any() };
    for options in [
        any(),
        GpuOptions { floor_limits: true, f16: false, subgroups: false, ..any() },
        GpuOptions { packed_dot: false, ..any() },
        pieces(7 << 10),
    ] {
        let kind = open(options.clone()).device().kind;
        let tuning = Tuning { packing: Packing::Five, ..Tuning::default_of(kind) };
        some_conform(tuned(options, tuning), "linear_ternary");
    }
}

/// As products are cut on a hardware GPU by default, and as nowhere by default, each with
/// both packings, one of them without subgroups.
#[test]
fn products_conform_however_they_are_cut() {
    let mut others = Tuning::default_of(DeviceKind::DiscreteGpu);
    for format in Tuning::FORMATS {
        let cut = others.cuts.of_mut(format);
        *cut = Cut { workgroup: 32, rows: 2 * cut.rows };
        let tile = others.tiles.of_mut(format);
        *tile = Tile { workgroup: 64, rows: 2 * tile.rows, tokens: 2 * tile.tokens, ..*tile };
    }
    for tuning in [Tuning::default_of(DeviceKind::DiscreteGpu), others] {
        for (subgroups, packing) in [(true, Packing::Four), (false, Packing::Five)] {
            let options = GpuOptions { subgroups, ..any() };
            some_conform(tuned(options, Tuning { packing, ..tuning }), "linear");
        }
    }
}

/// The table's sums come out of every tile there is, every second with five ternary weights in a byte.
#[test]
fn products_conform_with_every_tile() {
    let all = Tuning::FORMATS.map(|format| Tile::all(format).collect::<Vec<_>>());
    let most = all.iter().map(Vec::len).max().unwrap_or(0);
    let floats = all[1..].iter().map(Vec::len).max().unwrap_or(0);
    let kind = open(any()).device().kind;
    for at in 0..most {
        let mut tuning = Tuning::default_of(kind);
        for (format, tiles) in Tuning::FORMATS.into_iter().zip(&all) {
            *tuning.tiles.of_mut(format) = tiles[at % tiles.len()];
        }
        tuning.packing = Packing::ALL[at % 2];
        // Ternary products have the most tiles.
        some_conform(tuned(any(), tuning), if at < floats { "linear" } else { "linear_ternary" });
    }
}

/// Whether a matrix unit makes any tile is for the tuning to say: every tile that it makes, the small of
/// few tokens too, with both packings and weights in pieces, where an adapter has one.
#[test]
#[ignore = "needs a GPU with a matrix unit"]
fn products_conform_by_a_matrix_unit() {
    let adapter = with_matrix_unit();
    let device = GpuOptions { select: Select::Named(adapter.name.clone()), ..any() };
    let unit = adapter.matrix_unit.expect("chosen for it");
    let all = Tuning::FORMATS.map(|format| Tile::all_by(unit, format).collect::<Vec<_>>());
    assert!(!all[0].is_empty(), "{unit:?} makes no tile of ternary weights");
    let most = all.iter().map(Vec::len).max().unwrap_or(0);
    for at in 0..most {
        let mut tuning = Tuning::default_of(adapter.kind);
        for (format, tiles) in Tuning::FORMATS.into_iter().zip(&all) {
            if !tiles.is_empty() {
                *tuning.tiles.of_mut(format) = tiles[at % tiles.len()];
            }
        }
        tuning.packing = Packing::ALL[at % 2];
        let pieces = (at % 3 == 0).then_some(7 << 10);
        let options = tuned(GpuOptions { max_matrix_block: pieces, ..device.clone() }, tuning);
        let features = open(options.clone()).device().features.clone();
        assert!(features.iter().any(|name| name == "matrix unit"), "{features:?}");
        some_conform(options, "linear");
    }
}

/// What is experimental is not asked for before a tuning wants it, nor where an option forbids it.
#[test]
#[ignore = "needs a GPU with a matrix unit"]
fn a_matrix_unit_is_used_where_a_tuning_wants_it_alone() {
    let uses = |options: GpuOptions| {
        open(options).device().features.iter().any(|name| name == "matrix unit")
    };
    let options = by_matrix_unit();
    assert!(uses(options.clone()));
    assert!(!uses(GpuOptions { matrix_unit: false, ..options.clone() }));
    assert!(!uses(GpuOptions { subgroups: false, ..options.clone() }));
    assert!(!uses(GpuOptions { tunings: Default::default(), ..options.clone() }));
    // Whatever a tuning says, the floor is the floor.
    let floor = GpuOptions { floor_limits: true, f16: false, subgroups: false, ..options };
    assert!(!uses(tuned(floor.clone(), wanting(&floor))));
}

/// A tuning may be of another time: without such a unit its tiles are made as any other.
#[test]
fn products_conform_where_there_is_no_matrix_unit_to_make_them() {
    let options = GpuOptions { matrix_unit: false, ..any() };
    some_conform(tuned(options.clone(), wanting(&options)), "linear");
}
