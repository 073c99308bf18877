//! A number hidden in a long and dull text (the passkey test of Mohtashami and Jaggi,
//! arXiv 2305.16300).

use super::rows::{Content, Row, Task, TaskKind};
use crate::error::{Error, Result};
use crate::sampler::splitmix64;
use crate::tokenizer::Tokenizer;

const DULL: [&str; 6] = [
    "The river runs slowly past the old mill.",
    "A cart stands by the gate, and nobody moves it.",
    "Grey clouds drift over the hills.",
    "The road is long and the fields are flat.",
    "Now and then a bird crosses the yard.",
    "The day goes on as the days before it did.",
];

/// Which passkeys to hide.
#[derive(Clone, Debug, PartialEq)]
pub struct PasskeyOptions {
    /// Tokens of a prompt: at least 64 each.
    pub lengths: Vec<usize>,
    /// Where the key stands: from 0, the beginning of the text, to 1, its end.
    pub depths: Vec<f64>,
    /// Keys for each length and depth.
    pub count: usize,
    /// The same seed gives the same keys.
    pub seed: u64,
}

impl PasskeyOptions {
    /// Prompts of at most these lengths, filled with dull sentences, in which a number of five digits
    /// is told once.
    ///
    /// # Errors
    /// A length or depth out of range.
    pub fn task(&self, tokenizer: &Tokenizer) -> Result<Task> {
        let mut rows = Vec::new();
        let mut state = self.seed;
        for &length in &self.lengths {
            if length < 64 {
                let (value, allowed) = (length.to_string(), "must be at least 64 tokens".into());
                return Err(Error::Parameter { name: "passkey-lengths", value, allowed });
            }
            for &depth in &self.depths {
                if !(0.0..=1.0).contains(&depth) {
                    let (value, allowed) = (depth.to_string(), "must be from 0 to 1".into());
                    return Err(Error::Parameter { name: "passkey-depths", value, allowed });
                }
                for _ in 0..self.count {
                    let key = (10_000 + splitmix64(&mut state) % 90_000).to_string();
                    let first = splitmix64(&mut state) as usize;
                    let prompt = fitted(tokenizer, length, depth, &key, first)?;
                    let id = format!("{length}-{depth}-{}", rows.len());
                    let (depth, length) = (Some(depth), Some(length));
                    let content = Content::Passkey { prompt, answer: key, depth, length };
                    rows.push(Row { id, content });
                }
            }
        }
        if rows.is_empty() {
            let (value, allowed) = ("none".into(), "at least one length, depth and key".into());
            return Err(Error::Parameter { name: "passkey", value, allowed });
        }
        Ok(Task { name: "passkey".into(), kind: TaskKind::Passkey, rows })
    }
}

/// The longest prompt of at most `length` tokens.
fn fitted(
    tokenizer: &Tokenizer,
    length: usize,
    depth: f64,
    key: &str,
    first: usize,
) -> Result<String> {
    // Halving: tokens grow with sentences. No sentence has fewer than four tokens.
    let (mut fits, mut too_many) = (0, length / 4 + 1);
    while too_many - fits > 1 {
        let middle = (fits + too_many) / 2;
        match tokenizer.encode(&prompt(middle, depth, key, first))?.len() <= length {
            true => fits = middle,
            false => too_many = middle,
        }
    }
    Ok(prompt(fits, depth, key, first))
}

fn prompt(sentences: usize, depth: f64, key: &str, first: usize) -> String {
    let before = (depth * sentences as f64).round() as usize;
    let dull = |i: usize| DULL[(first % DULL.len() + i) % DULL.len()].to_owned();
    let mut told: Vec<String> = (0..sentences).map(dull).collect();
    told.insert(before, format!("The pass key is {key}. Remember it: {key} is the pass key."));
    format!(
        "Somewhere in this text stands a pass key. Find it and remember it.\n\n{}\n\nWhat is the \
         pass key? The pass key is",
        told.join(" ")
    )
}
