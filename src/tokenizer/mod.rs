//! Text to token ids and back, by Hugging Face's `tokenizers`.

mod outline;

use std::path::{Path, PathBuf};

use crate::checkpoint::{Checkpoint, Files, Object};
use crate::contained::contained;
use crate::error::{Error, Result, shortened};

/// Llama 3's file has 17 MB; fifteen times that is no tokenizer.
const MAX_BYTES: u64 = 256 << 20;

/// The tokenizer of a checkpoint.
#[derive(Debug)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    beginning: Beginning,
}

/// What stands before the text of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beginning {
    /// What `tokenizer.json` adds itself.
    AsInFile,
    /// That, and this token unless it is there already.
    With(u32),
    /// No special token.
    Nothing,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and `tokenizer_config.json` of a checkpoint.
    ///
    /// # Errors
    /// A missing or malformed file; a vocabulary that is larger than the model's embedding.
    pub fn open(checkpoint: &Checkpoint) -> Result<Self> {
        let path = checkpoint.files.path("tokenizer.json");
        let text = checkpoint.files.read("tokenizer.json", MAX_BYTES)?;
        let malformed = |message| {
            let (path, message) = (path.clone(), shortened(message));
            Error::Malformed { path, message }
        };
        outline::check(&text).map_err(malformed)?;
        let mut inner = guarded(&path, || tokenizers::Tokenizer::from_bytes(&text))?;
        // A prompt is never shortened or filled up behind the caller's back.
        inner.with_padding(None);
        guarded(&path, || inner.with_truncation(None).map(drop))?;

        let vocabulary = checkpoint.config.vocabulary;
        let highest = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        if let Some((token, id)) = highest
            && id as usize >= vocabulary
        {
            return Err(malformed(format!(
                "has token id {id}, but the model's embedding has only {vocabulary} rows: {token:?}"
            )));
        }
        let beginning = beginning(&checkpoint.files, &inner)?;
        let tokenizer = Self { path, inner, beginning };
        // A template that names what is not there shows at the first use only, and so does a decoder
        // that cuts more than there is.
        for text in ["", "a"] {
            let ids = tokenizer.encode(text)?;
            if let Some(id) = ids.into_iter().find(|&id| id as usize >= vocabulary) {
                let path = tokenizer.path;
                let message = format!("makes token {id} of a text, beyond {vocabulary}");
                return Err(Error::Malformed { path, message });
            }
            tokenizer.decode(&tokenizer.encode(text)?)?;
        }
        Ok(tokenizer)
    }

    /// Token ids of `text`, with the special tokens that the model expects at its beginning.
    ///
    /// # Errors
    /// What the tokenizer reports; ordinary text never fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode_with(text, self.beginning != Beginning::Nothing)?;
        if let Beginning::With(bos) = self.beginning
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
        self.encode_with(text, false)
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(&self.path, || self.inner.encode(text, special))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids` without special tokens. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// What the tokenizer reports.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(&self.path, || self.inner.decode(ids, true))
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
}

/// Calls the tokenizer library, which panics on some files that it should refuse: such a panic is an
/// error of the file.
fn guarded<T>(path: &Path, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let malformed = |message: String| {
        let (path, message) = (path.to_owned(), shortened(message));
        Error::Malformed { path, message }
    };
    match contained(call) {
        Some(result) => result.map_err(|error| malformed(format!("is not usable: {error}"))),
        None => Err(malformed("is inconsistent: the tokenizer library panicked on it".into())),
    }
}

/// `add_bos_token` and `bos_token` of `tokenizer_config.json`, as transformers takes them: the flag
/// counts for every class that has it set, and is true by default for Llama's own classes. Most
/// files need neither: their `tokenizer.json` adds the token itself.
fn beginning(files: &Files, tokenizer: &tokenizers::Tokenizer) -> Result<Beginning> {
    let Some(config) = Object::read_optional(files, "tokenizer_config.json")? else {
        return Ok(Beginning::AsInFile);
    };
    if config.flag("add_eos_token")? == Some(true) {
        log::warn!("add_eos_token is left out: a prompt that is ended cannot be continued");
    }
    let class = config.text("tokenizer_class")?.unwrap_or_default();
    let llama = matches!(class, "LlamaTokenizer" | "LlamaTokenizerFast");
    match config.flag("add_bos_token")? {
        Some(false) if llama => return Ok(Beginning::Nothing),
        None if !llama => return Ok(Beginning::AsInFile),
        Some(false) => return Ok(Beginning::AsInFile),
        Some(true) | None => {}
    }
    // Either the token itself or an object that describes it.
    let token = match config.get("bos_token") {
        Some(serde_json::Value::Object(token)) => token.get("content").and_then(|c| c.as_str()),
        Some(token) => token.as_str(),
        None => None,
    };
    let Some(token) = token else { return Ok(Beginning::AsInFile) };
    match tokenizer.token_to_id(token) {
        Some(id) => Ok(Beginning::With(id)),
        None => Err(config.error("bos_token", format!("{token:?} is not in tokenizer.json"))),
    }
}

/// Tokens after which a text that is still unfinished is taken as it is.
const MAX_FRESH: usize = 64;

/// The beginning of `text` that no later token changes.
///
/// Of a character with up to four bytes, at most three are there before it is whole. They decode to
/// one U+FFFD together (byte-level tokenizers) or to one each (byte fallback).
fn certain(text: &str) -> &str {
    let mut rest = text;
    for _ in 0..3 {
        rest = rest.strip_suffix('\u{fffd}').unwrap_or(rest);
    }
    rest
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
        let certain = certain(&text).len();
        let piece = self.emit(&text[..certain]);
        // Bytes that never become whole must not be decoded again with every token.
        if certain == text.len() || self.fresh.len() == MAX_FRESH {
            self.context = std::mem::take(&mut self.fresh);
            self.emitted = 0;
        }
        Ok(piece)
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A tokenizer whose tokens are single bytes, in one of the two ways of writing them.
    fn bytes(fallback: bool) -> Tokenizer {
        let alphabet = crate::checkpoint::synthetic::byte_alphabet();
        let name = |byte: u8| match fallback {
            true => format!("<0x{byte:02X}>"),
            false => alphabet[usize::from(byte)].to_string(),
        };
        let vocab: serde_json::Map<_, _> = (0..=255).map(|b| (name(b), json!(b))).collect();
        let decoder = match fallback {
            true => json!({ "type": "Sequence", "decoders": [
                { "type": "ByteFallback" }, { "type": "Fuse" }] }),
            false => json!({ "type": "ByteLevel", "add_prefix_space": false,
                             "trim_offsets": true, "use_regex": true }),
        };
        let file = json!({
            "version": "1.0", "decoder": decoder,
            "model": { "type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": fallback },
        });
        let inner = tokenizers::Tokenizer::from_bytes(file.to_string()).expect("a tokenizer");
        Tokenizer { path: PathBuf::new(), inner, beginning: Beginning::AsInFile }
    }

    fn stream(tokenizer: &Tokenizer, bytes: &[u8]) -> Vec<String> {
        let mut stream = TextStream::after(&[]);
        let push = |&byte: &u8| stream.push(tokenizer, byte.into()).expect("text");
        let mut pieces: Vec<String> = bytes.iter().map(push).collect();
        pieces.push(stream.finish(tokenizer).expect("text"));
        pieces
    }

    #[test]
    fn characters_come_whole() {
        let text = "a €b 😀😀é\n日本 👩‍🚀.";
        for fallback in [false, true] {
            let tokenizer = bytes(fallback);
            let pieces = stream(&tokenizer, text.as_bytes());
            assert_eq!(pieces.concat(), text, "fallback {fallback}");
            assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')));
        }
    }

    #[test]
    fn broken_bytes_come_as_replacements_and_do_not_stop_the_text() {
        for fallback in [false, true] {
            let tokenizer = bytes(fallback);
            let endless = stream(&tokenizer, &[0xff; 1000]);
            assert!(endless[..900].concat().chars().count() > 800, "fallback {fallback}");
            let cut = stream(&tokenizer, &"ab€".as_bytes()[..4]).concat();
            assert!(cut.starts_with("ab\u{fffd}"), "fallback {fallback}: {cut:?}");
        }
        // Byte-level tokenizers decode what follows broken bytes.
        let mixed = [&[0xff, 0xe2][..], "€ x".as_bytes()].concat();
        assert!(stream(&bytes(false), &mixed).concat().ends_with("€ x"));
    }
}
