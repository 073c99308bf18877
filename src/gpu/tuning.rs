//! What can be tuned for a device. Nobody knows beforehand which cut of the work suits a driver:
//! [`tune`](super::tune) measures it.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::packing::Packing;
use super::tile::Tile;
use crate::backend::{DeviceInfo, DeviceKind, MatrixFormat};
use crate::checkpoint::read_bounded;
use crate::error::{Error, Result, shortened};
use crate::whole_file::write_whole;

/// A device takes a kilobyte: no machine has seen so many.
const MAX_BYTES: u64 = 1 << 20;

/// How a workgroup of a product with few tokens is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cut {
    /// Invocations, which share out the columns: a power of two from 8 to 256.
    pub workgroup: u32,
    /// Storage rows: 2 or 4 of ternary matrices, 4 or 8 of others.
    pub rows: u32,
}

impl Cut {
    /// Every cut of a format.
    pub fn all(format: MatrixFormat) -> impl Iterator<Item = Self> {
        let least = least_rows(format);
        let sizes = [8, 16, 32, 64, 128, 256].into_iter();
        sizes.flat_map(move |workgroup| [1, 2].map(|n| Self { workgroup, rows: n * least }))
    }
}

impl Cut {
    fn check(self, format: MatrixFormat) -> Result<()> {
        if Self::all(format).any(|possible| possible == self) {
            return Ok(());
        }
        let (Self { workgroup, rows }, least) = (self, least_rows(format));
        Err(Error::Parameter {
            name: "tuning",
            value: format!("{}: workgroup {workgroup}, rows {rows}", format.name()),
            allowed: format!(
                "a workgroup must be a power of two from 8 to 256, rows {least} or {}",
                2 * least
            ),
        })
    }
}

/// `64x4`: invocations, rows.
impl Display for Cut {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.workgroup, self.rows)
    }
}

fn least_rows(format: MatrixFormat) -> u32 {
    if format == MatrixFormat::Ternary { 2 } else { 4 }
}

/// Something of each format of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Formats<T> {
    /// Of ternary matrices.
    pub ternary: T,
    /// Of `f32`.
    pub f32: T,
    /// Of `f16`.
    pub f16: T,
    /// Of `bf16`.
    pub bf16: T,
    /// Of 8 bits.
    pub q8: T,
    /// Of 4 bits.
    pub q4: T,
}

impl<T> Formats<T> {
    /// One of each.
    pub fn each(mut of: impl FnMut(MatrixFormat) -> T) -> Self {
        Self {
            ternary: of(MatrixFormat::Ternary),
            f32: of(MatrixFormat::F32),
            f16: of(MatrixFormat::F16),
            bf16: of(MatrixFormat::BF16),
            q8: of(MatrixFormat::Q8),
            q4: of(MatrixFormat::Q4),
        }
    }

    /// That of a format.
    pub fn of(&self, format: MatrixFormat) -> &T {
        match format {
            MatrixFormat::Ternary => &self.ternary,
            MatrixFormat::F32 => &self.f32,
            MatrixFormat::F16 => &self.f16,
            MatrixFormat::BF16 => &self.bf16,
            MatrixFormat::Q8 => &self.q8,
            MatrixFormat::Q4 => &self.q4,
        }
    }

    /// The same to be changed.
    pub fn of_mut(&mut self, format: MatrixFormat) -> &mut T {
        match format {
            MatrixFormat::Ternary => &mut self.ternary,
            MatrixFormat::F32 => &mut self.f32,
            MatrixFormat::F16 => &mut self.f16,
            MatrixFormat::BF16 => &mut self.bf16,
            MatrixFormat::Q8 => &mut self.q8,
            MatrixFormat::Q4 => &mut self.q4,
        }
    }
}

/// How the products of a device are cut, and what they read is packed.
///
/// The default for GPUs was chosen by reasoning, since none was at hand; that for software renderers
/// was measured on llvmpipe, where a barrier of a workgroup costs more than the work between, and a read
/// of workgroup memory as much as a multiplication.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Tuning {
    /// Those with few tokens, by their weights.
    pub cuts: Formats<Cut>,
    /// Those with many.
    pub tiles: Formats<Tile>,
    /// How ternary weights lie on the device, for both.
    pub packing: Packing,
}

impl Tuning {
    /// Where nothing is known but the kind of a device.
    pub fn default_of(kind: DeviceKind) -> Self {
        let software = kind == DeviceKind::SoftwareGpu;
        let workgroup = if software { 8 } else { 64 };
        // Levels take many instructions to decode: beside those, what four more rows take is little.
        let levels = |format| matches!(format, MatrixFormat::Q8 | MatrixFormat::Q4);
        let more = |format| if software && levels(format) { 2 } else { 1 };
        let cut = |format| Cut { workgroup, rows: more(format) * least_rows(format) };
        let tile_of =
            |workgroup, rows, tokens| Tile { workgroup, rows, tokens, matrix_unit: false };
        let tile = |format| match format {
            MatrixFormat::Ternary if software => tile_of(64, 2, 16),
            MatrixFormat::Ternary => tile_of(256, 1, 8),
            _ if software => tile_of(64, 8, 8),
            _ => tile_of(256, 4, 4),
        };
        let packing = Packing::default();
        Self { cuts: Formats::each(cut), tiles: Formats::each(tile), packing }
    }

    /// Whether a matrix unit is to make any tile.
    pub(super) fn wants_matrix_unit(&self) -> bool {
        Self::FORMATS.into_iter().any(|format| self.tiles.of(format).matrix_unit)
    }

    /// The formats that there are.
    pub const FORMATS: [MatrixFormat; 6] = [
        MatrixFormat::Ternary,
        MatrixFormat::F32,
        MatrixFormat::F16,
        MatrixFormat::BF16,
        MatrixFormat::Q8,
        MatrixFormat::Q4,
    ];

    /// # Errors
    /// [`Error::Parameter`] where a cut is none of [`Cut::all`] or a tile none of [`Tile::all`].
    pub fn check(&self) -> Result<()> {
        Self::FORMATS.into_iter().try_for_each(|format| {
            self.cuts.of(format).check(format)?;
            self.tiles.of(format).check(format)
        })
    }
}

/// The tunings of several devices, by name, interface, driver and features in use: another driver is
/// another device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tunings(BTreeMap<String, Formats<Entry>>);

/// What a file says of a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    // Of the cut, which was all there was to tune once.
    workgroup: u32,
    rows: u32,
    /// Absent from files of that time: what they know stays good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tile: Option<Tile>,
    /// Of ternary weights; absent from files that know of one packing alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    packing: Option<Packing>,
}

impl Entry {
    fn cut(self) -> Cut {
        Cut { workgroup: self.workgroup, rows: self.rows }
    }

    fn check(self, format: MatrixFormat) -> Result<()> {
        self.cut().check(format)?;
        if let (Some(packing), true) = (self.packing, format != MatrixFormat::Ternary) {
            return Err(Error::Parameter {
                name: "tuning",
                value: format!("{}: packing {packing}", format.name()),
                allowed: "only ternary weights are packed".to_owned(),
            });
        }
        self.tile.map_or(Ok(()), |tile| tile.check(format))
    }
}

impl Tunings {
    /// The tuning of a device, where there is one; what it leaves open is as by default.
    pub fn of(&self, device: &DeviceInfo) -> Option<Tuning> {
        let entries = self.0.get(&tuned_key(device))?;
        let default = Tuning::default_of(device.kind);
        let tile = |format| entries.of(format).tile.unwrap_or(*default.tiles.of(format));
        let cut = |format| entries.of(format).cut();
        let packing = entries.ternary.packing.unwrap_or(default.packing);
        Some(Tuning { cuts: Formats::each(cut), tiles: Formats::each(tile), packing })
    }

    /// Sets the tuning of a device.
    pub fn insert(&mut self, device: &DeviceInfo, tuning: Tuning) {
        let entry = |format| {
            let Cut { workgroup, rows } = *tuning.cuts.of(format);
            let packing = (format == MatrixFormat::Ternary).then_some(tuning.packing);
            Entry { workgroup, rows, tile: Some(*tuning.tiles.of(format)), packing }
        };
        self.0.insert(tuned_key(device), Formats::each(entry));
    }

    /// Reads what [`Tunings::write`] has written.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`], where a cut, a tile or a packing is impossible among its
    /// reasons.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let malformed = |message: String| Error::Malformed {
            path: path.to_owned(),
            message: shortened(message),
        };
        let text = read_bounded(path, MAX_BYTES)?;
        let tunings: Self =
            serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        for (device, entries) in &tunings.0 {
            Tuning::FORMATS
                .into_iter()
                .try_for_each(|format| entries.of(format).check(format))
                .map_err(|error| malformed(format!("{device:?}: {error}")))?;
        }
        Ok(tunings)
    }

    /// Writes a file, which appears when it is whole and replaces what was there.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] where something that is not a regular file stands there.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        // A map of text to numbers is JSON without fail.
        let text = serde_json::to_string_pretty(self).unwrap_or_default() + "\n";
        write_whole(path.as_ref(), &text)
    }
}

/// Among [`DeviceInfo::features`]: a matrix unit is in use.
pub(super) const MATRIX_UNIT: &str = "matrix unit";

/// Whether a matrix unit is in use is for the tuning to say.
fn tuned_key(device: &DeviceInfo) -> String {
    let mut device = device.clone();
    device.features.retain(|feature| feature != MATRIX_UNIT);
    key(&device)
}

/// What is known of one device holds for no other.
pub(super) fn key(device: &DeviceInfo) -> String {
    let DeviceInfo { name, backend, driver, features, .. } = device;
    format!("{name}, {backend}, {driver}, {}", features.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunings_are_read_as_they_were_written() {
        let device = |driver: &str| DeviceInfo {
            name: "a GPU".into(),
            kind: DeviceKind::IntegratedGpu,
            backend: "vulkan".into(),
            driver: driver.into(),
            features: Vec::new(),
        };
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tunings.json");
        let mut tuning = Tuning::default_of(DeviceKind::IntegratedGpu);
        tuning.cuts.bf16.workgroup = 32;
        tuning.tiles.q4.tokens = 8;
        tuning.tiles.f16.matrix_unit = true;
        tuning.packing = Packing::Five;
        let mut tunings = Tunings::default();
        tunings.insert(&device("1.0"), tuning);
        tunings.write(&path).expect("written");
        let read = Tunings::read(&path).expect("read");
        assert_eq!(read.of(&device("1.0")), Some(tuning));
        assert_eq!(read.of(&device("1.1")), None, "another driver is another device");
        // Who has tuned it had it open with its matrix unit, and who asks has not yet.
        let mut open = device("1.0");
        open.features.push(MATRIX_UNIT.to_owned());
        assert_eq!(read.of(&open), Some(tuning));
        let mut again = Tunings::default();
        again.insert(&open, tuning);
        assert_eq!(again, read);
        for (text, what) in
            [("{", "EOF"), (r#"{"a GPU": {}}"#, "ternary"), (r#"{"a GPU": {"what": 1}}"#, "what")]
        {
            std::fs::write(&path, text).expect("written");
            let error = Tunings::read(&path).expect_err(text).to_string();
            assert!(error.contains("tunings.json") && error.contains(what), "{error}");
        }
        let possible = serde_json::to_string(&tunings).expect("JSON");
        // Of other tiles nothing is said: files of before say as much.
        assert_eq!(possible.matches("matrix_unit").count(), 1, "{possible}");
        std::fs::write(&path, possible.replace(":32", ":33")).expect("written");
        let error = Tunings::read(&path).expect_err("33 invocations").to_string();
        assert!(error.contains("tunings.json") && error.contains("workgroup 33"), "{error}");
        std::fs::write(&path, possible.replace("\"tokens\":8", "\"tokens\":9")).expect("written");
        let error = Tunings::read(&path).expect_err("9 tokens").to_string();
        assert!(error.contains("tunings.json") && error.contains("tokens 9"), "{error}");
        for (from, to, what) in [
            ("\"five\"", "\"six\"", "six"),
            ("\"five\"", "5", "expected value"),
            ("\"matrix_unit\":true", "\"matrix_unit\":1", "boolean"),
            ("\"matrix_unit\":true", "\"matrix\":true", "matrix"),
            ("\"f16\":{", "\"f16\":{\"packing\":\"four\",", "f16: packing four"),
        ] {
            std::fs::write(&path, possible.replace(from, to)).expect("written");
            let error = Tunings::read(&path).expect_err(what).to_string();
            assert!(error.contains("tunings.json") && error.contains(what), "{error}");
        }
        assert!(matches!(Tunings::read(folder.path()), Err(Error::Malformed { .. })));
        let absent = Tunings::read(folder.path().join("absent"));
        assert!(matches!(absent, Err(Error::Io { .. })));
    }

    /// What earlier versions wrote, which knew of no tiles and of one packing.
    #[test]
    fn a_file_of_cuts_alone_says_nothing_of_the_rest() {
        for kind in [DeviceKind::DiscreteGpu, DeviceKind::SoftwareGpu] {
            let device = DeviceInfo {
                name: "a GPU".into(),
                kind,
                backend: "vulkan".into(),
                driver: "1.0".into(),
                features: vec!["f16".into()],
            };
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join("tunings.json");
            let cut = |rows: u32| format!(r#"{{ "workgroup": 32, "rows": {rows} }}"#);
            let (ternary, float) = (cut(4), cut(8));
            let floats =
                ["f32", "f16", "bf16", "q8", "q4"].map(|name| format!(r#""{name}": {float}"#));
            let text = format!(
                r#"{{ "a GPU, vulkan, 1.0, f16": {{ "ternary": {ternary}, {} }} }}"#,
                floats.join(", ")
            );
            std::fs::write(&path, text).expect("written");
            let mut tunings = Tunings::read(&path).expect("an older file is no error");
            let cut = |format| Cut { workgroup: 32, rows: 2 * least_rows(format) };
            let tiles = Tuning::default_of(kind).tiles;
            let tuning = Tuning { cuts: Formats::each(cut), tiles, packing: Packing::Four };
            assert_eq!(tunings.of(&device), Some(tuning));
            // Another device that is tuned adds nothing to what is not known of this one.
            let other = DeviceInfo { name: "another".into(), ..device.clone() };
            tunings.insert(&other, tuning);
            tunings.write(&path).expect("written");
            assert_eq!(Tunings::read(&path).expect("read"), tunings);
        }
    }

    #[test]
    fn the_default_is_possible_and_other_numbers_are_not() {
        let mut tuning = Tuning::default_of(DeviceKind::IntegratedGpu);
        tuning.check().expect("the default");
        for cut in [(48, 4), (512, 4), (64, 2), (64, 16)] {
            tuning.cuts.q8 = Cut { workgroup: cut.0, rows: cut.1 };
            assert!(matches!(tuning.check(), Err(Error::Parameter { name: "tuning", .. })));
        }
        for kind in [DeviceKind::DiscreteGpu, DeviceKind::SoftwareGpu] {
            let mut tuning = Tuning::default_of(kind);
            tuning.check().expect("the default");
            for tile in [(32, 4, 4), (512, 4, 4), (64, 1, 4), (64, 4, 2), (256, 8, 8)] {
                let (workgroup, rows, tokens) = tile;
                tuning.tiles.q8 = Tile { workgroup, rows, tokens, matrix_unit: false };
                assert!(matches!(tuning.check(), Err(Error::Parameter { name: "tuning", .. })));
            }
        }
    }
}
