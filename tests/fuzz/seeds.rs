//! Writes valid inputs of every kind to tests/fuzz/corpus, for the fuzzers to begin with.

#[path = "../hostile_common/mod.rs"]
mod hostile_common;

use std::fs;
use std::io;
use std::path::Path;

use hostile_common::{targets, valid};

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for name in targets::NAMES {
        let folder = corpus.join(name);
        fs::create_dir_all(&folder)?;
        for (i, seed) in valid::seeds(name).iter().enumerate() {
            fs::write(folder.join(format!("valid-{i}")), seed)?;
        }
    }
    Ok(())
}
