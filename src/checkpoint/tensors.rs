//! The tensors of a directory: `model.safetensors`, or an index and its shards.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use memmap2::{Mmap, MmapOptions};
use rayon::prelude::*;
use safetensors::Dtype;

use super::config::Ternary;
use super::files::Files;
use super::header::read_header;
use super::json::Object;
use super::matrix::{Bytes, FloatType, MatrixSource};
use crate::error::{Error, Result, shortened};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// One file of a checkpoint.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    data: Data,
}

/// What the tensors of a shard are read from.
#[derive(Debug)]
enum Data {
    /// With its length, and when it was written last, where the system knows.
    File(File, Stamp),
    Memory(Bytes),
}

type Stamp = (u64, Option<SystemTime>);

/// Where a tensor lies, and as what.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    shard: Arc<Shard>,
    /// The number format as safetensors spells it.
    pub dtype: Dtype,
    /// Rows first.
    pub shape: Vec<usize>,
    offset: u64,
    /// Bytes in the file.
    pub bytes: usize,
}

/// All tensors of a checkpoint by name. Headers are read, weights only mapped on demand.
#[derive(Debug)]
pub struct Tensors {
    path: PathBuf,
    tensors: BTreeMap<String, TensorInfo>,
    /// Names of the tensors that were asked for.
    used: Mutex<BTreeSet<String>>,
}

impl Tensors {
    /// Reads the headers of a checkpoint.
    ///
    /// # Errors
    /// Names the file that is missing, truncated or malformed.
    pub(super) fn open(files: &Files) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        if files.contains(SINGLE) {
            for (name, info) in read_shard(files, SINGLE)? {
                tensors.insert(name, info);
            }
            return Ok(Self { path: files.path(SINGLE), tensors, used: Mutex::default() });
        }
        let Some(index_file) = Object::read_optional(files, INDEX)? else {
            return Err(no_weights(files));
        };
        let map = index_file.required("weight_map", index_file.object("weight_map")?)?;
        let mut by_shard: BTreeMap<&str, Vec<&String>> = BTreeMap::new();
        for (tensor, shard) in map.entries() {
            let shard = shard.as_str().ok_or_else(|| map.error(tensor, "is not a file name"))?;
            if !is_plain_name(shard) {
                return Err(map.error(tensor, format!("{shard:?} is not a plain file name")));
            }
            by_shard.entry(shard).or_default().push(tensor);
        }
        for (shard, names) in by_shard {
            let mut found = read_shard(files, shard)?;
            for name in names {
                let info = found.remove(name).ok_or_else(|| Error::MissingTensor {
                    path: files.path(shard),
                    tensor: shortened(name),
                    note: format!("{INDEX} says that it is in this shard"),
                })?;
                tensors.insert(name.clone(), info);
            }
        }
        Ok(Self { path: files.root().to_owned(), tensors, used: Mutex::default() })
    }

    /// The file, or the directory when there are several shards.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// What is known of a tensor.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Every tensor, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// Bytes of all tensors in the files.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|info| info.bytes as u64).sum()
    }

    /// Refuses files that were written since they were opened: what is read of them now need not fit
    /// what was read before.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the file.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        let mut checked: Option<&Arc<Shard>> = None;
        for TensorInfo { shard, .. } in self.tensors.values() {
            // Neighbours in the alphabet are most often neighbours in a file.
            if checked.is_some_and(|checked| Arc::ptr_eq(checked, shard)) {
                continue;
            }
            checked = Some(shard);
            let Data::File(file, stamp) = &shard.data else { continue };
            let now = file.metadata().map_err(Error::io(&shard.path))?;
            if (now.len(), now.modified().ok()) != *stamp {
                let message = "was changed since the model was opened".into();
                return Err(Error::Malformed { path: shard.path.clone(), message });
            }
        }
        Ok(())
    }

    fn used(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses a checkpoint with tensors that the forward pass has not read: a bias, or a norm of
    /// another architecture, would be left out silently.
    pub(crate) fn check_all_used(&self) -> Result<()> {
        let used = self.used();
        for (name, info) in self.iter().filter(|(name, _)| !used.contains(*name)) {
            // Tables that old checkpoints carry and every engine computes.
            if name.ends_with("rotary_emb.inv_freq") {
                continue;
            }
            if name.starts_with("model.") {
                return Err(Error::Unsupported {
                    path: info.shard.path.clone(),
                    what: format!("tensor {name:?}, which this architecture does not have,"),
                    supported: String::new(),
                });
            }
            log::warn!("{}: tensor {name:?} is not used", info.shard.path.display());
        }
        Ok(())
    }

    /// Whether two tensors have the same type, shape and bytes.
    pub(crate) fn are_equal(&self, one: &str, other: &str) -> Result<bool> {
        let (Some(a), Some(b)) = (self.get(one), self.get(other)) else { return Ok(false) };
        Ok(a.dtype == b.dtype && a.shape == b.shape && map(a)?[..] == map(b)?[..])
    }

    /// A float matrix `[rows, cols]`, mapped.
    pub(crate) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<MatrixSource> {
        let info = self.find(name, &[&[rows, cols]])?;
        let stored = self.float_type(name, info)?;
        Ok(MatrixSource::float(name, rows, cols, stored, map(info)?))
    }

    /// A ternary matrix `[rows, cols]` of a BitNet checkpoint; `name` without `.weight`.
    pub(crate) fn ternary(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        storage: Ternary,
    ) -> Result<MatrixSource> {
        let weight = format!("{name}.weight");
        if storage == Ternary::Master {
            let info = self.find(&weight, &[&[rows, cols]])?;
            let stored = self.float_type(&weight, info)?;
            let source = MatrixSource::master(&weight, rows, cols, stored, map(info)?);
            if !source.scale().is_finite() {
                return Err(self.wrong_value(&weight, info, "holds NaN or infinity"));
            }
            return Ok(source);
        }
        if let Some(info) = self.tensors.get(&weight)
            && info.dtype != Dtype::U8
        {
            let expected = "U8 (four packed trits a byte; float master weights need \
                            quantization_mode \"online\" in config.json)";
            return Err(self.wrong_type(&weight, info, expected));
        }
        if !rows.is_multiple_of(4) {
            return Err(Error::Unsupported {
                path: self.path.clone(),
                what: format!("packed tensor {weight:?} with {rows} output rows"),
                supported: "a multiple of 4 is".into(),
            });
        }
        let info = self.find(&weight, &[&[rows / 4, cols]])?;
        let stored_scale = self.scalar(&format!("{name}.weight_scale"))?;
        let scale = match storage {
            Ternary::PackedDivide => 1.0 / stored_scale,
            _ => stored_scale,
        };
        if !scale.is_finite() {
            let message = format!("is {stored_scale}, by which nothing can be divided");
            let name = format!("{name}.weight_scale");
            return Err(self.wrong_value(&name, info, &message));
        }
        let packed = map(info)?;
        // A fourth code would show that something else is packed here, or in another way.
        let foreign = packed.par_iter().position_any(|b| b & (b >> 1) & 0b01_01_01_01 != 0);
        if let Some(at) = foreign {
            let message = format!("byte {at} is {:#04x}, which is not four trits", packed[at]);
            return Err(self.wrong_value(&weight, info, &message));
        }
        Ok(MatrixSource::packed(weight, rows, cols, packed, scale))
    }

    /// A vector `[width]` of finite values, such as a norm's weight.
    pub(crate) fn vector(&self, name: &str, width: usize) -> Result<Vec<f32>> {
        let info = self.find(name, &[&[width]])?;
        self.floats(name, info)
    }

    /// A single finite number other than 0, of shape `[1]` or `[]`.
    fn scalar(&self, name: &str) -> Result<f32> {
        let info = self.find(name, &[&[1], &[]])?;
        let value = self.floats(name, info)?[0];
        if value == 0.0 {
            return Err(self.wrong_value(name, info, "is 0"));
        }
        Ok(value)
    }

    fn floats(&self, name: &str, info: &TensorInfo) -> Result<Vec<f32>> {
        let stored = self.float_type(name, info)?;
        let mut values = vec![0.0; info.bytes / stored.bytes()];
        stored.decode(&map(info)?, &mut values);
        match values.iter().position(|value| !value.is_finite()) {
            Some(at) => {
                let message = format!("element {at} is {}", values[at]);
                Err(self.wrong_value(name, info, &message))
            }
            None => Ok(values),
        }
    }

    /// The tensor, if it has one of the shapes; the first is the one that an error expects.
    fn find(&self, name: &str, shapes: &[&[usize]]) -> Result<&TensorInfo> {
        let info = self.tensors.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            note: String::new(),
        })?;
        if shapes.contains(&info.shape.as_slice()) {
            self.used().insert(name.to_owned());
            return Ok(info);
        }
        Err(Error::TensorShape {
            path: info.shard.path.clone(),
            tensor: name.to_owned(),
            found: info.shape.clone(),
            expected: shapes[0].to_vec(),
        })
    }

    fn float_type(&self, name: &str, info: &TensorInfo) -> Result<FloatType> {
        match info.dtype {
            Dtype::F32 => Ok(FloatType::F32),
            Dtype::F16 => Ok(FloatType::F16),
            Dtype::BF16 => Ok(FloatType::BF16),
            _ => Err(self.wrong_type(name, info, "F32, F16 or BF16")),
        }
    }

    fn wrong_type(&self, name: &str, info: &TensorInfo, expected: &str) -> Error {
        Error::TensorType {
            path: info.shard.path.clone(),
            tensor: name.to_owned(),
            found: format!("{:?}", info.dtype),
            expected: expected.to_owned(),
        }
    }

    fn wrong_value(&self, name: &str, info: &TensorInfo, message: &str) -> Error {
        Error::TensorValue {
            path: info.shard.path.clone(),
            tensor: name.to_owned(),
            message: message.to_owned(),
        }
    }
}

/// Reads the header of one safetensors file and checks it against the file's length.
fn read_shard(files: &Files, name: &str) -> Result<BTreeMap<String, TensorInfo>> {
    let path = files.path(name);
    let data = match files {
        Files::Directory(_) => open_file(&path)?,
        Files::Memory { .. } => Data::Memory(files.in_memory(name)?.clone()),
    };
    // Of a file only the header's pages are read; the map goes at the end of this function.
    let whole = match &data {
        Data::File(file, (length, _)) => {
            // On a machine of 32 bits a file may be larger than memory can be.
            let length = usize::try_from(*length).map_err(|_| Error::Malformed {
                path: path.clone(),
                message: format!("has {length} bytes, which cannot be mapped on this machine"),
            })?;
            Bytes::mapped(map_file(&path, file, 0, length)?)
        }
        Data::Memory(bytes) => bytes.clone(),
    };
    let (header, metadata) = match read_header(&whole) {
        Ok(found) => found,
        Err(message) => return Err(Error::Malformed { path, message }),
    };
    let shard = Arc::new(Shard { path, data });
    let begin = 8 + header as u64;
    let entry = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let (start, end) = info.data_offsets;
        let info = TensorInfo {
            shard: shard.clone(),
            dtype: info.dtype,
            shape: info.shape.clone(),
            offset: begin + start as u64,
            bytes: end - start,
        };
        (name, info)
    };
    Ok(metadata.tensors().into_iter().map(entry).collect())
}

/// A regular file that is not empty: such a one alone can be mapped.
fn open_file(path: &Path) -> Result<Data> {
    let malformed =
        |message: &str| Error::Malformed { path: path.to_owned(), message: message.into() };
    // Before it is opened: a pipe would wait for a writer, which may never come.
    let metadata = fs::metadata(path).map_err(Error::io(path))?;
    if !metadata.is_file() {
        return Err(malformed("is not a regular file"));
    }
    let file = File::open(path).map_err(Error::io(path))?;
    if metadata.len() == 0 {
        return Err(malformed("is empty"));
    }
    let stamp = (metadata.len(), metadata.modified().ok());
    Ok(Data::File(file, stamp))
}

fn map(info: &TensorInfo) -> Result<Bytes> {
    let Shard { path, data } = &*info.shard;
    match data {
        Data::File(file, _) => map_file(path, file, info.offset, info.bytes).map(Bytes::mapped),
        Data::Memory(whole) => {
            let start = info.offset as usize;
            // The header was checked against the length.
            Ok(whole.part(start..start + info.bytes))
        }
    }
}

fn map_file(path: &Path, file: &File, offset: u64, length: usize) -> Result<Mmap> {
    // SAFETY: the map is only read. If another process truncates the file meanwhile, reading it
    // raises SIGBUS, and if it writes to it, weights change under us: both would need a copy of
    // the whole model in memory to prevent, which this engine must not make.
    let map = unsafe { MmapOptions::new().offset(offset).len(length).map(file) };
    let map = map.map_err(Error::io(path))?;
    // Products of one token read at up to twice the speed where an entry of the processor's table of
    // pages covers 2 MB. It is a hint: a file that is in memory already stays on its pages.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(map)
}

/// The name of a file in the same directory, of a length that files may have.
fn is_plain_name(name: &str) -> bool {
    if name.len() > 255 {
        return false;
    }
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}

/// There is no weight file that we read: say what there is instead.
fn no_weights(files: &Files) -> Error {
    let message = if files.contains("pytorch_model.bin") {
        format!("has pytorch_model.bin, but neither {SINGLE} nor {INDEX}: save it as safetensors")
    } else {
        format!("has neither {SINGLE} nor {INDEX}")
    };
    Error::Malformed { path: files.root().to_owned(), message }
}
