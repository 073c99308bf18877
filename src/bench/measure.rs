//! The measuring.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::observer::{Mode, Observer, Tally};
use super::{BenchOptions, Cost, Profile, Spread, Test, TestKind};
use crate::backend::{Activity, DeviceInfo, MatrixFormat, ReadSpeed, read_pattern};
use crate::checkpoint::Checkpoint;
use crate::delta::{AttentionPolicy, Thresholds};
use crate::error::{Error, Result};
use crate::model::{LoadProgress, MemoryUse, Model, ModelOptions};
use crate::sampler::{Draws, Sampling};
use crate::session::{Cancel, GenerateOptions, Place, Session, SessionOptions};

/// Bytes that a device is asked to read for its speed: more than any cache holds.
const READ_BYTES: u64 = 256 << 20;

/// Tokens that a cache is filled with at a time.
const FILL: usize = 1024;

/// A model on a device, with a way to keep keys and values, that is to be measured.
pub struct Bench {
    model: Model,
    observer: Arc<Observer>,
    attention: AttentionPolicy,
    thresholds: Option<Thresholds>,
    /// See [`Backend::multiply_speed`](crate::backend::Backend::multiply_speed).
    multiply_speeds: Mutex<HashMap<MatrixFormat, f64>>,
}

/// How long the first token took, in a session of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FirstToken {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// With everything to be made first: the session's memory, a GPU's kernels as far as its driver
    /// keeps none.
    pub cold: Duration,
    /// The same once more.
    pub warm: Duration,
}

/// What one test gave.
#[derive(Clone, Debug)]
pub struct Line {
    /// The test.
    pub test: Test,
    /// Tokens a second.
    pub rate: Spread,
    /// What a token took, the mean over all repeats.
    pub per_token: PerToken,
    /// Bytes held on the device at the test's end.
    pub memory: MemoryUse,
    /// Where the time went, where that was asked for.
    pub profile: Option<Profile>,
}

/// What a token took, the mean over several.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct PerToken {
    /// Bytes of weights, see [`Cost`].
    pub weights: f64,
    /// Bytes of keys and values.
    pub cache: f64,
    /// Bytes of intermediate results.
    pub activations: f64,
    /// Multiplications with an addition each.
    pub multiply_adds: f64,
    /// Kernels launched.
    pub launches: f64,
    /// Submissions to the device's queue.
    pub submissions: f64,
    /// Bytes that the host read back.
    pub readback_bytes: f64,
}

impl PerToken {
    fn new(tally: &Tally, tokens: usize) -> Self {
        let (Cost { weights, cache, activations, multiply_adds }, activity) =
            (tally.cost, tally.activity);
        let Activity { launches, submissions, readback_bytes } = activity;
        let each = |all: u64| all as f64 / tokens.max(1) as f64;
        Self {
            weights: each(weights),
            cache: each(cache),
            activations: each(activations),
            multiply_adds: each(multiply_adds),
            launches: each(launches),
            submissions: each(submissions),
            readback_bytes: each(readback_bytes),
        }
    }

    /// All bytes that are moved.
    pub fn bytes(&self) -> f64 {
        self.weights + self.cache + self.activations
    }
}

impl Line {
    /// Bytes a second that are moved at the median rate.
    pub fn bytes_per_second(&self) -> f64 {
        self.per_token.bytes() * self.rate.median
    }
}

/// What happens during a run.
#[derive(Debug)]
pub enum Event {
    /// So many tokens were run since the last one.
    Tokens(usize),
    /// The time to the first token is known.
    FirstToken(FirstToken),
    /// A test is done.
    Line(Line),
}

impl Bench {
    /// Opens a checkpoint on the device of `options`. With the option
    /// [`timestamps`](crate::gpu::GpuOptions::timestamps) a GPU times its kernels by its own clock.
    ///
    /// # Errors
    /// As [`Model::open_checkpoint`]; a policy out of range.
    pub fn open(
        checkpoint: Checkpoint,
        options: &ModelOptions,
        attention: AttentionPolicy,
        thresholds: Option<Thresholds>,
        progress: impl FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Self> {
        attention.check()?;
        let observer = Arc::new(Observer::default());
        let model = Model::open_observed(checkpoint, options, Some(&observer), progress)?;
        Ok(Self { model, observer, attention, thresholds, multiply_speeds: Mutex::default() })
    }

    /// The device.
    pub fn device(&self) -> &DeviceInfo {
        self.model.device()
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// How fast the device reads its memory, measured now.
    ///
    /// # Errors
    /// No room for a quarter of a GiB; a device that left out some of it.
    pub fn read_speed(&self) -> Result<ReadSpeed> {
        let found = self.model.engine().read_speed(READ_BYTES)?;
        let words = (found.bytes / 4) as u32;
        let expected = (0..words).fold(0, |sum: u32, n| sum.wrapping_add(read_pattern(n)));
        if found.sum != expected {
            return Err(self.fault("what the device read for its speed is not what was written"));
        }
        Ok(found)
    }

    /// How fast the device multiplies by weights of a format; measured once.
    fn multiply_speed(&self, format: MatrixFormat) -> Result<f64> {
        let mut known = self.multiply_speeds.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(speed) = known.get(&format) {
            return Ok(*speed);
        }
        let speed = self.model.engine().multiply_speed(format)?;
        known.insert(format, speed);
        Ok(speed)
    }

    /// Tokens that a run makes or takes in all, for a progress bar.
    pub fn tokens(options: &BenchOptions) -> usize {
        let runs = options.warm_up + options.repeats + usize::from(options.profile);
        let tests: usize = options.tests().iter().map(|test| test.tokens * runs).sum();
        2 * options.first_prompt(options.context())
            + options.depths.iter().copied().max().unwrap_or(0)
            + tests
    }

    /// Measures all tests; `events` is told what comes out as it does.
    ///
    /// # Errors
    /// Options that the model's context does not allow; [`Error::Cancelled`]; a fault of the device.
    /// What was told before stays true.
    pub fn run(
        &self,
        options: &BenchOptions,
        cancel: &Cancel,
        events: &mut dyn FnMut(Event),
    ) -> Result<()> {
        options.check(self.model.config().context)?;
        let context = options.context();
        let text = self.text(context);
        events(Event::FirstToken(self.first_token(options, cancel, &text)?));
        events(Event::Tokens(2 * options.first_prompt(context)));

        let mut session = self.session(context, cancel)?;
        let mut place = session.place()?;
        let mut depth = 0;
        for test in options.tests() {
            if test.depth > depth {
                session.go_back(&place, test.depth - depth)?;
                for part in text[depth..test.depth].chunks(FILL) {
                    session.fill(part)?;
                    events(Event::Tokens(part.len()));
                }
                depth = test.depth;
                place = session.place()?;
            }
            let line = self.line(&mut session, &place, &test, options, &text, events)?;
            events(Event::Line(line));
        }
        Ok(())
    }

    /// Tokens of no meaning, the same each time.
    fn text(&self, count: usize) -> Vec<u32> {
        let vocabulary = self.model.config().vocabulary;
        let mut draws = Draws::new(1);
        let mut token = || (f64::from(draws.draw()) * vocabulary as f64) as u32;
        (0..count.max(1)).map(|_| token()).collect()
    }

    fn session(&self, context: usize, cancel: &Cancel) -> Result<Session> {
        let options = SessionOptions {
            context: Some(context),
            attention: self.attention,
            thresholds: self.thresholds.clone(),
        };
        let mut session = Session::new(&self.model, &options)?;
        session.cancel_with(cancel.clone());
        Ok(session)
    }

    fn first_token(
        &self,
        options: &BenchOptions,
        cancel: &Cancel,
        text: &[u32],
    ) -> Result<FirstToken> {
        let prompt = options.first_prompt(options.context());
        let start = Instant::now();
        let mut session = self.session(options.context(), cancel)?;
        self.generate(&mut session, &text[..prompt], 1)?;
        let cold = start.elapsed();
        session.clear();
        let start = Instant::now();
        self.generate(&mut session, &text[..prompt], 1)?;
        Ok(FirstToken { prompt, cold, warm: start.elapsed() })
    }

    fn line(
        &self,
        session: &mut Session,
        place: &Place,
        test: &Test,
        options: &BenchOptions,
        text: &[u32],
        events: &mut dyn FnMut(Event),
    ) -> Result<Line> {
        for _ in 0..options.warm_up {
            self.once(session, place, test, text)?;
            events(Event::Tokens(test.tokens));
        }
        let (mut rates, mut all) = (Vec::new(), Tally::default());
        for _ in 0..options.repeats {
            let (time, tally) = self.once(session, place, test, text)?;
            rates.push(test.tokens as f64 / time.as_secs_f64().max(1e-9));
            all.add(tally);
            events(Event::Tokens(test.tokens));
        }
        let memory = session.memory();
        let profile = match options.profile {
            true => {
                self.observer.set_mode(Mode::DeviceClock);
                let profiled = self.once(session, place, test, text);
                self.observer.set_mode(Mode::Count);
                let (wall, tally) = profiled?;
                events(Event::Tokens(test.tokens));
                Some(Profile::new(tally, wall, |format| self.multiply_speed(format))?)
            }
            false => None,
        };
        let per_token = PerToken::new(&all, test.tokens * rates.len());
        let Some(rate) = Spread::new(rates) else {
            return Err(self.fault("no repeat was made"));
        };
        Ok(Line { test: *test, rate, per_token, memory, profile })
    }

    /// Runs a test once from its place on: its time, and what it cost.
    fn once(
        &self,
        session: &mut Session,
        place: &Place,
        test: &Test,
        text: &[u32],
    ) -> Result<(Duration, Tally)> {
        let (prompt, new) = match test.kind {
            TestKind::Prompt => (&text[test.depth..test.end()], 1),
            TestKind::Generate => (&text[..1], test.tokens),
        };
        let next = if test.kind == TestKind::Prompt { prompt.len() } else { 0 };
        // A restored cache lies in buffers that a GPU has not bound yet.
        if session.go_back(place, next)? && next == 0 {
            self.generate(session, prompt, 1)?;
            session.go_back(place, next)?;
        }
        self.observer.take();
        let start = Instant::now();
        self.generate(session, prompt, new)?;
        let time = start.elapsed();
        Ok((time, self.observer.take()))
    }

    /// Continues the session's text by a prompt and `new` tokens; a cancelled one is an error.
    fn generate(&self, session: &mut Session, prompt: &[u32], new: usize) -> Result<()> {
        let options = GenerateOptions {
            sampling: Sampling { temperature: 0.0, ..Sampling::default() },
            max_tokens: new,
            stop: Vec::new(),
            ignore_eos: true,
        };
        let mut generation = session.generate(prompt, &options)?;
        generation.by_ref().try_for_each(|piece| piece.map(drop))?;
        let timings = generation.timings();
        let cancelled = session.cancel_handle().is_cancelled();
        if cancelled && timings.new_tokens < new {
            return Err(Error::Cancelled);
        }
        // What was measured would be something else.
        if (timings.prompt_tokens, timings.new_tokens) != (prompt.len(), new) {
            let (ran, made) = (timings.prompt_tokens, timings.new_tokens);
            let message = format!(
                "{ran} tokens were run and {made} made instead of {} and {new}",
                prompt.len()
            );
            return Err(self.fault(&message));
        }
        Ok(())
    }

    fn fault(&self, message: &str) -> Error {
        let device = self.device().name.clone();
        Error::Device { device, what: "measuring".to_owned(), message: message.to_owned() }
    }
}
