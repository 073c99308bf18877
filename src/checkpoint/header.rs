//! The header of a safetensors file: what lies where in it.

use safetensors::SafeTensors;
use safetensors::tensor::Metadata;

use crate::contained::contained;
use crate::error::shortened;

/// Some hundred bytes a tensor: no model and no session has a header near this.
const MAX_HEADER: u64 = 32 << 20;
/// Bytes of a tensor's name.
const MAX_NAME: usize = 512;

/// The length of the header, which lies behind eight bytes, and what it says; checked against the
/// length of the file. Or what is wrong with the file, in words.
pub(crate) fn read_header(whole: &[u8]) -> Result<(usize, Metadata), String> {
    if whole.is_empty() {
        return Err("is empty".into());
    }
    if whole.starts_with(b"version https://git-lfs") {
        let message = "is a Git LFS pointer, not the weights: run `git lfs pull` in its directory";
        return Err(message.into());
    }
    if let Some(first) = whole.first_chunk::<8>() {
        let length = u64::from_le_bytes(*first);
        let after = whole.len() as u64 - 8;
        if length > after {
            return Err(format!(
                "is not a whole safetensors file: its header would have {length} bytes, but only \
                 {after} follow"
            ));
        }
        if length > MAX_HEADER {
            return Err(format!("has a header of {length} bytes, above {MAX_HEADER}"));
        }
    }
    // The library adds up offsets that may lie at the end of the number range: where overflow is
    // checked, that is a panic.
    let read = contained(|| SafeTensors::read_metadata(whole));
    let read = read.unwrap_or(Err(safetensors::SafeTensorError::ValidationOverflow));
    let (length, metadata) =
        read.map_err(|error| shortened(format!("is not a whole safetensors file: {error}")))?;
    if let Some(name) = metadata.tensors().into_keys().find(|name| name.len() > MAX_NAME) {
        let message = format!("has a tensor whose name has {} bytes: {name:?}", name.len());
        return Err(shortened(message));
    }
    Ok((length, metadata))
}
