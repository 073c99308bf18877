//! A checkpoint's chat template: messages to the text that the model was trained to continue.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use minijinja::{Environment, Value, context};
use serde_json::Value as Json;

use super::{Message, budget, jinja};
use crate::checkpoint::{Files, Object};
use crate::error::{Error, Result, shortened};
use crate::model::Model;
use crate::tokenizer::Tokenizer;

/// In a file of its own, which counts before the field of `tokenizer_config.json`.
const FILE: &str = "chat_template.jinja";
const CONFIG: &str = "tokenizer_config.json";
const FIELD: &str = "chat_template";

/// The longest templates have some tens of kilobytes.
const MAX_SOURCE: u64 = 1 << 20;
/// A text of this many bytes fits in no model's context.
const MAX_TEXT: usize = budget::TOTAL;

/// Tokens that a template may name.
const TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A chat template, rendered as transformers' `apply_chat_template` does: Jinja with
/// `trim_blocks` and `lstrip_blocks`, the model's special tokens, `raise_exception`,
/// `strftime_now` and its own `tojson`; without tools and documents.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The file, for errors.
    path: PathBuf,
    variables: BTreeMap<String, Value>,
}

impl ChatTemplate {
    /// The template of a model's checkpoint: `chat_template.jinja`, else `chat_template` of
    /// `tokenizer_config.json`, of several the one called `default`. `None` where there is none.
    ///
    /// # Errors
    /// A file that cannot be read; a template that is not Jinja.
    pub fn of(model: &Model) -> Result<Option<Self>> {
        Self::read(model.files())
    }

    /// A template from its text, with the special tokens that it names, such as
    /// `("bos_token", "<s>")`.
    ///
    /// # Errors
    /// A text that is not Jinja.
    pub fn new<'a>(
        source: &str,
        tokens: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self> {
        let mut template = Self::compile(source, PathBuf::from(FIELD))?;
        for (name, token) in tokens {
            template.set(name, token);
        }
        Ok(template)
    }

    /// Gives the template a variable beyond the messages, such as `date_string` of Llama 3.
    pub fn set(&mut self, name: impl Into<String>, value: &str) {
        self.variables.insert(name.into(), value.into());
    }

    /// The text of a conversation; with `add_generation_prompt`, up to where the model's turn
    /// begins.
    ///
    /// # Errors
    /// What the template refuses, such as roles that do not alternate; a template that is broken, or
    /// that does not end.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let call = context! {
            messages => messages.iter().map(to_value).collect::<Vec<_>>(),
            add_generation_prompt => add_generation_prompt,
            tools => Value::from(()),
            documents => Value::from(()),
        };
        let variables = context! { ..call, ..Value::from(self.variables.clone()) };
        budget::begin();
        let mut text = Bounded(Vec::new());
        let rendered = self
            .environment
            .get_template(FIELD)
            .and_then(|template| template.render_captured_to(variables, &mut text).map(drop));
        rendered.map_err(|error| fault(&self.path, &error))?;
        String::from_utf8(text.0).map_err(|error| Error::Malformed {
            path: self.path.clone(),
            message: format!("chat template: {error}"),
        })
    }

    /// The token ids of [`ChatTemplate::render`], for an empty session: special tokens in the text
    /// are those tokens, and no other is put before it.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>> {
        tokenizer.encode_continuation(&self.render(messages, add_generation_prompt)?)
    }

    fn read(files: &Files) -> Result<Option<Self>> {
        let config = Object::read_optional(files, CONFIG)?;
        let template = match files.read_optional(FILE, MAX_SOURCE)? {
            Some(source) => {
                let path = files.path(FILE);
                let source = String::from_utf8(source.into_owned()).map_err(|error| {
                    let message = format!("is not UTF-8: {}", error.utf8_error());
                    Error::Malformed { path: path.clone(), message }
                })?;
                Some(Self::compile(&source, path)?)
            }
            None => match config.as_ref().map(of_config).transpose()?.flatten() {
                Some(source) => Some(Self::compile(source, files.path(CONFIG))?),
                None => None,
            },
        };
        let (Some(mut template), config) = (template, config) else { return Ok(None) };
        for name in TOKENS {
            // Either the token itself or an object that describes it.
            let token = match config.as_ref().and_then(|config| config.get(name)) {
                Some(Json::Object(token)) => token.get("content").and_then(Json::as_str),
                Some(token) => token.as_str(),
                None => None,
            };
            if let Some(token) = token {
                template.set(name, token);
            }
        }
        Ok(Some(template))
    }

    fn compile(source: &str, path: PathBuf) -> Result<Self> {
        if source.len() as u64 > MAX_SOURCE {
            let message = format!("chat template: has {} bytes, above {MAX_SOURCE}", source.len());
            return Err(Error::Malformed { path, message });
        }
        let environment =
            jinja::environment(FIELD, source).map_err(|error| fault(&path, &error))?;
        Ok(Self { environment, path, variables: BTreeMap::new() })
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("path", &self.path).finish_non_exhaustive()
    }
}

/// The field is a template, or a list of templates with names.
fn of_config(config: &Object) -> Result<Option<&str>> {
    let list = match config.get(FIELD) {
        None => return Ok(None),
        Some(Json::String(source)) => return Ok(Some(source)),
        Some(Json::Array(list)) => list,
        Some(_) => return Err(config.error(FIELD, "is neither a text nor a list of templates")),
    };
    let name = |entry: &Json| entry.get("name").and_then(Json::as_str).map(str::to_owned);
    let default = list.iter().find(|entry| name(entry).as_deref() == Some("default"));
    match default.and_then(|entry| entry.get("template")).and_then(Json::as_str) {
        Some(source) => Ok(Some(source)),
        None => {
            let names: Vec<String> = list.iter().filter_map(name).collect();
            let message = format!("has no template called default, only {names:?}");
            Err(config.error(FIELD, message))
        }
    }
}

/// The mapping that templates read.
fn to_value(message: &Message) -> Value {
    Value::from_pairs([("role", message.role.name()), ("content", &message.content)])
}

fn fault(path: &Path, error: &minijinja::Error) -> Error {
    let line = error.line().map_or_else(String::new, |line| format!("line {line}: "));
    let what = match error.detail() {
        Some(detail) => detail.to_owned(),
        None => error.kind().to_string(),
    };
    let message = shortened(format!("chat template: {line}{what}"));
    Error::Malformed { path: path.to_owned(), message }
}

/// A text in memory that does not grow without end.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_TEXT {
            return Err(io::Error::other("the text is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
