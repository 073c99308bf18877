//! What the hostile tests and the fuzzers share: valid inputs, ways to spoil them, and what must be
//! true of whatever is made of a spoilt one.
//!
//! The rule for every input, in words: it is accepted, or it is refused with an [`Error`] whose
//! message names the file and can be read; there is no panic, and memory stays in proportion to the
//! file. A model that is accepted also runs, or says why not.

#![allow(dead_code, reason = "each user of this module takes a part of it")]

pub mod explosive;
pub mod forged;
pub mod kind;
pub mod memory;
pub mod spoil;
pub mod targets;
pub mod valid;

use deltallm::Error;

/// What became of an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was taken for what it claims to be, and what it describes ran.
    Accepted,
    /// It was refused, with this message.
    Refused(String),
}

/// Characters of a message beyond which nobody reads it.
const MOST: usize = 1000;

/// Refused, if the message is one that a person can use: it names the file, and it ends.
pub fn refused(error: &Error, file: &str) -> Outcome {
    let message = error.to_string();
    assert!(message.contains(file), "the message does not name {file:?}: {message}");
    let length = message.chars().count();
    assert!(length < MOST, "a message of {length} characters: {message:.200}...");
    Outcome::Refused(message)
}
