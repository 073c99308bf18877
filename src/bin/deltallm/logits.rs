//! `deltallm logits`: the logits of every position, as a file.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use deltallm::{Cancel, Error};
use serde_json::json;

use crate::args::ModelArgs;
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
}

/// Runs the command.
pub fn run(args: &Args) -> Outcome {
    let ids = read_ids(&args.ids)?;
    let cancel = Cancel::default();
    stop_on_interrupt(cancel.clone());
    let opened = args.model.open(&cancel)?;
    let model = &opened.model;
    let vocabulary = model.config().vocabulary;

    // What is at --out stays until the new file is whole.
    let partial = partial_path(&args.out);
    let written = write(&partial, &[ids.len(), vocabulary], |file| {
        let bar = token_bar(ids.len());
        let cache = args.model.cache.into();
        model.logits(&ids, cache, &cancel, |rows| {
            bar.inc((rows.len() / vocabulary) as u64);
            let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
            file.write_all(&bytes).map_err(|source| io_error(&partial, source))
        })
    })
    .and_then(|()| fs::rename(&partial, &args.out).map_err(|e| io_error(&args.out, e)));
    if written.is_err() {
        // The error at hand says more than one about the leftover would.
        let _ = fs::remove_file(&partial);
    }
    Ok(written?)
}

/// Writes a safetensors file of one tensor, whose numbers `fill` appends.
fn write(
    path: &Path,
    shape: &[usize; 2],
    fill: impl FnOnce(&mut BufWriter<File>) -> Result<(), Error>,
) -> Result<(), Error> {
    let bytes = 4 * shape[0] * shape[1];
    let tensor = json!({ "dtype": "F32", "shape": shape, "data_offsets": [0, bytes] });
    let mut header = json!({ "logits": tensor }).to_string();
    // The numbers begin at a multiple of 8 bytes, as the format's own writer has it.
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());

    let fail = |source| io_error(path, source);
    let mut file = BufWriter::new(File::create(path).map_err(fail)?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(fail)?;
    file.write_all(header.as_bytes()).map_err(fail)?;
    fill(&mut file)?;
    file.into_inner().map_err(|error| fail(error.into_error()))?.sync_all().map_err(fail)
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

fn partial_path(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    out.with_file_name(name)
}

fn io_error(path: &Path, source: std::io::Error) -> Error {
    Error::Io { path: path.to_owned(), source }
}
