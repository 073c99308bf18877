//! What rendering a template may make: so many bytes of text and lists in all.
//!
//! The template engine counts instructions, but one instruction can double a text. What can grow is
//! therefore charged here before it is made or, where one operation makes no more than it is given,
//! right after: see [`counted`](super::counted) for where.

use std::cell::Cell;
use std::fmt;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// Bytes that one rendering may make in all, those of passing values among them. Text of a
/// conversation that fills the largest context has a megabyte or two.
pub const TOTAL: usize = 32 << 20;
/// What an element of a list counts beside its text.
const ELEMENT: usize = 8;
/// What a list counts whose elements are made when they are asked for: those that are made of each
/// other are a stack of calls.
const LAZY: usize = 8192;
/// Lists and mappings within each other.
const MAX_DEPTH: usize = 100;

thread_local! {
    /// A rendering stays on its thread, and no template renders another.
    static LEFT: Cell<usize> = const { Cell::new(TOTAL) };
}

/// Begins a rendering.
pub fn begin() {
    LEFT.set(TOTAL);
}

/// Charges so many bytes.
pub fn spend(bytes: usize) -> Result<(), Error> {
    match LEFT.get().checked_sub(bytes) {
        Some(left) => {
            LEFT.set(left);
            Ok(())
        }
        None => {
            LEFT.set(0);
            Err(refused(format!("makes more than {} MB of text", TOTAL >> 20)))
        }
    }
}

/// Charges a value as it is held: a text, or the list alone.
pub fn spend_held(value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::String => spend(value.as_str().map_or(0, str::len)),
        ValueKind::Bytes => spend(value.len().unwrap_or(0)),
        ValueKind::Iterable => spend(LAZY.saturating_add(elements(value))),
        ValueKind::Seq | ValueKind::Map => spend(elements(value)),
        _ => Ok(()),
    }
}

fn elements(value: &Value) -> usize {
    value.len().unwrap_or(0).saturating_mul(ELEMENT)
}

/// Charges a value as it is written out, with all that is in it.
pub fn spend_written(value: &Value) -> Result<(), Error> {
    spend_within(value, 0)
}

fn spend_within(value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(refused(format!("nests values more than {MAX_DEPTH} deep")));
    }
    spend_held(value)?;
    match value.kind() {
        // What does not know its length may give its elements only once.
        ValueKind::Seq | ValueKind::Iterable if value.len().is_some() => {
            for element in value.try_iter()? {
                spend_within(&element, depth + 1)?;
            }
        }
        ValueKind::Map => {
            for key in value.try_iter()? {
                spend_within(&key, depth + 1)?;
                spend_within(&value.get_item(&key)?, depth + 1)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// The error of a template that goes too far.
pub fn refused(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// A text that is charged while it is written.
pub struct Written(pub String);

impl fmt::Write for Written {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        spend(text.len()).map_err(|_| fmt::Error)?;
        self.0.push_str(text);
        Ok(())
    }
}

impl std::io::Write for Written {
    /// JSON is written in whole characters.
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let text = std::str::from_utf8(bytes).map_err(std::io::Error::other)?;
        fmt::Write::write_str(self, text)
            .map_err(|_| std::io::Error::other("the text is too long"))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
