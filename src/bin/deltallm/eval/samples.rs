//! Every row's outcomes in a file, so that a run that was stopped can go on.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
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
pub struct Samples {
    found: HashMap<(bool, usize, usize), Vec<Outcome>>,
    file: Option<(PathBuf, File)>,
}

impl Samples {
    /// Without a directory nothing is kept.
    pub fn open(out: Option<&Path>, fresh: bool, settings: &str) -> Result<Self, Error> {
        let mut samples = Self { found: HashMap::new(), file: None };
        let Some(out) = out else { return Ok(samples) };
        let path = out.join(FILE);
        let io = |source| Error::Io { path: path.clone(), source };
        fs::create_dir_all(out).map_err(|source| Error::Io { path: out.to_owned(), source })?;
        let header = Header { deltallm_eval: VERSION, settings: fingerprint(settings) };
        let mut whole = 0;
        if !fresh && path.exists() {
            let text = fs::read_to_string(&path).map_err(io)?;
            whole = samples.read(&path, &text, &header)?;
        }
        // The last line of a run that was killed may be torn: it is written again.
        let mut file = OpenOptions::new();
        let mut file =
            file.create(true).write(true).truncate(whole == 0).open(&path).map_err(io)?;
        file.set_len(whole as u64).map_err(io)?;
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).map_err(io)?;
        samples.file = Some((path.clone(), file));
        if whole == 0 {
            samples.line(&header)?;
        }
        Ok(samples)
    }

    /// Reads what is there; returns how many bytes of it are whole lines.
    fn read(&mut self, path: &Path, text: &str, header: &Header) -> Result<usize, Error> {
        let malformed = |message: String| Error::Malformed { path: path.to_owned(), message };
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut lines = text[..whole].lines();
        let Some(first) = lines.next() else { return Ok(0) };
        if serde_json::from_str::<Header>(first).ok().as_ref() != Some(header) {
            return Err(malformed(
                "holds the outcomes of other tasks, settings or another model: choose another \
                 --out, or start over with --fresh"
                    .into(),
            ));
        }
        for (number, line) in lines.enumerate() {
            let sample: Sample = serde_json::from_str(line)
                .map_err(|error| malformed(format!("line {}: {error}", number + 2)))?;
            self.found
                .insert((sample.stage == Stage::Decode, sample.task, sample.row), sample.outcomes);
        }
        Ok(whole)
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

/// FNV-1a of a text, in two halves with different starts: enough to tell settings apart, and the
/// same in every build.
fn fingerprint(text: &str) -> String {
    let hash = |start: u64| {
        text.bytes()
            .fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
    };
    format!("{:016x}{:016x}", hash(0xcbf2_9ce4_8422_2325), hash(0x6c62_272e_07bb_0142))
}
