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

/// Rows of a task.
const MOST: usize = 10_000;
/// The shortest prompt, in tokens.
const SHORTEST: usize = 64;

/// Which passkeys to hide.
#[derive(Clone, Debug, PartialEq)]
pub struct PasskeyOptions {
    /// Tokens of a prompt: from 64 to the model's context.
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
    /// is told; for a model of this `context`.
    ///
    /// # Errors
    /// A length or depth out of range; a length in which nothing but the question has room.
    pub fn task(&self, tokenizer: &Tokenizer, context: usize) -> Result<Task> {
        let count = self.lengths.len().saturating_mul(self.depths.len()).saturating_mul(self.count);
        if !(1..=MOST).contains(&count) {
            let allowed = format!(
                "makes {count} rows of {} lengths and {} depths, must make 1 to {MOST}",
                self.lengths.len(),
                self.depths.len()
            );
            let value = self.count.to_string();
            return Err(Error::Parameter { name: "passkey-count", value, allowed });
        }
        let mut rows = Vec::new();
        let mut state = self.seed;
        for &length in &self.lengths {
            if !(SHORTEST..=context).contains(&length) {
                let allowed = format!("must be from {SHORTEST} to {context}, the model's context");
                return Err(refused(length, allowed));
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
    let tokens = |sentences| -> Result<usize> {
        Ok(tokenizer.encode(&prompt(sentences, depth, key, first))?.len())
    };
    let least = tokens(0)?;
    if least > length {
        return Err(refused(length, format!("the question alone takes {least} tokens")));
    }
    // Halving: tokens grow with sentences. No sentence has fewer than four tokens.
    let (mut fits, mut too_many) = (0, length / 4 + 1);
    while too_many - fits > 1 {
        let middle = (fits + too_many) / 2;
        match tokens(middle)? <= length {
            true => fits = middle,
            false => too_many = middle,
        }
    }
    Ok(prompt(fits, depth, key, first))
}

fn refused(length: usize, allowed: String) -> Error {
    Error::Parameter { name: "passkey-lengths", value: length.to_string(), allowed }
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
