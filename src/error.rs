//! What can go wrong, each with the file, tensor, shape, limit or device that it concerns.

use std::path::PathBuf;

/// The result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every failure of this crate. The library never panics on input, never prints and never exits:
/// what a user has to know stands in one of these.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file is there and readable, but is not what its name promises.
    #[error("{}: {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A field of a JSON file is missing, of the wrong type or out of range.
    #[error("{}: {field}: {message}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field, as a dotted path.
        field: String,
        /// What is wrong with it.
        message: String,
    },
    /// The checkpoint asks for something that this version does not compute.
    #[error("{}: {what} is not supported{}", path.display(), hint(supported))]
    Unsupported {
        /// The file that asks for it.
        path: PathBuf,
        /// What it asks for.
        what: String,
        /// What would be accepted; may be empty.
        supported: String,
    },
    /// A tensor that the architecture needs is not in the checkpoint.
    #[error("{}: tensor {tensor:?} is missing{}", path.display(), hint(note))]
    MissingTensor {
        /// The file, or the directory when there are several shards.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What else may help; may be empty.
        note: String,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("{}: tensor {tensor:?} has shape {found:?}, expected {expected:?}", path.display())]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// A tensor is stored in a number format that cannot be used in its place.
    #[error("{}: tensor {tensor:?} is stored as {found}, expected {expected}", path.display())]
    TensorType {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The number format in the file.
        found: String,
        /// The formats that are accepted.
        expected: String,
    },
    /// A tensor holds values that no trained model has, such as NaN.
    #[error("{}: tensor {tensor:?}: {message}", path.display())]
    TensorValue {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong with the values.
        message: String,
    },
    /// The tokens do not fit in the context.
    #[error(
        "{needed} tokens do not fit in a context of {limit} (the model's own limit is {model_limit})"
    )]
    ContextFull {
        /// Tokens that the request would make.
        needed: usize,
        /// Tokens that the session was made for.
        limit: usize,
        /// Tokens that the model was trained for (`max_position_embeddings`).
        model_limit: usize,
    },
    /// A token id is not in the model's vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocabulary} entries")]
    TokenOutOfRange {
        /// The token id.
        token: u32,
        /// Entries of the vocabulary.
        vocabulary: usize,
    },
    /// There is nothing to continue: no token was given, and the session is empty.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A parameter is out of its range.
    #[error("{name} = {value}: {allowed}")]
    Parameter {
        /// The parameter.
        name: &'static str,
        /// The value given.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// No adapter fits what was asked for.
    #[error("{wanted} was not found; {}", list_adapters(found))]
    NoAdapter {
        /// The device asked for, in words.
        wanted: String,
        /// The adapters that are there, as they would be named.
        found: Vec<String>,
    },
    /// A buffer does not fit in the device's memory.
    #[error("{device}: out of memory: {what}: {needed} bytes needed, {held} bytes held already")]
    DeviceMemory {
        /// The device.
        device: String,
        /// What was being made.
        what: String,
        /// Its size in bytes.
        needed: u64,
        /// What this process holds on the device already, in bytes.
        held: u64,
    },
    /// The device's limits are too small for this model.
    #[error("{device}: {what}: {needed} needed, but the device's limit {limit_name} is {limit}")]
    DeviceLimit {
        /// The device.
        device: String,
        /// What was being made.
        what: String,
        /// What it needs.
        needed: u64,
        /// The limit's name in WebGPU's terms.
        limit_name: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The driver refused a call, or reported an error of its own.
    #[error("{device}: {what}: {message}")]
    Device {
        /// The device.
        device: String,
        /// What was being done.
        what: String,
        /// What the driver said.
        message: String,
    },
    /// The device computes something wrongly, and so it does in every way that we know.
    #[error(
        "{device}: {operation} is computed wrongly by the driver ({case}): the CPU has to do, and \
         `deltallm doctor` shows what to report"
    )]
    WrongResults {
        /// The device.
        device: String,
        /// The operation.
        operation: &'static str,
        /// What was asked, and how far the answer was off.
        case: String,
    },
    /// The device went away: it was reset, unplugged, or its driver stopped.
    #[error("{device}: the device was lost: {message}")]
    DeviceLost {
        /// The device.
        device: String,
        /// What the driver said.
        message: String,
    },
    /// The device did not finish its work in time: it hangs, or its driver does. It counts as lost.
    #[error("{device}: the device hangs: a submission was not done after {seconds} s")]
    DeviceTimeout {
        /// The device.
        device: String,
        /// How long a submission may take.
        seconds: f64,
    },
    /// The device was lost, and could not be opened again with all that was on it.
    ///
    /// Model and session are still there: the next call tries once more.
    #[error("{lost}; it could not be restored: {reason}")]
    DeviceNotRestored {
        /// How it was lost, as the first error said.
        lost: String,
        /// Why what was on it could not be brought back.
        reason: Box<Error>,
    },
    /// A result has NaN or infinity in it: a broken checkpoint or a broken driver.
    #[error("NaN or infinity in {what}: the checkpoint or the device's driver is broken")]
    NotFinite {
        /// What holds it: of a text that was run for a session, the layer and the tokens.
        what: String,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// Characters of a message that quotes a file: a line or two of a terminal.
const MAX_QUOTED: usize = 400;

/// A message that quotes what stands in a file, without its end where that would fill the screen.
pub(crate) fn shortened(message: impl Into<String>) -> String {
    let mut message = message.into();
    if let Some((end, _)) = message.char_indices().nth(MAX_QUOTED) {
        message.truncate(end);
        message.push_str("...");
    }
    message
}

fn hint(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(" ({text})") }
}

fn list_adapters(found: &[String]) -> String {
    if found.is_empty() {
        "there is no adapter at all: is a Vulkan, Metal or DX12 driver installed?".to_owned()
    } else {
        format!("there is {}", found.join(", "))
    }
}

impl Error {
    /// Whether all that was on the device is gone, but would run on another one.
    pub(crate) fn is_lost_device(&self) -> bool {
        matches!(self, Self::DeviceLost { .. } | Self::DeviceTimeout { .. })
    }

    /// Whether another device might have the room that this one lacks.
    pub(crate) fn is_too_small_a_device(&self) -> bool {
        matches!(self, Self::DeviceMemory { .. } | Self::DeviceLimit { .. })
    }

    /// Whether another device might compute rightly what this one does not.
    pub(crate) fn is_wrong_device(&self) -> bool {
        matches!(self, Self::WrongResults { .. })
    }

    /// An [`Error::Io`] for `path`, in the form that `map_err` takes.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
