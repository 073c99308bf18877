//! Rows run through a model with several policies side by side.

use std::ops::AddAssign;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::lockstep::{Expectation, divergence, lockstep, log_probabilities};
use super::prepare::{Part, Prepared};
use super::squad;
use crate::delta::{AttentionPolicy, PageStatistics, Thresholds};
use crate::error::Result;
use crate::model::Model;
use crate::session::{Cancel, LogitsOptions, Session, SessionOptions};
use crate::tokenizer::TextStream;

/// A policy under a name.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// What tables call it.
    pub name: String,
    /// How keys and values are kept.
    pub attention: AttentionPolicy,
    /// A threshold of its own for each layer and KV head.
    pub thresholds: Option<Thresholds>,
}

/// What of a row runs as a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// All of it: what is scored is the last part of a prompt. A generated answer is run again as a
    /// prompt with each of its tokens.
    Prefill,
    /// What stands before the scored part, which is fed token by token as in decoding.
    Decode,
}

/// Counts over the compressed keys of one or more texts.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct KeyCounts {
    /// Elements of compressed keys.
    pub elements: u64,
    /// Of differences: those that are zero.
    pub zeros: Option<u64>,
    /// Bits that the compressed keys take.
    pub bits: u64,
}

impl From<PageStatistics> for KeyCounts {
    fn from(pages: PageStatistics) -> Self {
        let PageStatistics { elements, zeros, words, theta, .. } = pages;
        Self { elements, zeros: theta.map(|_| zeros), bits: 32 * words }
    }
}

impl AddAssign for KeyCounts {
    fn add_assign(&mut self, other: Self) {
        self.elements += other.elements;
        self.bits += other.bits;
        if let Some(zeros) = other.zeros {
            *self.zeros.get_or_insert(0) += zeros;
        }
    }
}

/// What a candidate made of a row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// How good it is.
    pub score: Score,
    /// Kullback-Leibler divergence of its next-token distributions from those of the first
    /// candidate: nats, and distributions that were compared. Of a text for each window; of a choice
    /// one, of all its tokens; of an answer one, of its first token, and none in
    /// [`Stage::Decode`], where that token is not decoded.
    pub kl: Vec<(f64, usize)>,
    /// Its compressed keys.
    pub keys: KeyCounts,
    /// Time that it took.
    pub seconds: f64,
}

/// How good a candidate is at a row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Score {
    /// A text.
    Text {
        /// Of each window: nats and tokens.
        windows: Vec<(f64, usize)>,
        /// Bytes of the text.
        bytes: usize,
    },
    /// A choice.
    Choice {
        /// Of each choice, in nats.
        log_likelihoods: Vec<f64>,
        /// Characters of each choice, without the space before it.
        lengths: Vec<usize>,
        /// The right one.
        label: usize,
    },
    /// A question.
    Question {
        /// What was answered.
        answer: String,
        /// 1 where it is exactly right.
        exact: f64,
        /// F1 of its words.
        f1: f64,
        /// Whether there is an answer in the text.
        answerable: bool,
    },
    /// A passkey.
    Passkey {
        /// What was answered.
        answer: String,
        /// Whether the key is in it.
        right: bool,
        /// Where it was told.
        depth: Option<f64>,
        /// Tokens of the prompt, about.
        length: Option<usize>,
    },
}

/// Scores rows on one model.
#[derive(Debug)]
pub struct Scorer<'a> {
    /// The model.
    pub model: &'a Model,
    /// The policies; the others are compared with the first.
    pub candidates: &'a [Candidate],
    /// What of a row runs as a prompt.
    pub stage: Stage,
    /// Stops it.
    pub cancel: Cancel,
}

/// What one candidate made of one sequence.
#[derive(Clone, Copy, Default)]
struct Sequence {
    nats: f64,
    kl: f64,
    tokens: usize,
    keys: KeyCounts,
    seconds: f64,
}

impl From<Expectation> for Sequence {
    fn from(found: Expectation) -> Self {
        let Expectation { tokens, nats, kl, statistics, time } = found;
        let (keys, seconds) = (statistics.total().into(), time.as_secs_f64());
        Self { nats, kl, tokens, keys, seconds }
    }
}

impl Scorer<'_> {
    /// What each candidate makes of a row.
    ///
    /// # Errors
    /// More tokens than the model's context ([`Prepared::longest`] tells before); a policy out of
    /// range; [`Error::Cancelled`](crate::Error::Cancelled); a fault of the device.
    pub fn score(&self, row: &Prepared) -> Result<Vec<Outcome>> {
        match row {
            Prepared::Text { windows, bytes } => self.sequences(windows, |sequences| Score::Text {
                windows: sequences.iter().map(|s| (s.nats, s.tokens)).collect(),
                bytes: *bytes,
            }),
            Prepared::Choice { choices, lengths, label } => {
                self.sequences(choices, |sequences| Score::Choice {
                    log_likelihoods: sequences.iter().map(|s| -s.nats).collect(),
                    lengths: lengths.clone(),
                    label: *label,
                })
            }
            Prepared::Question { prompt, most, answers, no_answer } => {
                let right: Vec<String> = answers.clone();
                self.answers(prompt, *most, |answer| {
                    let silent = squad::normalise(&answer) == squad::normalise(no_answer);
                    let found = squad::score(if silent { "" } else { &answer }, &right);
                    let answerable = !right.is_empty();
                    Score::Question { exact: found.exact, f1: found.f1, answerable, answer }
                })
            }
            Prepared::Passkey { prompt, most, key, depth, length } => {
                self.answers(prompt, *most, |answer| {
                    let right = holds(&answer, key);
                    Score::Passkey { right, depth: *depth, length: *length, answer }
                })
            }
        }
    }

    /// Scores given tokens.
    fn sequences(
        &self,
        parts: &[Part],
        score: impl Fn(&[Sequence]) -> Score,
    ) -> Result<Vec<Outcome>> {
        let mut found = vec![Vec::with_capacity(parts.len()); self.candidates.len()];
        for part in parts {
            for (found, sequence) in found.iter_mut().zip(self.sequence(part)?) {
                found.push(sequence);
            }
        }
        let outcome = |sequences: Vec<Sequence>| {
            let mut keys = KeyCounts::default();
            sequences.iter().for_each(|s| keys += s.keys);
            let score = score(&sequences);
            let kl = sequences.iter().map(|s| (s.kl, s.tokens));
            let kl = match score {
                Score::Text { .. } => kl.collect(),
                _ => vec![kl.fold((0.0, 0), |sum, s| (sum.0 + s.0, sum.1 + s.1))],
            };
            let seconds = sequences.iter().map(|s| s.seconds).sum();
            Outcome { score, kl, keys, seconds }
        };
        Ok(found.into_iter().map(outcome).collect())
    }

    /// The tokens of a part from `from` on, as each candidate expects them.
    fn sequence(&self, part: &Part) -> Result<Vec<Sequence>> {
        let options = |candidate: &Candidate| LogitsOptions {
            attention: candidate.attention,
            thresholds: candidate.thresholds.clone(),
            prompt: (self.stage == Stage::Decode).then_some(part.from()),
            from: part.from() - 1,
        };
        let runs: Vec<LogitsOptions> = self.candidates.iter().map(options).collect();
        let found = lockstep(self.model, part.ids(), &runs, &self.cancel)?;
        Ok(found.into_iter().map(Sequence::from).collect())
    }

    /// What each candidate answers to a prompt, greedily, up to a new line or the end of the text.
    fn answers(
        &self,
        prompt: &[u32],
        most: usize,
        score: impl Fn(String) -> Score,
    ) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::with_capacity(self.candidates.len());
        let mut first: Option<Vec<f64>> = None;
        for candidate in self.candidates {
            let start = Instant::now();
            let context = Some(prompt.len() + most);
            let thresholds = candidate.thresholds.clone();
            let options = SessionOptions { context, attention: candidate.attention, thresholds };
            let mut session = Session::new(self.model, &options)?;
            session.cancel_with(self.cancel.clone());
            let logits = session.evaluate(prompt)?;
            let expected = log_probabilities(&logits);
            let kl = divergence(first.get_or_insert_with(|| expected.clone()), &expected);
            let answer = self.continuation(&mut session, logits, prompt, most)?;
            let keys = session.statistics()?.total().into();
            let seconds = start.elapsed().as_secs_f64();
            let kl = match self.stage {
                Stage::Prefill => vec![(kl, 1)],
                Stage::Decode => Vec::new(),
            };
            outcomes.push(Outcome { score: score(answer), kl, keys, seconds });
        }
        Ok(outcomes)
    }

    /// At most `most` tokens after `logits`, up to a new line, which is not part of it.
    fn continuation(
        &self,
        session: &mut Session,
        mut logits: Vec<f32>,
        prompt: &[u32],
        most: usize,
    ) -> Result<String> {
        let tokenizer = self.model.tokenizer();
        let (mut stream, mut text) = (TextStream::after(prompt), String::new());
        let mut ids = prompt.to_vec();
        while ids.len() < prompt.len() + most {
            if self.cancel.is_cancelled() {
                return Err(crate::Error::Cancelled);
            }
            let token = likeliest(&logits);
            if self.model.config().eos.contains(&token) {
                break;
            }
            text.push_str(&stream.push(tokenizer, token)?);
            // An answer may begin on the next line.
            if text.trim_start().contains('\n') {
                break;
            }
            ids.push(token);
            if ids.len() == prompt.len() + most {
                break;
            }
            logits = match self.stage {
                Stage::Decode => session.evaluate(&[token])?,
                Stage::Prefill => {
                    session.clear();
                    session.evaluate(&ids)?
                }
            };
        }
        text.push_str(&stream.finish(tokenizer)?);
        Ok(text.trim().lines().next().unwrap_or_default().trim_end().to_owned())
    }
}

/// The first of the greatest.
fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// Whether `key` stands in `text` as words of its own.
fn holds(text: &str, key: &str) -> bool {
    text.match_indices(key).any(|(at, _)| {
        let inside = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        !inside(text[..at].chars().next_back()) && !inside(text[at + key.len()..].chars().next())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_a_word_of_its_own() {
        assert!(holds("is 12345.", "12345") && holds("12345", "12345"));
        assert!(!holds("123456", "12345") && !holds("x12345", "12345") && !holds("", "12345"));
        assert!(holds("112345 12345", "12345"));
    }

    #[test]
    fn ties_go_to_the_first() {
        assert_eq!(likeliest(&[0.0, 2.0, 2.0]), 1);
    }
}
