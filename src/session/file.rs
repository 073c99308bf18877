//! A session as a file, to be continued later or on another device.
//!
//! It is a safetensors file. Its metadata are texts: what the session was made with, which model it
//! belongs to, and a checksum over all of it. `P` are the compressed pages of a head.
//!
//! | tensor | |
//! |---|---|
//! | `tokens` | U32 `[N]`: the whole text |
//! | `layer.I.page_words` | U32 `[G, P]`: words of each page, where keys are compressed |
//! | `layer.I.pages` | U32: the words of all pages in that order |
//! | `layer.I.exact` | U8: original keys, see [`CacheImage::exact`] |
//! | `layer.I.values` | U8: values, see [`CacheImage::values`] |
//!
//! A file may come from anywhere: nothing of it is used before it is checked, and of the sizes that
//! it claims only the context takes memory beyond the file's own length: as much as a new session
//! of that context does, up to the model's limit.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};

use super::{Session, SessionOptions, check_context};
use crate::checkpoint::{ModelConfig, read_header};
use crate::delta::{AttentionPolicy, CacheImage, Page, PageLayout, Thresholds};
use crate::error::{Error, Result, shortened};
use crate::model::{Model, SessionShape};

const FORMAT: &str = "deltallm session";
const VERSION: &str = "1";

impl Session {
    /// Writes the session to a file: the text, its keys and values, and how they are kept. The
    /// file appears when it is whole and replaces what was there; only its owner can read it.
    ///
    /// Host memory of the cache's size is needed meanwhile.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] where something that is not a regular file stands there.
    pub fn save(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let (fields, tensors) = self.contents()?;
        write(path.as_ref(), fields, &tensors)
    }

    fn contents(&mut self) -> Result<(Fields, Vec<Stored>)> {
        self.settle();
        // Original keys that the next step needs may be gone, see [`Session::truncate`]: then the
        // text will be run again, and there is no use in keeping the rest.
        let usable = self.decoder.can_continue(self.phase());
        let length = if usable { self.decoder.length() } else { 0 };
        let layers = if length == 0 { 0 } else { self.model.config().layers };
        let tokens = Stored::words("tokens".into(), vec![self.tokens.len()], &self.tokens);
        let (mut tensors, mut exact_from) = (vec![tokens], 0);
        for layer in 0..layers {
            let image = self.decoder.save(layer)?;
            let name = |part: &str| format!("layer.{layer}.{part}");
            if !self.shape.policy.is_dense() {
                let all = || image.pages.iter().flatten();
                let sizes: Vec<u32> = all().map(|page| page.words.len() as u32).collect();
                let words: Vec<u32> = all().flat_map(|page| page.words.iter().copied()).collect();
                let heads = image.pages.len();
                let shape = vec![heads, sizes.len() / heads.max(1)];
                tensors.push(Stored::words(name("page_words"), shape, &sizes));
                tensors.push(Stored::words(name("pages"), vec![words.len()], &words));
            }
            tensors.push(Stored::bytes(name("exact"), image.exact));
            tensors.push(Stored::bytes(name("values"), image.values));
            exact_from = image.exact_from;
        }
        let mut fields = vec![
            ("format", FORMAT.into()),
            ("version", VERSION.into()),
            ("model", fingerprint(self.model.config())),
            ("policy", self.shape.policy.to_string()),
            ("context", self.shape.context.to_string()),
            ("prompt", self.prompt.to_string()),
            ("length", length.to_string()),
            ("exact_from", exact_from.to_string()),
        ];
        if let Some(thresholds) = &self.shape.thresholds {
            fields.push(("thresholds", thresholds.to_string()));
        }
        Ok((fields, tensors))
    }

    /// Opens a session that [`Session::save`] has written, of the same model on whatever device.
    ///
    /// # Errors
    /// Names the file, the field or tensor, and what is expected there: a file that is damaged or
    /// of another model; and as [`Session::new`].
    pub fn load(model: &Model, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let map = open(path)?;
        let saved = Saved::read(path, &map)?;
        let config = model.config();
        saved.expect("format", FORMAT)?;
        saved.expect("version", VERSION)?;
        saved.expect("model", &fingerprint(config))?;
        let policy: AttentionPolicy = saved.parse("policy", "an attention policy")?;
        let thresholds = saved.thresholds()?;
        if let Some(thresholds) = &thresholds {
            let checked = thresholds.check(&policy, config.layers, config.attention.kv_heads);
            checked.map_err(|error| saved.wrong("thresholds", error))?;
        }
        let context: usize = saved.parse("context", "a number of tokens")?;
        check_context(context, config).map_err(|error| saved.wrong("context", error))?;
        let length = saved.number("length", context)?;
        let tokens = saved.words("tokens", None)?;
        let shape = SessionShape::new(context, policy);
        let state = State { policy, length, exact_from: saved.number("exact_from", length)? };

        let most = context.saturating_add(1);
        if tokens.len() > most || tokens.len() < length {
            let message = format!("{} tokens, expected {length} to {most}", tokens.len());
            return Err(saved.wrong_tensor("tokens", message));
        }
        let vocabulary = config.vocabulary;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            let message = format!("token {token} is outside the vocabulary of {vocabulary}");
            return Err(saved.wrong_tensor("tokens", message));
        }
        let prompt = saved.number("prompt", tokens.len())?;
        let kept = match policy.is_dense() {
            true => length,
            false => policy.recent_slots(context, shape.chunk),
        };
        let least = length.saturating_sub(kept);
        if state.exact_from < least || (policy.is_dense() && state.exact_from > 0) {
            let expected = if policy.is_dense() { "0".into() } else { format!("{least} or more") };
            let message = format!("is {}, expected {expected}", state.exact_from);
            return Err(saved.wrong("exact_from", message));
        }
        let layers = if length == 0 { 0 } else { config.layers };
        let parts = if policy.is_dense() { 2 } else { 4 };
        if saved.tensors.len() != 1 + layers * parts {
            let (found, expected) = (saved.tensors.len(), 1 + layers * parts);
            return Err(saved.malformed(format!("has {found} tensors, expected {expected}")));
        }
        let images = (0..layers)
            .map(|layer| saved.image(layer, &state, config))
            .collect::<Result<Arc<[_]>>>()?;
        saved.check_sum(layers, parts)?;

        let options = SessionOptions { context: Some(context), attention: policy, thresholds };
        let mut session = Self::new(model, &options)?;
        if !images.is_empty() {
            session.decoder.restore(&images)?;
        }
        (session.tokens, session.prompt) = (tokens, prompt);
        Ok(session)
    }
}

/// The metadata without their checksum, in the order in which it is taken.
type Fields = Vec<(&'static str, String)>;

/// Writes a file whole or not at all.
fn write(path: &Path, mut fields: Fields, tensors: &[Stored]) -> Result<()> {
    let mut checksum = Checksum::default();
    fields.iter().for_each(|(_, value)| checksum.add(value.as_bytes()));
    tensors.iter().for_each(|tensor| checksum.add(&tensor.data));
    fields.push(("checksum", checksum.text()));
    let fields: HashMap<String, String> =
        fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();

    // What a symbolic link points to is replaced, not the link; a device or a pipe never is.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if path.exists() && !path.is_file() {
        let message = "exists and is not a regular file".into();
        return Err(Error::Malformed { path, message });
    }
    let fail = |error| match error {
        SafeTensorError::IoError(source) => Error::Io { path: path.clone(), source },
        error => Error::Malformed { path: path.clone(), message: error.to_string() },
    };
    let views = tensors.iter().map(|tensor| Ok((&tensor.name[..], tensor.view()?)));
    let views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(fail)?;
    // It writes beside the path, and renames.
    safetensors::serialize_to_file(views, Some(fields), &path).map_err(fail)
}

/// Every number that keys, values and tokens depend on. A model with other weights of the same
/// shapes cannot be told apart.
fn fingerprint(config: &ModelConfig) -> String {
    let ModelConfig { hidden, intermediate, layers, attention, vocabulary, norm_eps, .. } = config;
    let mut text = format!(
        "{} layers={layers} hidden={hidden} intermediate={intermediate} heads={} kv_heads={} \
         head_dim={} vocabulary={vocabulary} norm_eps={norm_eps:e} rope_theta={}",
        config.architecture.name(),
        attention.heads,
        attention.kv_heads,
        attention.head_dim,
        config.rope.theta,
    );
    if let Some(s) = config.rope.scaling {
        text += &format!(
            " rope_factor={} rope_low={} rope_high={} rope_original={}",
            s.factor, s.low_freq_factor, s.high_freq_factor, s.original_context
        );
    }
    text
}

/// A tensor to be written.
#[derive(Clone)]
struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Stored {
    fn words(name: String, shape: Vec<usize>, words: &[u32]) -> Self {
        let data = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Self { name, dtype: Dtype::U32, shape, data }
    }

    fn bytes(name: String, data: Vec<u8>) -> Self {
        Self { name, dtype: Dtype::U8, shape: vec![data.len()], data }
    }

    fn view(&self) -> std::result::Result<TensorView<'_>, SafeTensorError> {
        TensorView::new(self.dtype, self.shape.clone(), &self.data)
    }
}

/// Bits that change when any byte does: not against forgers, but against damage. Each step is
/// one-to-one in what it adds, so that a change within one word is always seen.
#[derive(Default)]
struct Checksum(u64);

impl Checksum {
    fn add(&mut self, bytes: &[u8]) {
        let mut step = |word| self.0 = mix(self.0 ^ word);
        let mut words = bytes.chunks_exact(8);
        for word in &mut words {
            step(u64::from_le_bytes(word.try_into().expect("eight bytes")));
        }
        let mut last = [0; 8];
        last[..words.remainder().len()].copy_from_slice(words.remainder());
        step(u64::from_le_bytes(last));
        step(bytes.len() as u64);
    }

    fn text(&self) -> String {
        format!("{:016x}", self.0)
    }
}

/// One-to-one: an odd factor, and a shift that can be undone.
fn mix(x: u64) -> u64 {
    let x = (x ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 29)
}

fn open(path: &Path) -> Result<Mmap> {
    let malformed = |message: String| Error::Malformed { path: path.to_owned(), message };
    // A pipe would wait for a writer, which may never come.
    let metadata = fs::metadata(path).map_err(Error::io(path))?;
    if !metadata.is_file() {
        return Err(malformed("is not a regular file".into()));
    }
    if metadata.len() < 8 {
        return Err(malformed("is too short for a session".into()));
    }
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: the map is only read, and gone when the session is loaded. If another process
    // truncates the file meanwhile, reading it raises SIGBUS, as with a checkpoint; sessions that
    // this crate writes are replaced, not truncated.
    unsafe { Mmap::map(&file) }.map_err(Error::io(path))
}

/// What the parts of a layer are sized by.
struct State {
    policy: AttentionPolicy,
    length: usize,
    exact_from: usize,
}

/// A session's file, to be checked.
struct Saved<'a> {
    path: &'a Path,
    fields: HashMap<String, String>,
    tensors: SafeTensors<'a>,
}

impl<'a> Saved<'a> {
    fn read(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let malformed = |message| Error::Malformed { path: path.to_owned(), message };
        let (_, metadata) = read_header(bytes).map_err(malformed)?;
        let fields = metadata.metadata().clone().unwrap_or_default();
        let tensors = SafeTensors::deserialize(bytes);
        let tensors = tensors.map_err(|error| malformed(shortened(error.to_string())))?;
        Ok(Self { path, fields, tensors })
    }

    fn malformed(&self, message: String) -> Error {
        Error::Malformed { path: self.path.to_owned(), message: shortened(message) }
    }

    fn wrong(&self, field: &str, message: impl ToString) -> Error {
        let (path, field) = (self.path.to_owned(), field.to_owned());
        Error::Config { path, field, message: shortened(message.to_string()) }
    }

    fn wrong_tensor(&self, tensor: &str, message: String) -> Error {
        let (path, tensor) = (self.path.to_owned(), tensor.to_owned());
        Error::TensorValue { path, tensor, message }
    }

    fn field(&self, field: &str) -> Result<&str> {
        let value = self.fields.get(field).ok_or_else(|| self.wrong(field, "is missing"));
        value.map(String::as_str)
    }

    fn expect(&self, field: &str, expected: &str) -> Result<()> {
        match self.field(field)? {
            found if found == expected => Ok(()),
            found => Err(self.wrong(field, format!("is {found:?}, expected {expected:?}"))),
        }
    }

    fn parse<T: FromStr>(&self, field: &str, what: &str) -> Result<T> {
        let text = self.field(field)?;
        text.parse().map_err(|_| self.wrong(field, format!("is {text:?}, expected {what}")))
    }

    /// A number up to `most`.
    fn number(&self, field: &str, most: usize) -> Result<usize> {
        let number = self.parse(field, "a number of tokens")?;
        if number > most {
            return Err(self.wrong(field, format!("is {number}, expected at most {most}")));
        }
        Ok(number)
    }

    /// Thresholds of each layer and KV head, where it has such.
    fn thresholds(&self) -> Result<Option<Thresholds>> {
        let Some(text) = self.fields.get("thresholds") else { return Ok(None) };
        text.parse().map(Some).map_err(|error: Error| self.wrong("thresholds", error))
    }

    /// A tensor of this type, and of this shape if one is given.
    fn tensor(&self, name: &str, dtype: Dtype, shape: Option<&[usize]>) -> Result<TensorView<'_>> {
        let (path, tensor) = (self.path.to_owned(), name.to_owned());
        let Ok(view) = self.tensors.tensor(name) else {
            return Err(Error::MissingTensor { path, tensor, note: String::new() });
        };
        if view.dtype() != dtype {
            let (found, expected) = (format!("{:?}", view.dtype()), format!("{dtype:?}"));
            return Err(Error::TensorType { path, tensor, found, expected });
        }
        let expected = shape.unwrap_or(view.shape());
        if view.shape() != expected {
            let (found, expected) = (view.shape().to_vec(), expected.to_vec());
            return Err(Error::TensorShape { path, tensor, found, expected });
        }
        Ok(view)
    }

    fn words(&self, name: &str, shape: Option<&[usize]>) -> Result<Vec<u32>> {
        let view = self.tensor(name, Dtype::U32, shape)?;
        let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        Ok(view.data().chunks_exact(4).map(word).collect())
    }

    fn bytes(&self, name: &str, length: Option<usize>) -> Result<Vec<u8>> {
        // A length beyond the address space is one that no file has.
        let shape = [length.unwrap_or(usize::MAX)];
        Ok(self.tensor(name, Dtype::U8, Some(&shape))?.data().to_vec())
    }

    fn image(&self, layer: usize, state: &State, config: &ModelConfig) -> Result<CacheImage> {
        let State { policy, length, exact_from } = *state;
        let (heads, head_dim) = (config.attention.kv_heads, config.attention.head_dim);
        let name = |part: &str| format!("layer.{layer}.{part}");
        let (mut pages, mut sink) = (Vec::new(), 0);
        let layout = PageLayout::new(&policy, head_dim);
        if let Some(layout) = layout.map_err(|error| self.wrong("policy", error))? {
            sink = policy.sink.min(length);
            pages = self.pages(&name, &layout, heads, length / policy.page)?;
        }
        let sized = |rows: usize, row_bytes: usize| {
            heads.checked_mul(rows).and_then(|rows| rows.checked_mul(row_bytes))
        };
        let exact = sized(sink + length - exact_from, head_dim * policy.exact.bytes());
        let values = sized(length, policy.value_row_bytes(head_dim));
        Ok(CacheImage {
            length,
            pages,
            exact_from,
            exact: self.bytes(&name("exact"), exact)?,
            values: self.bytes(&name("values"), values)?,
        })
    }

    /// `count` pages of each head.
    fn pages(
        &self,
        name: &dyn Fn(&str) -> String,
        layout: &PageLayout,
        heads: usize,
        count: usize,
    ) -> Result<Vec<Vec<Page>>> {
        let sizes = self.words(&name("page_words"), Some(&[heads, count]))?;
        let mut words = &self.words(&name("pages"), None)?[..];
        let mut pages = Vec::with_capacity(heads);
        for head in 0..heads {
            let mut of_head = Vec::with_capacity(count);
            for page in 0..count {
                let at = format!("page {page} of head {head}");
                let size = sizes[head * count + page] as usize;
                let Some((first, rest)) = words.split_at_checked(size) else {
                    let message = format!("{at} has {size} words, but only {} follow", words.len());
                    return Err(self.wrong_tensor(&name("pages"), message));
                };
                words = rest;
                let found = Page { words: first.into() };
                let checked = found.check(layout);
                checked.map_err(|e| self.wrong_tensor(&name("pages"), format!("{at}: {e}")))?;
                of_head.push(found);
            }
            pages.push(of_head);
        }
        if !words.is_empty() {
            let message = format!("{} words belong to no page", words.len());
            return Err(self.wrong_tensor(&name("pages"), message));
        }
        Ok(pages)
    }

    /// In the order of [`Session::save`].
    fn check_sum(&self, layers: usize, parts: usize) -> Result<()> {
        let mut checksum = Checksum::default();
        for field in
            ["format", "version", "model", "policy", "context", "prompt", "length", "exact_from"]
        {
            checksum.add(self.field(field)?.as_bytes());
        }
        if let Some(thresholds) = self.fields.get("thresholds") {
            checksum.add(thresholds.as_bytes());
        }
        let parts = &["page_words", "pages", "exact", "values"][4 - parts..];
        let in_layers = (0..layers)
            .flat_map(|layer| parts.iter().map(move |part| format!("layer.{layer}.{part}")));
        for name in std::iter::once("tokens".to_owned()).chain(in_layers) {
            let tensor = self.tensors.tensor(&name);
            checksum.add(tensor.map_err(|error| self.malformed(error.to_string()))?.data());
        }
        if self.field("checksum")? != checksum.text() {
            let found = checksum.text();
            let message = format!("is {}, but the file is of {found}", self.field("checksum")?);
            return Err(self.wrong("checksum", message + ": it is damaged"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::synthetic::Synthetic;
    use crate::{DeviceChoice, ModelOptions};

    #[test]
    fn a_checksum_sees_every_bit_and_every_border() {
        let sum = |parts: &[&[u8]]| {
            let mut sum = Checksum::default();
            parts.iter().for_each(|part| sum.add(part));
            sum.text()
        };
        let bytes: Vec<u8> = (0..37).collect();
        let whole = sum(&[&bytes]);
        for bit in 0..8 * bytes.len() {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(sum(&[&changed]), whole, "bit {bit}");
        }
        assert_ne!(sum(&[&bytes[..20], &bytes[20..]]), sum(&[&bytes[..21], &bytes[21..]]));
        assert_ne!(sum(&[&[0; 3]]), sum(&[&[0; 4]]));
    }

    /// Files whose checksum is right, but whose parts contradict the model or each other.
    #[test]
    fn what_contradicts_itself_is_refused() {
        let dir = tempfile::tempdir().expect("directory");
        Synthetic::named("tiny").expect("known").write(dir.path()).expect("written");
        let cpu = ModelOptions { device: DeviceChoice::Cpu, ..ModelOptions::default() };
        let model = Model::open(dir.path(), &cpu).expect("opened");
        let attention = "delta page=16 window=16".parse().expect("a policy");
        let options = SessionOptions { context: Some(512), attention, ..SessionOptions::default() };
        let mut session = Session::new(&model, &options).expect("session");
        let text: Vec<u32> = (0..70).map(|i| 3 + i % 50).collect();
        session.evaluate(&text).expect("prompt");
        let (fields, tensors) = session.contents().expect("contents");
        let path = dir.path().join("session");
        write(&path, fields.clone(), &tensors).expect("saved");
        assert_eq!(Session::load(&model, &path).expect("loaded").tokens(), text);

        let refused = |fields: Fields, tensors: &[Stored], words: &[&str]| {
            write(&path, fields, tensors).expect("saved");
            let error = Session::load(&model, &path).expect_err(words[0]).to_string();
            let named = words.iter().all(|word| error.contains(word));
            assert!(named && error.contains("session"), "{words:?}: {error}");
        };
        for (name, value, expected) in [
            ("format", "another", "deltallm session"),
            ("version", "2", "expected \"1\""),
            ("model", "LlamaForCausalLM layers=2", "layers=4"),
            ("policy", "delta page=48", "an attention policy"),
            ("policy", "delta page=128", "page_words"),
            ("policy", "keys=channel2 page=16 window=16", "words"),
            ("policy", "dense", "tensors"),
            ("policy", "delta page=16 window=16 values=int8", "values"),
            ("policy", "delta page=16 window=16 sink=0", "exact"),
            ("context", "0", "from 1 to"),
            ("context", "99999999999999999999", "a number"),
            ("context", "64", "at most 64"),
            ("prompt", "71", "at most 70"),
            ("length", "71", "expected 71 to 513"),
            ("length", "18446744073709551615", "at most 512"),
            ("length", "50", "page_words"),
            ("exact_from", "71", "at most 70"),
            ("exact_from", "3", "exact"),
            ("exact_from", "-1", "a number"),
        ] {
            let mut changed = fields.clone();
            for field in changed.iter_mut().filter(|field| field.0 == name) {
                field.1 = value.into();
            }
            refused(changed, &tensors, &[expected]);
        }
        for dropped in 0..fields.len() {
            let mut changed = fields.clone();
            let (name, _) = changed.remove(dropped);
            refused(changed, &tensors, &[name, "is missing"]);
        }

        let with = |name: &str, change: &dyn Fn(&mut Stored)| {
            let mut changed = tensors.clone();
            changed.iter_mut().filter(|tensor| tensor.name == name).for_each(change);
            changed
        };
        let set = |at: usize, word: u32| {
            move |tensor: &mut Stored| {
                tensor.data[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
            }
        };
        let pages = "layer.1.pages";
        let masks = model.config().attention.head_dim;
        for (name, change, word) in [
            ("tokens", &set(5, u32::MAX) as &dyn Fn(&mut Stored), "outside the vocabulary"),
            ("layer.0.page_words", &set(0, u32::MAX), "only"),
            ("layer.0.page_words", &set(0, 0), "fewer than"),
            ("layer.0.page_words", &set(7, 5), "fewer than"),
            (pages, &set(masks, u32::MAX), "token 1 begins at"),
            (pages, &|tensor| tensor.name.push('x'), "is missing"),
            (pages, &|tensor| tensor.dtype = Dtype::F32, "stored as F32"),
        ] {
            refused(fields.clone(), &with(name, change), &[word]);
        }
        for name in ["tokens", "layer.0.exact", "layer.3.values", pages, "layer.2.page_words"] {
            let shorter = with(name, &|tensor| {
                let size = if tensor.dtype == Dtype::U8 { 1 } else { 4 };
                tensor.data.truncate(tensor.data.len() - size);
                tensor.shape = vec![tensor.data.len() / size];
            });
            refused(fields.clone(), &shorter, &[if name == "tokens" { "69 tokens" } else { name }]);
            let fewer: Vec<Stored> =
                tensors.iter().filter(|tensor| tensor.name != name).cloned().collect();
            refused(fields.clone(), &fewer, &[if name == "tokens" { name } else { "tensors" }]);
        }
        let mut more = tensors.clone();
        more.push(Stored::bytes("extra".into(), vec![1]));
        refused(fields, &more, &["tensors"]);
    }
}
