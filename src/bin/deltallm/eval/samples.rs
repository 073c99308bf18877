//! Every row's outcomes in a file, so that a run that was stopped can go on.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use deltallm::Error;
use deltallm::eval::{Outcome, Stage};
use serde::{Deserialize, Serialize};

/// Name of the file in `--out`.
const FILE: &str = "samples.jsonl";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize, PartialEq)]
struct Header {
    deltallm_eval: u32,
    /// Of everything that outcomes depend on.
    settings: String,
}

#[derive(Serialize, Deserialize)]
struct Sample {
    stage: Stage,
    task: usize,
    row: usize,
    id: String,
    outcomes: Vec<Outcome>,
}

/// Outcomes that are there, and a file that takes more.
#[derive(Default)]
pub struct Samples {
    found: HashMap<(bool, usize, usize), Vec<Outcome>>,
    /// Without one nothing is kept.
    file: Option<(PathBuf, File)>,
}

impl Samples {
    /// Opens or makes the file in a directory; what other settings have left there is an error.
    pub fn open(out: &Path, fresh: bool, settings: &Fingerprint) -> Result<Self, Error> {
        let mut samples = Self::default();
        let path = out.join(FILE);
        let io = |source| Error::Io { path: path.clone(), source };
        let malformed =
            |message: &str| Error::Malformed { path: path.clone(), message: message.to_owned() };
        if out.exists() && !out.is_dir() {
            let message = "is not a directory".into();
            return Err(Error::Malformed { path: out.to_owned(), message });
        }
        fs::create_dir_all(out).map_err(|source| Error::Io { path: out.to_owned(), source })?;
        let header = Header { deltallm_eval: VERSION, settings: settings.to_string() };
        let mut options = OpenOptions::new();
        let mut file = options.create(true).read(true).append(true).open(&path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(malformed("is being written by another run"));
            }
            // Some file systems have no locks.
            Err(TryLockError::Error(error)) => log::warn!("{}: {error}", path.display()),
        }
        let mut whole = 0;
        if !fresh {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(io)?;
            // The last line of a run that was killed may be torn: it is written again.
            whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            bytes.truncate(whole);
            let text = String::from_utf8(bytes).map_err(|_| malformed("is not UTF-8"))?;
            samples.read(&path, &text, &header)?;
        }
        file.set_len(whole as u64).map_err(io)?;
        samples.file = Some((path.clone(), file));
        if whole == 0 {
            samples.line(&header)?;
        }
        Ok(samples)
    }

    /// Reads whole lines.
    fn read(&mut self, path: &Path, text: &str, header: &Header) -> Result<(), Error> {
        let malformed = |message: String| Error::Malformed { path: path.to_owned(), message };
        let mut lines = text.lines();
        let Some(first) = lines.next() else { return Ok(()) };
        if serde_json::from_str::<Header>(first).ok().as_ref() != Some(header) {
            return Err(malformed(
                "holds the outcomes of other tasks or settings, or of another model or device: \
                 choose another --out, or start over with --fresh"
                    .into(),
            ));
        }
        for (number, line) in lines.enumerate() {
            let sample: Sample = serde_json::from_str(line)
                .map_err(|error| malformed(format!("line {}: {error}", number + 2)))?;
            let key = (sample.stage == Stage::Decode, sample.task, sample.row);
            self.found.insert(key, sample.outcomes);
        }
        Ok(())
    }

    /// The outcomes of a row, if an earlier run has them.
    pub fn get(&mut self, stage: Stage, task: usize, row: usize) -> Option<Vec<Outcome>> {
        self.found.remove(&(stage == Stage::Decode, task, row))
    }

    /// Keeps the outcomes of a row.
    pub fn put(
        &mut self,
        stage: Stage,
        task: usize,
        row: usize,
        id: &str,
        outcomes: &[Outcome],
    ) -> Result<(), Error> {
        if self.file.is_none() {
            return Ok(());
        }
        self.line(&Sample { stage, task, row, id: id.to_owned(), outcomes: outcomes.to_vec() })
    }

    fn line(&mut self, value: &impl Serialize) -> Result<(), Error> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        let mut line = serde_json::to_string(value)
            .map_err(|error| Error::Malformed { path: path.clone(), message: error.to_string() })?;
        line.push('\n');
        file.write_all(line.as_bytes()).map_err(|source| Error::Io { path: path.clone(), source })
    }
}

/// FNV-1a with two starts: enough to tell settings apart, and the same in every build.
pub struct Fingerprint([u64; 2]);

impl Default for Fingerprint {
    fn default() -> Self {
        Self([0xcbf2_9ce4_8422_2325, 0x6c62_272e_07bb_0142])
    }
}

impl Fingerprint {
    /// Adds a value as `Debug` writes it, which for floats is exact.
    pub fn add(&mut self, value: &impl fmt::Debug) {
        // Writing into a hash does not fail.
        let _ = fmt::Write::write_fmt(self, format_args!("{value:?}\n"));
    }
}

impl fmt::Write for Fingerprint {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for hash in &mut self.0 {
            for byte in text.bytes() {
                *hash = (*hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
        }
        Ok(())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}{:016x}", self.0[0], self.0[1])
    }
}
