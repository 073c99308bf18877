//! `deltallm logits`: the logits of every position, as a file.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use deltallm::{Cancel, Error, LogitsOptions, LogitsRun};
use serde_json::json;

use crate::args::ModelArgs;
use crate::attention_args::{Attention, AttentionArgs};
use crate::output::{Outcome, stop_on_interrupt, token_bar};

/// Options of `logits`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// File of token ids, separated by spaces, commas or newlines
    #[arg(long, value_name = "FILE")]
    ids: PathBuf,

    /// File to write: safetensors with one f32 tensor `logits` [tokens, vocabulary]
    #[arg(long, value_name = "FILE")]
    out: PathBuf,

    #[command(flatten)]
    attention: AttentionArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Outcome {
    let Attention { policy, thresholds } = args.attention.prompt_policy()?;
    let ids = read_ids(&args.ids)?;
    // Before the model is opened: a path that cannot be written should not cost a minute.
    let mut partial = Partial::create(&args.out)?;
    let cancel = Cancel::default();
    stop_on_interrupt(cancel.clone());
    let opened = args.model.open(&cancel)?;
    let model = &opened.model;
    let vocabulary = model.config().vocabulary;

    let bar = token_bar(ids.len());
    partial.write(&header(&[ids.len(), vocabulary]))?;
    let options = LogitsOptions { attention: policy, thresholds, ..LogitsOptions::default() };
    let mut run = LogitsRun::new(model, ids, &options, &cancel)?;
    while let Some(rows) = run.next_rows()? {
        bar.inc((rows.len() / vocabulary) as u64);
        let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
        partial.write(&bytes)?;
    }
    Ok(partial.finish()?)
}

/// The start of a safetensors file with one tensor `logits` of this shape.
fn header(shape: &[usize; 2]) -> Vec<u8> {
    let bytes = 4 * shape[0] * shape[1];
    let tensor = json!({ "dtype": "F32", "shape": shape, "data_offsets": [0, bytes] });
    let mut json = json!({ "logits": tensor }).to_string();
    // The numbers begin at a multiple of 8 bytes, as the format's own writer has it.
    json += &" ".repeat(json.len().next_multiple_of(8) - json.len());
    [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat()
}

/// A file on its way to `--out`: what stands there stays until the new one is whole, and nothing is
/// left over if it never is.
struct Partial {
    out: PathBuf,
    file: BufWriter<tempfile::NamedTempFile>,
}

impl Partial {
    fn create(out: &Path) -> Result<Self, Error> {
        // What a symbolic link points to is replaced, not the link; a device or a pipe never is.
        let out = fs::canonicalize(out).unwrap_or_else(|_| out.to_owned());
        if out.exists() && !out.is_file() {
            let message = "exists and is not a regular file".into();
            return Err(Error::Malformed { path: out, message });
        }
        let parent = match out.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        // As any file that a program makes, not for its owner alone.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.prefix(".logits-").tempfile_in(parent);
        let file = BufWriter::new(file.map_err(|source| io_error(&out, source))?);
        Ok(Self { out, file })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(|source| io_error(&self.out, source))
    }

    fn finish(self) -> Result<(), Error> {
        let fail = |source| io_error(&self.out, source);
        let file = self.file.into_inner().map_err(|error| fail(error.into_error()))?;
        file.as_file().sync_all().map_err(fail)?;
        file.persist(&self.out).map(drop).map_err(|error| fail(error.error))
    }
}

fn read_ids(path: &Path) -> Result<Vec<u32>, Error> {
    let text = fs::read_to_string(path).map_err(|source| io_error(path, source))?;
    let words = text.split(|c: char| c.is_whitespace() || c == ',').filter(|w| !w.is_empty());
    words
        .enumerate()
        .map(|(index, word)| {
            word.parse().map_err(|_| Error::Malformed {
                path: path.to_owned(),
                message: format!("entry {} is {word:?}, expected a token id", index + 1),
            })
        })
        .collect()
}

fn io_error(path: &Path, source: std::io::Error) -> Error {
    Error::Io { path: path.to_owned(), source }
}
