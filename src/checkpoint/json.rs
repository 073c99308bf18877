//! JSON files whose fields are checked one by one, so that an error can name the field.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::files::{Files, read_bounded};
use crate::error::{Error, Result, shortened};

/// No configuration of a real model comes near this; a larger file is not read.
const MAX_BYTES: u64 = 16 << 20;

/// A JSON object of a file, or of a field in it.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    path: PathBuf,
    /// The dotted path of this object within the file, with a dot at its end unless empty.
    prefix: String,
    fields: Map<String, Value>,
}

impl Object {
    /// Reads a file that holds one JSON object.
    pub fn read(files: &Files, name: &str) -> Result<Self> {
        Self::parse(files.path(name), &files.read(name, MAX_BYTES)?)
    }

    /// Reads a file that is not part of a checkpoint.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(path.to_owned(), &read_bounded(path, MAX_BYTES)?)
    }

    /// Reads a file that need not be there.
    pub fn read_optional(files: &Files, name: &str) -> Result<Option<Self>> {
        let text = files.read_optional(name, MAX_BYTES)?;
        text.map(|text| Self::parse(files.path(name), &text)).transpose()
    }

    fn parse(path: PathBuf, text: &[u8]) -> Result<Self> {
        // Some editors begin a file with a byte order mark.
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        let message = match serde_json::from_slice(text) {
            Ok(Value::Object(fields)) => return Ok(Self { path, prefix: String::new(), fields }),
            Ok(_) => "is not a JSON object".into(),
            Err(error) => format!("is not valid JSON: {error}"),
        };
        Err(Error::Malformed { path, message })
    }

    /// The field's value; `None` where it is absent or null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// An error about a field of this object.
    pub fn error(&self, field: &str, message: impl Into<String>) -> Error {
        Error::Config {
            path: self.path.clone(),
            field: shortened(format!("{}{field}", self.prefix)),
            message: shortened(message),
        }
    }

    /// An error that says that the file asks for something that is not computed.
    pub fn unsupported(&self, what: impl Into<String>, supported: impl Into<String>) -> Error {
        Error::Unsupported {
            path: self.path.clone(),
            what: shortened(what),
            supported: supported.into(),
        }
    }

    /// A field that must be there.
    pub fn required<T>(&self, field: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(field, "is missing"))
    }

    /// A whole number above 0.
    pub fn count(&self, field: &str) -> Result<Option<usize>> {
        self.typed(field, "a whole number from 1 to 2^31", |value| {
            value.as_u64().filter(|n| (1..=1 << 31).contains(n)).map(|n| n as usize)
        })
    }

    /// A finite number above 0.
    pub fn positive(&self, field: &str) -> Result<Option<f64>> {
        self.typed(field, "a number above 0", |value| {
            value.as_f64().filter(|x| *x > 0.0 && x.is_finite())
        })
    }

    /// A finite number.
    pub fn number(&self, field: &str) -> Result<Option<f64>> {
        self.typed(field, "a number", |value| value.as_f64().filter(|x| x.is_finite()))
    }

    /// A truth value.
    pub fn flag(&self, field: &str) -> Result<Option<bool>> {
        self.typed(field, "true or false", Value::as_bool)
    }

    /// A string.
    pub fn text(&self, field: &str) -> Result<Option<&str>> {
        self.typed(field, "a string", Value::as_str)
    }

    /// One token id or a list of them; empty where the field is absent.
    pub fn token_ids(&self, field: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = self.typed(field, "a token id or a list of token ids", |value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    /// A nested object.
    pub fn object(&self, field: &str) -> Result<Option<Object>> {
        let fields = self.typed(field, "an object", Value::as_object)?;
        Ok(fields.map(|fields| Object {
            path: self.path.clone(),
            prefix: format!("{}{field}.", self.prefix),
            fields: fields.clone(),
        }))
    }

    /// A list of objects.
    pub fn objects(&self, field: &str) -> Result<Option<Vec<Object>>> {
        let read = |value: &Value| {
            let object = |(i, value): (usize, &Value)| {
                let fields = value.as_object()?.clone();
                let prefix = format!("{}{field}[{i}].", self.prefix);
                Some(Object { path: self.path.clone(), prefix, fields })
            };
            value.as_array()?.iter().enumerate().map(object).collect()
        };
        self.typed(field, "a list of objects", read)
    }

    /// The entries of this object.
    pub fn entries(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.fields.iter()
    }

    fn typed<'a, T>(
        &'a self,
        field: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let found = || {
            let text = value.to_string();
            let text = match text.char_indices().nth(60) {
                Some((end, _)) => format!("{}...", &text[..end]),
                None => text,
            };
            self.error(field, format!("is {text}, expected {expected}"))
        };
        read(value).map(Some).ok_or_else(found)
    }
}
