//! What can be tuned for a device. Nobody knows beforehand which cut of the work suits a driver:
//! [`tune`](super::tune) measures it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::backend::{DeviceInfo, DeviceKind, MatrixFormat};
use crate::checkpoint::read_bounded;
use crate::error::{Error, Result, shortened};
use crate::whole_file::write_whole;

/// A device takes half a kilobyte: no machine has seen so many.
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

fn least_rows(format: MatrixFormat) -> u32 {
    if format == MatrixFormat::Ternary { 2 } else { 4 }
}

/// The cut of each format.
///
/// The default for GPUs was chosen by reasoning, since none was at hand; that for software renderers
/// was measured on llvmpipe, where a barrier of a workgroup costs more than the work between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    /// Of ternary matrices.
    pub ternary: Cut,
    /// Of `f32`.
    pub f32: Cut,
    /// Of `f16`.
    pub f16: Cut,
    /// Of `bf16`.
    pub bf16: Cut,
    /// Of 8 bits.
    pub q8: Cut,
    /// Of 4 bits.
    pub q4: Cut,
}

impl Tuning {
    /// Where nothing is known but the kind of a device.
    pub fn default_of(kind: DeviceKind) -> Self {
        let workgroup = if kind == DeviceKind::SoftwareGpu { 8 } else { 64 };
        let (float, ternary) = (Cut { workgroup, rows: 4 }, Cut { workgroup, rows: 2 });
        Self { ternary, f32: float, f16: float, bf16: float, q8: float, q4: float }
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

    /// The cut of a format.
    pub fn of(&self, format: MatrixFormat) -> Cut {
        match format {
            MatrixFormat::Ternary => self.ternary,
            MatrixFormat::F32 => self.f32,
            MatrixFormat::F16 => self.f16,
            MatrixFormat::BF16 => self.bf16,
            MatrixFormat::Q8 => self.q8,
            MatrixFormat::Q4 => self.q4,
        }
    }

    /// The same to be changed.
    pub fn of_mut(&mut self, format: MatrixFormat) -> &mut Cut {
        match format {
            MatrixFormat::Ternary => &mut self.ternary,
            MatrixFormat::F32 => &mut self.f32,
            MatrixFormat::F16 => &mut self.f16,
            MatrixFormat::BF16 => &mut self.bf16,
            MatrixFormat::Q8 => &mut self.q8,
            MatrixFormat::Q4 => &mut self.q4,
        }
    }

    /// # Errors
    /// [`Error::Parameter`] where a cut is none of [`Cut::all`].
    pub fn check(&self) -> Result<()> {
        for format in Self::FORMATS {
            let cut = self.of(format);
            if !Cut::all(format).any(|possible| possible == cut) {
                let Cut { workgroup, rows } = cut;
                let least = least_rows(format);
                return Err(Error::Parameter {
                    name: "tuning",
                    value: format!("{}: workgroup {workgroup}, rows {rows}", format.name()),
                    allowed: format!(
                        "a workgroup must be a power of two from 8 to 256, rows {least} or {}",
                        2 * least
                    ),
                });
            }
        }
        Ok(())
    }
}

/// The tunings of several devices, by name, interface, driver and features in use: another driver is
/// another device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tunings(BTreeMap<String, Tuning>);

impl Tunings {
    /// The tuning of a device, where there is one.
    pub fn of(&self, device: &DeviceInfo) -> Option<&Tuning> {
        self.0.get(&key(device))
    }

    /// Sets the tuning of a device.
    pub fn insert(&mut self, device: &DeviceInfo, tuning: Tuning) {
        self.0.insert(key(device), tuning);
    }

    /// Reads what [`Tunings::write`] has written.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`], with what [`Tuning::check`] says among its reasons.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let malformed = |message: String| Error::Malformed {
            path: path.to_owned(),
            message: shortened(message),
        };
        let text = read_bounded(path, MAX_BYTES)?;
        let tunings: Self =
            serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        for (device, tuning) in &tunings.0 {
            tuning.check().map_err(|error| malformed(format!("{device:?}: {error}")))?;
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
        tuning.bf16.workgroup = 32;
        let mut tunings = Tunings::default();
        tunings.insert(&device("1.0"), tuning);
        tunings.write(&path).expect("written");
        let read = Tunings::read(&path).expect("read");
        assert_eq!(read.of(&device("1.0")), Some(&tuning));
        assert_eq!(read.of(&device("1.1")), None, "another driver is another device");
        for (text, what) in
            [("{", "EOF"), (r#"{"a GPU": {}}"#, "ternary"), (r#"{"a GPU": {"what": 1}}"#, "what")]
        {
            std::fs::write(&path, text).expect("written");
            let error = Tunings::read(&path).expect_err(text).to_string();
            assert!(error.contains("tunings.json") && error.contains(what), "{error}");
        }
        let possible = serde_json::to_string(&tunings).expect("JSON");
        std::fs::write(&path, possible.replace(":32", ":33")).expect("written");
        let error = Tunings::read(&path).expect_err("33 invocations").to_string();
        assert!(error.contains("tunings.json") && error.contains("workgroup 33"), "{error}");
        assert!(matches!(Tunings::read(folder.path()), Err(Error::Malformed { .. })));
        let absent = Tunings::read(folder.path().join("absent"));
        assert!(matches!(absent, Err(Error::Io { .. })));
    }

    #[test]
    fn the_default_is_possible_and_other_numbers_are_not() {
        let mut tuning = Tuning::default_of(DeviceKind::IntegratedGpu);
        tuning.check().expect("the default");
        for cut in [(48, 4), (512, 4), (64, 2), (64, 16)] {
            tuning.q8 = Cut { workgroup: cut.0, rows: cut.1 };
            assert!(matches!(tuning.check(), Err(Error::Parameter { name: "tuning", .. })));
        }
    }
}
