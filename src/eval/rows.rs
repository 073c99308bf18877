//! Tasks as files: what is asked, read line by line.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::formats;
use crate::checkpoint::read_bounded;
use crate::error::{Error, Result, shortened};

/// No file of questions comes near this.
const MAX_BYTES: u64 = 1 << 30;
/// Bytes that the prompts of a file in SQuAD's format may have beyond some times its own.
const MOST_REPEATED: usize = 64 << 20;

/// What a task's rows ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskKind {
    /// How well the model expects a text: perplexity.
    Text,
    /// Which of several continuations is the likeliest.
    Choice,
    /// What in a text answers a question, if anything does.
    Question,
    /// A number that was told far back.
    Passkey,
}

impl TaskKind {
    /// The name in tables and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Choice => "choice",
            Self::Question => "question",
            Self::Passkey => "passkey",
        }
    }
}

/// A row of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// As in the file, or its number, from 0.
    pub id: String,
    /// What is asked.
    pub content: Content,
}

/// What a row asks.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// A text.
    Text(String),
    /// Contexts with their continuations, and the index of the right one.
    Choice {
        /// Mostly one context with several continuations; several contexts with one continuation for
        /// tasks as Winogrande.
        pairs: Vec<(Arc<str>, String)>,
        /// Index of the right one.
        label: usize,
    },
    /// A question to be answered by words of a text.
    Question {
        /// Text and question.
        prompt: String,
        /// Right answers; none where the text does not say.
        answers: Vec<String>,
        /// The answer that means "the text does not say".
        no_answer: String,
    },
    /// A number to be found again.
    Passkey {
        /// Text and question.
        prompt: String,
        /// The number.
        answer: String,
        /// Where it was told, from 0 at the beginning of the text to 1 at its end.
        depth: Option<f64>,
        /// Tokens of the prompt, about.
        length: Option<usize>,
    },
}

impl Content {
    /// Of which kind of task it is.
    pub fn kind(&self) -> TaskKind {
        match self {
            Self::Text(_) => TaskKind::Text,
            Self::Choice { .. } => TaskKind::Choice,
            Self::Question { .. } => TaskKind::Question,
            Self::Passkey { .. } => TaskKind::Passkey,
        }
    }
}

/// Rows of one kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// The file's name without its extension, or the name of what made the rows.
    pub name: String,
    /// What the rows ask.
    pub kind: TaskKind,
    /// The rows: at least one.
    pub rows: Vec<Row>,
}

impl Task {
    /// Reads at most `limit` rows of a file: JSON Lines where its name ends in `.jsonl`, SQuAD's own
    /// format where it ends in `.json`, else one text.
    ///
    /// # Errors
    /// A file that cannot be read, names the file, the line and the field that is wrong.
    pub fn read(path: impl AsRef<Path>, limit: usize) -> Result<Self> {
        let path = path.as_ref();
        let malformed = |message: String| Error::Malformed { path: path.to_owned(), message };
        let bytes = read_bounded(path, MAX_BYTES)?;
        let text = String::from_utf8(bytes).map_err(|error| {
            malformed(format!("is not UTF-8: byte {}", error.utf8_error().valid_up_to()))
        })?;
        let text = text.trim_start_matches('\u{feff}');
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let rows = match extension.to_ascii_lowercase().as_str() {
            "jsonl" | "ndjson" => lines(path, text, limit)?,
            "json" => squad(path, text, limit)?,
            _ => vec![Row { id: "0".into(), content: Content::Text(text.to_owned()) }],
        };
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let Some(kind) = rows.first().map(|row| row.content.kind()) else {
            return Err(malformed("has no rows".into()));
        };
        if let Some(at) = rows.iter().position(|row| row.content.kind() != kind) {
            let (found, kind) = (rows[at].content.kind().name(), kind.name());
            return Err(malformed(format!(
                "row {} is of kind {found}, those before are {kind}",
                at + 1
            )));
        }
        if let Some(at) = rows.iter().position(|row| row.content == Content::Text(String::new())) {
            return Err(malformed(format!("row {}: the text is empty", at + 1)));
        }
        Ok(Self { name, kind, rows })
    }
}

fn lines(path: &Path, text: &str, limit: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    for (at, line) in lines.take(limit) {
        let line_error = |message: String| Error::Malformed {
            path: path.to_owned(),
            message: shortened(format!("line {}: {message}", at + 1)),
        };
        let object = match serde_json::from_str(line) {
            Ok(Value::Object(object)) => object,
            Ok(_) => return Err(line_error("is not a JSON object".into())),
            Err(error) => return Err(line_error(format!("is not valid JSON: {error}"))),
        };
        let content = formats::content(&object).map_err(line_error)?;
        rows.push(Row { id: identity(&object, rows.len()), content });
    }
    Ok(rows)
}

/// SQuAD's own files: `{"data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}`.
fn squad(path: &Path, text: &str, limit: usize) -> Result<Vec<Row>> {
    let malformed =
        |message: String| Error::Malformed { path: path.to_owned(), message: shortened(message) };
    let value: Value = serde_json::from_str(text)
        .map_err(|error| malformed(format!("is not valid JSON: {error}")))?;
    let expected = || {
        malformed(
            "is not in SQuAD's format ({\"data\": [{\"paragraphs\": [...]}]}); rows of other \
             tasks stand in a .jsonl file"
                .into(),
        )
    };
    let list = |value, name| list(value, name).ok_or_else(expected);
    // A paragraph is there once, but stands in the prompt of each of its questions.
    let (mut bytes, most) = (0, MOST_REPEATED.saturating_add(16 * text.len()));
    let mut rows = Vec::new();
    for article in list(&value, "data")? {
        for paragraph in list(article, "paragraphs")? {
            for question in list(paragraph, "qas")? {
                if rows.len() == limit {
                    return Ok(rows);
                }
                let Value::Object(question) = question else { return Err(expected()) };
                let mut object = question.clone();
                for (name, from) in [("title", article), ("context", paragraph)] {
                    if let Some(value) = from.get(name) {
                        object.insert(name.into(), value.clone());
                    }
                }
                let id = identity(&object, rows.len());
                let content = formats::content(&object)
                    .map_err(|message| malformed(format!("question {id}: {message}")))?;
                if let Content::Question { prompt, .. } = &content {
                    bytes += prompt.len();
                }
                if bytes > most {
                    let message = format!("its questions with their texts have over {most} bytes");
                    return Err(malformed(message));
                }
                rows.push(Row { id, content });
            }
        }
    }
    Ok(rows)
}

fn list<'a>(value: &'a Value, name: &str) -> Option<&'a [Value]> {
    value.get(name)?.as_array().map(Vec::as_slice)
}

fn identity(object: &Map<String, Value>, number: usize) -> String {
    let id = ["id", "doc_id", "ind"].iter().find_map(|name| object.get(*name));
    match id {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => number.to_string(),
    }
}
