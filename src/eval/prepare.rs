//! Rows as tokens.

use std::ops::Range;
use std::sync::Arc;

use super::rows::{Content, Row};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// Tokens of which those from `from` on are scored.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// A text, which windows share.
    text: Arc<[u32]>,
    /// Where in it this part lies: at least two tokens.
    range: Range<usize>,
    /// At least one: nothing foretells the first token.
    from: usize,
}

impl Part {
    /// The tokens.
    pub fn ids(&self) -> &[u32] {
        &self.text[self.range.clone()]
    }

    /// The first of them that is scored.
    pub fn from(&self) -> usize {
        self.from
    }
}

/// A row as tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Prepared {
    /// A text in overlapping windows, of which each token but the first is scored once.
    Text {
        /// The windows.
        windows: Vec<Part>,
        /// Bytes of the text.
        bytes: usize,
    },
    /// Each context with its continuation, which is scored.
    Choice {
        /// Of each choice.
        choices: Vec<Part>,
        /// Characters of each choice, without the space before it: what its likelihood is divided
        /// by (`acc_norm` of lm-evaluation-harness).
        lengths: Vec<usize>,
        /// The right one.
        label: usize,
    },
    /// A question.
    Question {
        /// Text and question.
        prompt: Vec<u32>,
        /// Tokens that an answer may have.
        most: usize,
        /// Right answers.
        answers: Vec<String>,
        /// The answer that means that there is none.
        no_answer: String,
    },
    /// A passkey.
    Passkey {
        /// Text and question.
        prompt: Vec<u32>,
        /// Tokens that an answer may have.
        most: usize,
        /// The key.
        key: String,
        /// Where it was told.
        depth: Option<f64>,
        /// Tokens of the prompt, about.
        length: Option<usize>,
    },
}

/// How rows become tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrepareOptions {
    /// Tokens of a window of a text: at least 2.
    pub length: usize,
    /// Tokens from the start of a window to that of the next: 1 to `length`.
    pub stride: usize,
    /// Tokens that an answer may have: at least 1.
    pub answer: usize,
}

/// Tokens that a passkey's answer may have beside the key: "is", quotation marks.
const PASSKEY_ROOM: usize = 8;

impl Prepared {
    /// Makes tokens of a row.
    ///
    /// Context and continuation are encoded together, and cut where the context alone would end, as
    /// lm-evaluation-harness does: spaces at the end of a context belong to its continuation.
    ///
    /// # Errors
    /// Options out of range, and a row without anything to be scored.
    pub fn new(row: &Row, tokenizer: &Tokenizer, options: &PrepareOptions) -> Result<Self> {
        options.check()?;
        Ok(match &row.content {
            Content::Text(text) => {
                let windows = strided(&tokenizer.encode(text)?, options.length, options.stride);
                if windows.is_empty() {
                    return Err(nothing(row, "the text has a single token"));
                }
                Self::Text { windows, bytes: text.len() }
            }
            Content::Choice { pairs, label } => {
                let choices = pairs
                    .iter()
                    .map(|(context, continuation)| continued(row, tokenizer, context, continuation))
                    .collect::<Result<_>>()?;
                let length = |(_, choice): &(Arc<str>, String)| {
                    choice.strip_prefix(' ').unwrap_or(choice).chars().count()
                };
                Self::Choice { choices, lengths: pairs.iter().map(length).collect(), label: *label }
            }
            Content::Question { prompt, answers, no_answer } => Self::Question {
                prompt: tokenizer.encode(prompt)?,
                most: options.answer,
                answers: answers.clone(),
                no_answer: no_answer.clone(),
            },
            Content::Passkey { prompt, answer, depth, length } => Self::Passkey {
                prompt: tokenizer.encode(prompt)?,
                most: tokenizer.encode_continuation(answer)?.len() + PASSKEY_ROOM,
                key: answer.clone(),
                depth: *depth,
                length: *length,
            },
        })
    }

    /// Tokens that the longest part needs of the model's context.
    pub fn longest(&self) -> usize {
        let parts =
            |parts: &[Part]| parts.iter().map(|part| part.range.len() - 1).max().unwrap_or(0);
        match self {
            Self::Text { windows, .. } => parts(windows),
            Self::Choice { choices, .. } => parts(choices),
            Self::Question { prompt, most, .. } | Self::Passkey { prompt, most, .. } => {
                prompt.len().saturating_add(*most)
            }
        }
    }

    /// Tokens of it in all: a measure of the work.
    pub fn tokens(&self) -> usize {
        let parts = |parts: &[Part]| parts.iter().map(|part| part.range.len()).sum();
        match self {
            Self::Text { windows, .. } => parts(windows),
            Self::Choice { choices, .. } => parts(choices),
            Self::Question { prompt, .. } | Self::Passkey { prompt, .. } => prompt.len(),
        }
    }
}

impl PrepareOptions {
    fn check(&self) -> Result<()> {
        let refuse = |name, value: usize, allowed: String| {
            Err(Error::Parameter { name, value: value.to_string(), allowed })
        };
        match *self {
            Self { length: 0 | 1, .. } => {
                refuse("length", self.length, "must be at least 2".into())
            }
            Self { length, stride, .. } if !(1..=length).contains(&stride) => {
                let allowed = format!("must be from 1 to {length}, the length of a window");
                refuse("stride", stride, allowed)
            }
            Self { answer: 0, .. } => refuse("answer-tokens", 0, "must be at least 1".into()),
            _ => Ok(()),
        }
    }
}

/// Windows of `length` tokens, each `stride` behind the one before; of each only the tokens are
/// scored that no window before it has had (the usual sliding window: see
/// <https://huggingface.co/docs/transformers/perplexity>).
fn strided(ids: &[u32], length: usize, stride: usize) -> Vec<Part> {
    let (mut windows, mut scored) = (Vec::new(), 1);
    let text: Arc<[u32]> = ids.into();
    for start in (0..ids.len()).step_by(stride) {
        let end = ids.len().min(start.saturating_add(length));
        if end > scored {
            // The first token of a window cannot be scored: where windows do not overlap, the
            // one before lends its last token.
            let start = start.min(scored - 1);
            windows.push(Part { text: text.clone(), range: start..end, from: scored - start });
        }
        scored = scored.max(end);
        if end == ids.len() {
            break;
        }
    }
    windows
}

fn continued(row: &Row, tokenizer: &Tokenizer, context: &str, choice: &str) -> Result<Part> {
    let trimmed = context.trim_end();
    let continuation = format!("{}{choice}", &context[trimmed.len()..]);
    let ids = tokenizer.encode(&format!("{trimmed}{continuation}"))?;
    let from = tokenizer.encode(trimmed)?.len();
    if from == 0 {
        return Err(nothing(row, "the context is empty and the model has no token to begin with"));
    }
    if ids.len() <= from {
        return Err(nothing(row, "a choice has no tokens of its own"));
    }
    Ok(Part { range: 0..ids.len(), text: ids.into(), from })
}

fn nothing(row: &Row, why: &str) -> Error {
    Error::Parameter { name: "row", value: row.id.clone(), allowed: why.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_first_is_scored_once() {
        let ids: Vec<u32> = (0..23).collect();
        for length in 2..26 {
            for stride in 1..=length {
                let windows = strided(&ids, length, stride);
                let scored: Vec<u32> =
                    windows.iter().flat_map(|w| w.ids()[w.from..].iter().copied()).collect();
                assert_eq!(scored, ids[1..], "{length} {stride}");
                for part in &windows {
                    assert!(part.from >= 1 && part.ids().len() <= length + 1, "{length} {stride}");
                }
            }
        }
        assert!(strided(&ids[..1], 4, 2).is_empty() && strided(&[], 4, 2).is_empty());
    }
}
