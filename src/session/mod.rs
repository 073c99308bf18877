//! A text that a model continues: its cache, its sampling, and the pieces as they come.

mod file;
mod logits;
mod rewind;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::backend::Input;
use crate::checkpoint::ModelConfig;
use crate::delta::{AttentionPolicy, CacheStatistics, Phase, Thresholds};
use crate::error::{Error, Result};
use crate::model::{Decoder, MemoryUse, Model, Output, SessionShape};
use crate::sampler::{Draws, SampleStep, Sampling, TokenSet};
use crate::stop::StopScanner;
use crate::tokenizer::TextStream;
pub use logits::{LogitsOptions, LogitsRun};
pub(crate) use rewind::Place;

/// Context of a session where none is asked for, in tokens.
pub const DEFAULT_CONTEXT: usize = 4096;

/// How large a session may get.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct SessionOptions {
    /// Tokens that the text may have. Memory for them is taken as the text grows. `None` takes
    /// [`DEFAULT_CONTEXT`], or the model's own limit where that is less.
    pub context: Option<usize>,
    /// How keys and values are kept, and which of them attention sees exactly.
    pub attention: AttentionPolicy,
    /// Thresholds of each layer and KV head in place of the policy's one, whose unit they are in.
    pub thresholds: Option<Thresholds>,
}

/// When a generation stops.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens to make at most; fewer where the context ends.
    pub max_tokens: usize,
    /// Texts that end the generation; they are not part of it.
    pub stop: Vec<String>,
    /// Goes on after the model's end-of-sequence tokens.
    pub ignore_eos: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { sampling: Sampling::default(), max_tokens: 128, stop: Vec::new(), ignore_eos: false }
    }
}

/// Why a generation stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended its text with this token.
    EndOfSequence(u32),
    /// This stop text came up.
    Stop(String),
    /// The number of tokens asked for was made.
    MaxTokens,
    /// The context is full.
    ContextFull,
    /// [`Cancel::cancel`] was called.
    Cancelled,
}

impl FinishReason {
    /// The reason in a word, as `--json` gives it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::EndOfSequence(_) => "end_of_sequence",
            Self::Stop(_) => "stop",
            Self::MaxTokens => "max_tokens",
            Self::ContextFull => "context_full",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Stops a session from another thread, such as a signal handler. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks the session to stop before its next step.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Takes the request back, so that the session can go on.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Where the time of a generation went.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Timings {
    /// Tokens of the prompt that had to be run.
    pub prompt_tokens: usize,
    /// Time from the first of them to the first new token.
    pub prefill: Duration,
    /// New tokens.
    pub new_tokens: usize,
    /// Time from the first new token to the last.
    pub decode: Duration,
}

impl Timings {
    /// Prompt tokens a second; `None` where no token was made.
    pub fn prefill_rate(&self) -> Option<f64> {
        (self.new_tokens > 0).then(|| self.prompt_tokens as f64 / self.prefill.as_secs_f64())
    }

    /// New tokens a second after the first; `None` for fewer than two.
    pub fn decode_rate(&self) -> Option<f64> {
        let steps = self.new_tokens.checked_sub(1).filter(|steps| *steps > 0)?;
        Some(steps as f64 / self.decode.as_secs_f64())
    }
}

/// A text and the keys and values that a model has made of it.
///
/// A session continues over turns: each [`Session::generate`] appends to what is there.
/// [`Session::truncate`] cuts it back to a prefix, whose keys and values stay valid.
///
/// # Lost devices
///
/// Where the model had to be brought to another device, see [`Model`](Model#lost-devices), the next
/// call of the session takes its text up there, in the middle of a sentence if need be, and the text
/// goes on as if nothing had happened: token for token on the same adapter, sampling included.
///
/// For that the session remembers by which steps its cache was made, and takes the same ones again:
/// prompts of all turns in the chunks that they ran in, and what was decoded token by token. Run as
/// one prompt it would be there sooner, but a compressed cache would be another one, and a dense one
/// would be rounded differently. So a text that took a minute to write takes about a minute to be
/// restored; its [`Cancel`] stops that as well. A session that was [loaded](Session::load) keeps what
/// it read from its file in host memory, as many bytes as its cache had. Only a text on a GPU
/// remembers anything: the CPU is not lost.
///
/// After an error the session is as it was before the call, and can go on when the device can.
pub struct Session {
    model: Model,
    decoder: Box<dyn Decoder>,
    shape: SessionShape,
    /// The whole text. The last token of a generation is not in the cache yet: it enters with the
    /// next step, which may be on its way, see `ahead`.
    tokens: Vec<u32>,
    /// Where the last prompt ends: what stands before it is run as a prompt, what comes after it as
    /// decoding.
    prompt: usize,
    /// Steps of a generation that are on their way, each on the token that the one before it
    /// samples; their tokens are no part of the text yet.
    ahead: usize,
    cancel: Cancel,
}

impl Session {
    /// Makes an empty cache and reserves everything else that running the model takes.
    ///
    /// # Errors
    /// A context of 0 or above the model's limit, a policy out of range, thresholds of another shape;
    /// too little device memory.
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Self> {
        let limit = model.config().context;
        let context = options.context.unwrap_or(DEFAULT_CONTEXT.min(limit));
        check_context(context, model.config())?;
        let thresholds = options.thresholds.clone();
        let shape = SessionShape::new(context, options.attention);
        Self::with_shape(model, SessionShape { thresholds, ..shape })
    }

    fn with_shape(model: &Model, shape: SessionShape) -> Result<Self> {
        shape.policy.check()?;
        if let Some(thresholds) = &shape.thresholds {
            let config = model.config();
            thresholds.check(&shape.policy, config.layers, config.attention.kv_heads)?;
        }
        let mut decoder = model.start(shape.clone())?;
        let (model, cancel) = (model.clone(), Cancel::default());
        decoder.cancel_with(&cancel);
        Ok(Self { model, decoder, shape, tokens: Vec::new(), prompt: 0, ahead: 0, cancel })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Tokens that the session can hold.
    pub fn context(&self) -> usize {
        self.shape.context
    }

    /// The text so far as token ids: at most one more than the context, where a generation has
    /// filled it.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Bytes held on the device.
    pub fn memory(&self) -> MemoryUse {
        self.decoder.memory()
    }

    /// How keys and values are kept.
    pub fn policy(&self) -> &AttentionPolicy {
        &self.shape.policy
    }

    /// Thresholds of each layer and KV head, where it has such.
    pub fn thresholds(&self) -> Option<&Thresholds> {
        self.shape.thresholds.as_ref()
    }

    /// What the compressed keys are: zeros, bits, thresholds. Waits for the device and reads its
    /// pages.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn statistics(&mut self) -> Result<CacheStatistics> {
        self.settle();
        let (policy, length) = (self.shape.policy, self.decoder.length());
        let config = self.model.config();
        let pages = match policy.is_dense() {
            true => vec![Vec::new(); config.layers],
            false => self.decoder.pages()?,
        };
        CacheStatistics::new(&policy, &config.attention, length, self.originals(length), &pages)
    }

    /// Original keys in a cache of `length` tokens: all where keys are plain, else the sink and
    /// what of the ring behind it is written.
    fn originals(&self, length: usize) -> usize {
        let SessionShape { context, chunk, policy, .. } = self.shape;
        if policy.is_dense() {
            return length;
        }
        let sink = policy.sink.min(length);
        sink + policy.recent_slots(context, chunk).min(length - sink)
    }

    /// A handle that stops this session from elsewhere.
    pub fn cancel_handle(&self) -> Cancel {
        self.cancel.clone()
    }

    /// Lets an existing handle stop this session.
    pub fn cancel_with(&mut self, cancel: Cancel) {
        self.decoder.cancel_with(&cancel);
        self.cancel = cancel;
    }

    /// Cuts the text back to its first `length` tokens; what is shorter stays as it is.
    ///
    /// With dense attention that is all. A compressed cache keeps the original keys of recent tokens
    /// only: a text that is cut back further than they reach is run again from its start, as one
    /// prompt, when it is continued.
    pub fn truncate(&mut self, length: usize) {
        self.settle();
        self.tokens.truncate(length);
        self.prompt = self.prompt.min(length);
        self.decoder.truncate(length);
    }

    /// Forgets the text.
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Appends `prompt` to the text and continues it, token by token, as the returned iterator is
    /// advanced. All but the last chunk of the prompt runs before this returns. Without a prompt, a
    /// text that has filled its context ends at once, as [`FinishReason::ContextFull`].
    ///
    /// Dropping the iterator stops the generation; the session keeps what was made: also the
    /// end-of-sequence token, and the tokens that a stop text came up in.
    ///
    /// # Errors
    /// Parameters out of range, a token outside the vocabulary, a text that does not fit in the
    /// context, [`Error::Cancelled`], or a fault of the device: then the text is as it was.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
    ) -> Result<Generation<'_>> {
        options.sampling.check()?;
        if options.stop.iter().any(String::is_empty) {
            let (value, allowed) = ("\"\"".into(), "a stop text must not be empty".into());
            return Err(Error::Parameter { name: "stop", value, allowed });
        }
        let start = Instant::now();
        let text = TextStream::after(if prompt.is_empty() { &self.tokens } else { prompt });
        // The last token of a text that has filled its context has no place in the cache.
        let full = prompt.is_empty() && self.tokens.len() > self.shape.context;
        let pending = if full { 0 } else { self.prefill(prompt)? };
        let mut seen = TokenSet::new(self.model.config().vocabulary);
        self.tokens.iter().for_each(|&token| seen.insert(token));
        let mut generation = Generation {
            options: options.clone(),
            draws: Draws::new(options.sampling.seed),
            text,
            stop: StopScanner::new(&options.stop),
            seen,
            finish: None,
            done: false,
            started: start,
            first_token: None,
            timings: Timings { prompt_tokens: pending, ..Timings::default() },
            session: self,
        };
        if options.max_tokens == 0 {
            generation.finish = Some(FinishReason::MaxTokens);
        } else if full {
            generation.finish = Some(FinishReason::ContextFull);
        }
        Ok(generation)
    }

    /// Appends `tokens` to the text and returns the logits after the last of them,
    /// `[vocabulary]`: for callers that choose tokens themselves.
    ///
    /// # Errors
    /// As [`Session::generate`].
    pub fn evaluate(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let before = (self.tokens.len(), self.prompt);
        self.prefill(tokens)?;
        let (pending, phase) = (&self.tokens[self.decoder.length()..], self.phase());
        let run = self.decoder.forward(Input::Tokens(pending), phase, Output::LastLogits);
        let logits = run.and_then(|()| self.decoder.logits()).and_then(finite);
        logits.map_err(|error| {
            let error = self.blamed(error);
            self.take_back(before);
            error
        })
    }

    /// Appends tokens to the text after checking them; on an error nothing has changed.
    fn append(&mut self, tokens: &[u32]) -> Result<()> {
        let config = self.model.config();
        let vocabulary = config.vocabulary;
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(Error::TokenOutOfRange { token, vocabulary });
        }
        if tokens.is_empty() && self.tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        check_fits(self.tokens.len() + tokens.len(), self.shape.context, config.context)?;
        self.settle();
        // A single token that continues a text is one that a caller has chosen: decoding.
        let decoded = tokens.is_empty() || (tokens.len() == 1 && !self.tokens.is_empty());
        // Of a text that was run only the last token can be left.
        let unfinished = self.decoder.length() + 1 < self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        if !decoded || unfinished {
            self.prompt = self.tokens.len();
        }
        // The first new token needs the output of the last one: at least that one is run again.
        self.decoder.truncate(self.tokens.len() - 1);
        if !self.decoder.can_continue(self.phase()) {
            self.decoder.truncate(0);
            self.prompt = self.tokens.len();
        }
        Ok(())
    }

    /// Takes out of the cache what a generation that has ended ran ahead of its text.
    fn settle(&mut self) {
        if std::mem::take(&mut self.ahead) > 0 {
            self.decoder.truncate(self.tokens.len() - 1);
        }
    }

    /// Names the layer in which a text first was not finite. For that it runs once more from its
    /// beginning: nothing good can come of it any more, and the user wants to know what is broken.
    fn blamed(&mut self, error: Error) -> Error {
        let Error::NotFinite { .. } = error else {
            return error;
        };
        self.settle();
        let length = self.tokens.len().min(self.shape.context);
        match self.decoder.find_not_finite(&self.tokens[..length], &self.cancel) {
            Ok(Some(what)) => Error::NotFinite { what },
            Ok(None) => Error::NotFinite { what: "the logits, though not when run again".into() },
            Err(_) => error,
        }
    }

    /// Undoes what a call has appended to a text of so many tokens with a prompt that ended there.
    fn take_back(&mut self, (length, prompt): (usize, usize)) {
        self.truncate(length);
        self.prompt = prompt;
    }

    /// What the next step is part of.
    fn phase(&self) -> Phase {
        if self.decoder.length() < self.prompt {
            Phase::Prefill { length: self.prompt }
        } else {
            Phase::Decode
        }
    }

    /// Appends tokens and runs all but the last chunk of what is not in the cache yet; returns how
    /// many tokens that is, with the last chunk. On an error the text is as it was.
    fn prefill(&mut self, tokens: &[u32]) -> Result<usize> {
        let before = (self.tokens.len(), self.prompt);
        self.append(tokens)?;
        let pending = self.tokens.len() - self.decoder.length();
        let run = self.run_chunks();
        if run.is_err() {
            self.take_back(before);
        }
        run.map(|()| pending)
    }

    fn run_chunks(&mut self) -> Result<()> {
        loop {
            let (start, phase) = (self.decoder.length(), self.phase());
            // What a step is part of holds for all of it.
            let ends = match phase {
                Phase::Prefill { length } => length,
                Phase::Decode => self.tokens.len(),
            };
            let end = ends.min(start + self.shape.chunk);
            if end == self.tokens.len() {
                return Ok(());
            }
            if self.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let chunk = &self.tokens[start..end];
            self.decoder.forward(Input::Tokens(chunk), phase, Output::Nothing)?;
            // One chunk at a time is on its way: work that is queued cannot be cancelled.
            self.decoder.wait()?;
        }
    }

    /// Whether the device chooses by this step's rule; else the host does, from all logits.
    fn samples_on_device(&self, step: &SampleStep<'_>) -> bool {
        let every_token_is_a_candidate = step.top_k == 0;
        step.is_greedy()
            || (!every_token_is_a_candidate && step.top_k <= self.model.engine().max_top_k())
    }

    /// Runs what is not in the cache yet.
    fn run_pending(&mut self, output: Output<'_>) -> Result<()> {
        let (pending, phase) = (&self.tokens[self.decoder.length()..], self.phase());
        self.decoder.forward(Input::Tokens(pending), phase, output)
    }
}

/// Refuses a context that no session of the model could have.
///
/// # Errors
/// [`Error::Parameter`] with the allowed range.
pub fn check_context(context: usize, config: &ModelConfig) -> Result<()> {
    let limit = config.context;
    if (1..=limit).contains(&context) {
        return Ok(());
    }
    Err(Error::Parameter {
        name: "context",
        value: context.to_string(),
        allowed: format!("must be from 1 to {limit}, the model's max_position_embeddings"),
    })
}

pub(crate) fn check_fits(needed: usize, limit: usize, model_limit: usize) -> Result<()> {
    if needed > limit {
        return Err(Error::ContextFull { needed, limit, model_limit });
    }
    Ok(())
}

fn not_finite() -> Error {
    Error::NotFinite { what: "the logits".into() }
}

fn finite(logits: Vec<f32>) -> Result<Vec<f32>> {
    if logits.iter().all(|x| x.is_finite()) { Ok(logits) } else { Err(not_finite()) }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("model", &self.model)
            .field("shape", &self.shape)
            .field("tokens", &self.tokens.len())
            .finish_non_exhaustive()
    }
}

/// A token and the text that became certain with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The token; `None` for text that was held back until the end.
    pub token: Option<u32>,
    /// Its text; empty inside a character that spans tokens, for what may begin a stop text, and for
    /// an end-of-sequence token.
    pub text: String,
}

/// The continuation of a text: an iterator over its pieces.
#[derive(Debug)]
pub struct Generation<'a> {
    session: &'a mut Session,
    options: GenerateOptions,
    draws: Draws,
    text: TextStream,
    stop: StopScanner,
    seen: TokenSet,
    finish: Option<FinishReason>,
    /// The last piece is out.
    done: bool,
    started: Instant,
    first_token: Option<Instant>,
    timings: Timings,
}

impl Generation<'_> {
    /// Why the generation stopped, once the iterator is at its end.
    pub fn finish_reason(&self) -> Option<&FinishReason> {
        self.finish.as_ref().filter(|_| self.done)
    }

    /// Where the time went so far.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    fn advance(&mut self) -> Result<Option<Piece>> {
        if self.finish.is_some() {
            return self.last_piece();
        }
        if self.session.cancel.is_cancelled() {
            self.finish = Some(FinishReason::Cancelled);
            return self.last_piece();
        }
        let token = match self.next_token() {
            // A text can be stopped while it is taken up on another device.
            Err(Error::Cancelled) => {
                self.finish = Some(FinishReason::Cancelled);
                return self.last_piece();
            }
            token => token.map_err(|error| self.session.blamed(error))?,
        };
        self.tick();
        self.seen.insert(token);
        self.session.tokens.push(token);
        if !self.options.ignore_eos && self.session.model.config().eos.contains(&token) {
            self.finish = Some(FinishReason::EndOfSequence(token));
            return Ok(Some(Piece { token: Some(token), text: String::new() }));
        }
        let text = self.text.push(self.session.model.tokenizer(), token)?;
        let (text, stopped) = self.stop.push(&text);
        self.finish = match stopped {
            Some(stop) => Some(FinishReason::Stop(stop)),
            None if self.timings.new_tokens == self.options.max_tokens => {
                Some(FinishReason::MaxTokens)
            }
            // This token has no place in the cache: the next one cannot be made from it.
            None if self.session.tokens.len() > self.session.shape.context => {
                Some(FinishReason::ContextFull)
            }
            None => None,
        };
        Ok(Some(Piece { token: Some(token), text }))
    }

    /// Chooses the next token.
    ///
    /// Where the device chooses, it goes on with its token at once: the steps after this one are on
    /// their way before its token is read, so that the device does not wait for the host. What they
    /// make is worth nothing if the text ends here.
    fn next_token(&mut self) -> Result<u32> {
        let Self { session, options, draws, seen, timings, .. } = self;
        let sampling = &options.sampling;
        let mut step = SampleStep {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            seen,
            draw: 0.0,
        };
        if !session.samples_on_device(&step) {
            step.draw = draws.draw();
            session.run_pending(Output::LastLogits)?;
            let mut logits = session.decoder.logits()?;
            return step.choose(&mut logits).ok_or_else(not_finite);
        }
        if session.ahead == 0 {
            step.draw = draws.draw();
            session.run_pending(Output::Sample(&step))?;
            session.ahead = 1;
        }
        // The first token should not wait for what only the second one needs, such as kernels that are
        // still being compiled.
        let look_ahead =
            if timings.new_tokens == 0 { 0 } else { session.model.engine().look_ahead() };
        let wanted = (1 + look_ahead).min(options.max_tokens - timings.new_tokens);
        while session.ahead < wanted && session.decoder.length() < session.shape.context {
            let mut next = draws.clone();
            step.draw = next.draw();
            let output = Output::Sample(&step);
            // Where that fails, the token before it is still good: whoever asks for the one after it
            // gets the error.
            if session.decoder.forward(Input::Sampled, Phase::Decode, output).is_err() {
                break;
            }
            *draws = next;
            session.ahead += 1;
        }
        let token = session.decoder.token()?;
        session.ahead -= 1;
        Ok(token)
    }

    /// Text that was held back, if any; ends the iterator.
    fn last_piece(&mut self) -> Result<Option<Piece>> {
        if std::mem::replace(&mut self.done, true) {
            return Ok(None);
        }
        if matches!(self.finish, Some(FinishReason::Stop(_))) {
            return Ok(None);
        }
        let held = self.text.finish(self.session.model.tokenizer())?;
        let (mut text, stopped) = self.stop.push(&held);
        match stopped {
            Some(stop) => self.finish = Some(FinishReason::Stop(stop)),
            None => text.push_str(&self.stop.finish()),
        }
        Ok(Some(Piece { token: None, text }).filter(|piece| !piece.text.is_empty()))
    }

    fn tick(&mut self) {
        let now = Instant::now();
        self.timings.new_tokens += 1;
        match self.first_token {
            None => {
                self.first_token = Some(now);
                self.timings.prefill = now - self.started;
            }
            Some(first) => self.timings.decode = now - first,
        }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let piece = self.advance();
        // After a fault nothing more comes.
        self.done |= piece.is_err();
        piece.transpose()
    }
}
