//! The directory of a run: `<date>-<device>/`.

use std::fs;
use std::path::{Path, PathBuf};

use deltallm::{Error, write_whole};

use super::chart;
use super::report::Report;

/// Characters of a device's name that go into the directory's.
const NAME: usize = 32;

/// Refuses a place in which no directory can be made, before anything is measured.
pub fn check(out: &Path) -> Result<(), Error> {
    // The ancestors of a relative path end with the empty one.
    let here = |path: &Path| if path.as_os_str().is_empty() { ".".into() } else { path.to_owned() };
    let Some(place) = out.ancestors().map(here).find(|path| path.exists()) else {
        return Ok(());
    };
    if !place.is_dir() {
        let message = "is a file: no directory can be made in it".into();
        return Err(Error::Malformed { path: place, message });
    }
    // Permissions do not tell whether one can be made there; making one does.
    let probe = place.join(format!(".deltallm-{}", std::process::id()));
    fs::create_dir(&probe)
        .and_then(|()| fs::remove_dir(&probe))
        .map_err(|source| Error::Io { path: out.to_owned(), source })
}

/// Writes a run into a new directory within `out`, and gives its name.
pub fn write(out: &Path, report: &Report) -> Result<PathBuf, Error> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    };
    fs::create_dir_all(out).map_err(io(out))?;
    let devices: Vec<String> =
        report.devices.iter().map(|device| slug(&device.info.name)).collect();
    let base = format!("{}-{}", report.date, devices.join("+"));
    let (mut directory, mut number) = (out.join(&base), 2);
    // An earlier run of the day stays as it is.
    while let Err(error) = fs::create_dir(&directory) {
        if error.kind() != std::io::ErrorKind::AlreadyExists {
            return Err(io(&directory)(error));
        }
        directory = out.join(format!("{base}-{number}"));
        number += 1;
    }
    write_whole(&directory.join("README.md"), &report.markdown())?;
    write_whole(&directory.join("results.json"), &format!("{:#}\n", report.json()))?;
    write_whole(&directory.join("results.csv"), &report.csv())?;
    write_whole(&directory.join("chart.svg"), &format!("{}\n", chart::draw(report)))?;
    Ok(directory)
}

/// A name fit for a directory: letters, digits and dashes, what is in brackets left out.
fn slug(name: &str) -> String {
    let before = name.split('(').next().filter(|before| !before.trim().is_empty());
    let mut slug = String::new();
    for word in before.unwrap_or(name).split(|c: char| !c.is_ascii_alphanumeric()) {
        if !word.is_empty() && slug.len() + word.len() < NAME {
            if !slug.is_empty() {
                slug.push('-');
            }
            slug += &word.to_lowercase();
        }
    }
    if slug.is_empty() { "device".to_owned() } else { slug }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_fit_for_directories() {
        assert_eq!(slug("llvmpipe (LLVM 15.0.6, 256 bits)"), "llvmpipe");
        assert_eq!(slug("AMD EPYC 9R14 96-Core Processor"), "amd-epyc-9r14-96-core-processor");
        assert_eq!(slug("Intel(R) UHD Graphics 620 (WHL GT2)"), "intel");
        assert_eq!(slug("(TM)"), "tm");
        assert_eq!(slug("../??"), "device");
    }
}
