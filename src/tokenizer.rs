//! Text to token ids and back, by Hugging Face's `tokenizers`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::checkpoint::{Checkpoint, Object};
use crate::error::{Error, Result};

/// Llama 3's file has 17 MB; ten times that is no tokenizer.
const MAX_BYTES: u64 = 256 << 20;

/// The tokenizer of a checkpoint.
#[derive(Debug)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    /// The beginning-of-text token, where `tokenizer_config.json` asks for one.
    bos: Option<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and `tokenizer_config.json` of a checkpoint.
    ///
    /// # Errors
    /// A missing or malformed file; a vocabulary that is larger than the model's embedding.
    pub(crate) fn open(checkpoint: &Checkpoint) -> Result<Self> {
        let path = checkpoint.dir.join("tokenizer.json");
        let malformed = |message: String| Error::Malformed { path: path.clone(), message };
        let text = read_bounded(&path)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&text)
            .map_err(|error| malformed(format!("is not a tokenizer: {error}")))?;
        // A prompt is never shortened or filled up behind the caller's back.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| malformed(error.to_string()))?;

        let vocabulary = checkpoint.config.vocabulary;
        let highest = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        if let Some((token, id)) = highest
            && id as usize >= vocabulary
        {
            let message = format!(
                "has token {token:?} with id {id}, but the model's embedding has only \
                 {vocabulary} rows"
            );
            return Err(malformed(message));
        }
        let bos = configured_bos(&checkpoint.dir, &inner)?;
        Ok(Self { path, inner, bos })
    }

    /// Token ids of `text`, with the special tokens that the model expects at its beginning.
    ///
    /// # Errors
    /// What the tokenizer reports; ordinary text never fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode(text, true).map_err(|error| self.error(&*error))?;
        let mut ids = encoding.get_ids().to_vec();
        if let Some(bos) = self.bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Token ids of `text` alone, as for the continuation of a text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode(text, false).map_err(|error| self.error(&*error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids` without special tokens. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// What the tokenizer reports.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| self.error(&*error))
    }

    /// The token's entry in the vocabulary, such as `Ġball` or `<|eot_id|>`.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Entries of the vocabulary, added tokens included.
    pub fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether the vocabulary has no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn error(&self, error: &dyn std::error::Error) -> Error {
        Error::Malformed { path: self.path.clone(), message: error.to_string() }
    }
}

fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut text = Vec::new();
    let length = file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(Error::io(path))?;
    if length as u64 > MAX_BYTES {
        let message = format!("is larger than {MAX_BYTES} bytes");
        return Err(Error::Malformed { path: path.to_owned(), message });
    }
    Ok(text)
}

/// `add_bos_token` and `bos_token` of `tokenizer_config.json`. Most tokenizers need neither: their
/// `tokenizer.json` adds the token itself.
fn configured_bos(dir: &Path, tokenizer: &tokenizers::Tokenizer) -> Result<Option<u32>> {
    let Some(config) = Object::read_optional(&dir.join("tokenizer_config.json"))? else {
        return Ok(None);
    };
    if config.flag("add_bos_token")? != Some(true) {
        return Ok(None);
    }
    // Either the token itself or an object that describes it.
    let token = match config.get("bos_token") {
        Some(serde_json::Value::Object(token)) => token.get("content").and_then(|c| c.as_str()),
        Some(token) => token.as_str(),
        None => None,
    };
    let Some(token) = token else { return Ok(None) };
    match tokenizer.token_to_id(token) {
        Some(id) => Ok(Some(id)),
        None => Err(config.error("bos_token", format!("{token:?} is not in tokenizer.json"))),
    }
}

/// Turns tokens into text as they come: a character whose bytes span tokens is held back until it
/// is whole.
#[derive(Debug, Default)]
pub(crate) struct TextStream {
    /// Tokens whose text is out, kept because some decoders look at what stands before.
    context: Vec<u32>,
    /// Tokens since then.
    fresh: Vec<u32>,
    /// Bytes of the text of `fresh` that are out.
    emitted: usize,
}

impl TextStream {
    /// A stream that continues `context`.
    pub fn after(context: &[u32]) -> Self {
        // One token decides what a decoder does with a leading space; four may be one character.
        let context = context[context.len().saturating_sub(4)..].to_vec();
        Self { context, ..Self::default() }
    }

    /// The text that is certain after one more token; often empty inside a character.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> Result<String> {
        self.fresh.push(token);
        let text = self.text(tokenizer)?;
        // An unfinished character decodes to one U+FFFD at the end.
        match text.strip_suffix('\u{fffd}') {
            Some(certain) => Ok(self.emit(certain)),
            None => {
                let piece = self.emit(&text);
                self.context = std::mem::take(&mut self.fresh);
                self.emitted = 0;
                Ok(piece)
            }
        }
    }

    /// What is still held back: the bytes of an unfinished character, as U+FFFD.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let text = self.text(tokenizer)?;
        Ok(self.emit(&text))
    }

    /// The text of `fresh`, as it reads after `context`.
    fn text(&self, tokenizer: &Tokenizer) -> Result<String> {
        let before = tokenizer.decode(&self.context)?;
        let all = tokenizer.decode(&[&self.context[..], &self.fresh[..]].concat())?;
        match all.strip_prefix(&before) {
            Some(text) => Ok(text.to_owned()),
            // The context itself ended inside a character.
            None => tokenizer.decode(&self.fresh),
        }
    }

    fn emit(&mut self, text: &str) -> String {
        let piece = text.get(self.emitted..).unwrap_or_default().to_owned();
        self.emitted = self.emitted.max(text.len());
        piece
    }
}
