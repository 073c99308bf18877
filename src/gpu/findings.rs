//! What self-tests have found out about devices, for the next time.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::pipelines::Plainer;
use super::shader::source_parts;
use super::tuning::{Tuning, key};
use crate::backend::DeviceInfo;
use crate::checkpoint::read_bounded;
use crate::error::{Error, Result, shortened};
use crate::whole_file::write_whole;

/// A device takes some kilobytes: no machine has seen so many.
const MAX_BYTES: u64 = 1 << 20;

/// What is known of one device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Finding {
    /// Of which build of this crate, and how its work is cut: of no other does it hold.
    build: String,
    /// The questions that it has answered rightly.
    pub(super) right: BTreeSet<String>,
    /// The kernels that must do without some of its abilities.
    pub(super) plainer: Plainer,
}

impl Finding {
    /// Nothing, of a device whose work is cut like this.
    pub(super) fn none(tuning: &Tuning) -> Self {
        Self { build: build(tuning), ..Self::default() }
    }
}

/// What is known of several devices, by name, interface, driver and features in use: another driver is
/// another device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Findings(BTreeMap<String, Finding>);

impl Findings {
    /// What this build knows of a device whose work is cut like this.
    pub(super) fn of(&self, device: &DeviceInfo, tuning: &Tuning) -> Option<&Finding> {
        self.0.get(&key(device)).filter(|finding| finding.build == build(tuning))
    }

    pub(super) fn insert(&mut self, device: &DeviceInfo, finding: Finding) {
        self.0.insert(key(device), finding);
    }

    /// Reads what [`Findings::write`] has written; nothing where there is no such file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`], also where the file is larger than any that was written.
    pub fn read(path: &Path) -> Result<Self> {
        let text = match read_bounded(path, MAX_BYTES) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            text => text?,
        };
        serde_json::from_slice(&text).map_err(|error| Error::Malformed {
            path: path.to_owned(),
            message: shortened(error.to_string()),
        })
    }

    /// Writes a file, which appears when it is whole and replaces what was there; makes its folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] where something that is not a regular file stands there.
    pub fn write(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .map_err(|source| Error::Io { path: folder.to_owned(), source })?;
        }
        // A map of text to text is JSON without fail.
        let text = serde_json::to_string_pretty(self).unwrap_or_default() + "\n";
        write_whole(path, &text)
    }
}

/// A name for the kernels of this build and how they are cut.
fn build(tuning: &Tuning) -> String {
    static SOURCES: OnceLock<u64> = OnceLock::new();
    let sources = SOURCES.get_or_init(|| {
        let mut hasher = DefaultHasher::new();
        source_parts().hash(&mut hasher);
        hasher.finish()
    });
    let mut hasher = DefaultHasher::new();
    tuning.hash(&mut hasher);
    format!("{} {sources:016x} {:016x}", env!("CARGO_PKG_VERSION"), hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::DeviceKind;

    #[test]
    fn findings_hold_for_one_driver_build_and_tuning() {
        let device = |driver: &str| DeviceInfo {
            name: "a GPU".into(),
            kind: DeviceKind::IntegratedGpu,
            backend: "vulkan".into(),
            driver: driver.into(),
            features: Vec::new(),
        };
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("new").join("findings.json");
        assert_eq!(Findings::read(&path).expect("no file is no finding"), Findings::default());
        let tuning = Tuning::default_of(DeviceKind::IntegratedGpu);
        let mut finding = Finding::none(&tuning);
        finding.right.insert("norm: to F32".into());
        let mut findings = Findings::default();
        findings.insert(&device("1.0"), finding.clone());
        findings.write(&path).expect("written");
        let read = Findings::read(&path).expect("read");
        assert_eq!(read.of(&device("1.0"), &tuning), Some(&finding));
        assert_eq!(read.of(&device("1.1"), &tuning), None);
        assert_eq!(read.of(&device("1.0"), &Tuning::default_of(DeviceKind::SoftwareGpu)), None);
        finding.build = "0.0.0".into();
        findings.insert(&device("1.0"), finding);
        assert_eq!(findings.of(&device("1.0"), &tuning), None);
        std::fs::write(&path, "{\"a GPU\": 7}").expect("written");
        let error = Findings::read(&path).expect_err("no finding").to_string();
        assert!(error.contains("findings.json"), "{error}");
    }
}
