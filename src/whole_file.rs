//! Files that appear when they are whole.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};

/// Writes a file, which appears when it is whole and replaces what was there.
///
/// # Errors
/// [`Error::Io`]; [`Error::Malformed`] where something that is not a regular file stands there.
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    // What a symbolic link points to is replaced, not the link; a device or a pipe never is.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if path.exists() && !path.is_file() {
        let message = "exists and is not a regular file".into();
        return Err(Error::Malformed { path, message });
    }
    let mut beside = path.clone().into_os_string();
    beside.push(format!(".{}.partial", std::process::id()));
    let written = fs::write(&beside, text).and_then(|()| fs::rename(&beside, &path));
    written.map_err(|source| {
        drop(fs::remove_file(&beside));
        Error::Io { path, source }
    })
}
