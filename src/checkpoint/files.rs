//! Where the files of a checkpoint are: in a directory, or in memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::matrix::Bytes;
use crate::error::{Error, Result};

/// The files of a checkpoint. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) enum Files {
    Directory(PathBuf),
    Memory {
        /// What stands for the directory in errors.
        name: PathBuf,
        files: Arc<BTreeMap<String, Bytes>>,
    },
}

impl Files {
    /// The directory, or what stands for it.
    pub fn root(&self) -> &Path {
        match self {
            Self::Directory(dir) => dir,
            Self::Memory { name, .. } => name,
        }
    }

    /// The file's path, as errors name it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// Whether there is such a file, if only as a link that leads nowhere: opening that is an error
    /// to be reported.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::Directory(dir) => dir.join(name).symlink_metadata().is_ok(),
            Self::Memory { files, .. } => files.contains_key(name),
        }
    }

    /// The bytes of a regular file of at most `limit` bytes.
    ///
    /// # Errors
    /// [`Error::Io`] of kind `NotFound` where there is no such file.
    pub fn read(&self, name: &str, limit: u64) -> Result<Cow<'_, [u8]>> {
        match self {
            Self::Directory(dir) => read_bounded(&dir.join(name), limit).map(Cow::Owned),
            Self::Memory { .. } => {
                let bytes = &self.in_memory(name)?[..];
                check_size(&self.path(name), bytes, limit)?;
                Ok(Cow::Borrowed(bytes))
            }
        }
    }

    /// [`Files::read`] of a file that need not be there. A link that leads nowhere is there: it is
    /// what a download that was broken off leaves.
    pub fn read_optional(&self, name: &str, limit: u64) -> Result<Option<Cow<'_, [u8]>>> {
        match self.read(name, limit) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error::Io { source, .. })
                if source.kind() == ErrorKind::NotFound && !self.contains(name) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// A file that is in memory.
    pub fn in_memory(&self, name: &str) -> Result<&Bytes> {
        let found = match self {
            Self::Memory { files, .. } => files.get(name),
            Self::Directory(_) => None,
        };
        let missing = || Error::Io { path: self.path(name), source: missing() };
        found.ok_or_else(missing)
    }
}

fn missing() -> io::Error {
    io::Error::new(ErrorKind::NotFound, "is not among the files in memory")
}

/// The bytes of a regular file of at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    // A pipe would wait for a writer, which may never come.
    if !fs::metadata(path).map_err(Error::io(path))?.is_file() {
        let message = "is not a regular file".into();
        return Err(Error::Malformed { path: path.to_owned(), message });
    }
    let file = fs::File::open(path).map_err(Error::io(path))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    check_size(path, &bytes, limit)?;
    Ok(bytes)
}

fn check_size(path: &Path, bytes: &[u8], limit: u64) -> Result<()> {
    if bytes.len() as u64 <= limit {
        return Ok(());
    }
    let message = format!("is larger than {limit} bytes");
    Err(Error::Malformed { path: path.to_owned(), message })
}
