//! Sessions as an application that runs for days has them: opened and dropped by the hundred, from
//! several threads over one model, cancelled at any moment, cut back, saved and restored. What is
//! held on the way is counted. `tests/soak.rs` runs this for seconds, `examples/soak.rs` for hours.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use deltallm::{
    Cancel, Error, GenerateOptions, Model, Result, Sampling, Session, SessionOptions, Timings,
};

/// How keys and values are kept: each path through the caches once.
const POLICIES: [&str; 6] = [
    "dense",
    "dense exact=f32",
    "delta page=16 window=32",
    "delta page=32 window=16 sink=2 values=int4",
    "paper page=16 window=16",
    "keys=channel4 values=int8 page=16 window=16",
];

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sessions that were opened and dropped, restored ones among them.
    pub sessions: usize,
    /// Generations that were begun.
    pub generations: usize,
    /// Tokens that were run or made.
    pub tokens: usize,
    /// Generations and prompts that were cancelled on their way.
    pub cancels: usize,
    /// Generations that were dropped on their way.
    pub left: usize,
    /// Texts that were cut back.
    pub cuts: usize,
    /// Sessions that were saved, and restored from the file.
    pub saved: usize,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.sessions += other.sessions;
        self.generations += other.generations;
        self.tokens += other.tokens;
        self.cancels += other.cancels;
        self.left += other.left;
        self.cuts += other.cuts;
        self.saved += other.saved;
    }
}

/// What the process holds; `None` where the system does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Bytes of its memory that are resident.
    pub host: Option<u64>,
    /// Bytes on the device, its weights among them.
    pub device: Option<u64>,
    /// Open files, sockets and the like.
    pub handles: Option<usize>,
    /// Threads.
    pub threads: Option<usize>,
}

impl Held {
    /// What is held now.
    pub fn now(model: &Model) -> Self {
        let count = |dir: &str| std::fs::read_dir(dir).ok().map(Iterator::count);
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/status").ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
            let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some(1024 * kilobytes)
        };
        Self {
            host: resident(),
            device: model.device_bytes(),
            // Reading the directory takes one itself.
            handles: count("/proc/self/fd").map(|count| count.saturating_sub(1)),
            threads: count("/proc/self/task"),
        }
    }
}

/// A model that is used.
pub struct Soak {
    model: Model,
    dir: PathBuf,
    random: Random,
    /// What was done so far.
    pub counts: Counts,
}

impl Soak {
    /// Uses `model`; sessions are saved in `dir`. The same seed does the same, but for where a
    /// cancellation from another thread finds its session.
    pub fn new(model: Model, dir: &Path, seed: u64) -> Self {
        Self { model, dir: dir.to_owned(), random: Random(seed), counts: Counts::default() }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Sessions on each of `threads` threads at once, one after the other, all dropped at the end.
    ///
    /// # Errors
    /// What any session says but that it was cancelled.
    pub fn round(&mut self, threads: usize, sessions: usize, tokens: usize) -> Result<()> {
        let seeds: Vec<u64> = (0..threads).map(|_| self.random.next()).collect();
        let (model, dir) = (&self.model, &self.dir);
        let work = |(thread, &seed): (usize, &u64)| -> Result<Counts> {
            let mut user = User {
                model,
                file: dir.join(format!("session-{thread}")),
                random: Random(seed),
                counts: Counts::default(),
            };
            for _ in 0..sessions {
                user.session(tokens)?;
            }
            Ok(user.counts)
        };
        let done: Vec<Result<Counts>> = thread::scope(|scope| {
            let started: Vec<_> =
                seeds.iter().enumerate().map(|one| scope.spawn(move || work(one))).collect();
            started.into_iter().map(|one| one.join().expect("no thread panics")).collect()
        });
        for counts in done {
            self.counts.add(counts?);
        }
        Ok(())
    }
}

/// Who has one session at a time.
struct User<'a> {
    model: &'a Model,
    file: PathBuf,
    random: Random,
    counts: Counts,
}

impl User<'_> {
    /// A session's whole life: about so many tokens, in turns of every kind.
    fn session(&mut self, tokens: usize) -> Result<()> {
        let policy = *self.random.pick(&POLICIES);
        let limit = self.model.config().context;
        let options = SessionOptions {
            context: Some((tokens + self.random.below(tokens)).min(limit)),
            attention: policy.parse()?,
            thresholds: None,
        };
        let mut session = Session::new(self.model, &options)?;
        self.counts.sessions += 1;
        let end = self.counts.tokens + tokens;
        while self.counts.tokens < end {
            let room = session.context().saturating_sub(session.tokens().len());
            match self.random.below(8) {
                _ if room < 40 => self.cut(&mut session),
                0 => self.cut(&mut session),
                1 => session = self.restored(session)?,
                2 => {
                    let ids = self.ids(room.min(80));
                    self.counts.tokens += ids.len();
                    session.evaluate(&ids)?;
                    session.statistics()?;
                }
                3 => self.cancelled_prompt(&mut session, room)?,
                _ => self.generation(&mut session, room)?,
            }
        }
        Ok(())
    }

    /// A generation that ends by itself, is left, or is cancelled, now or at some moment.
    fn generation(&mut self, session: &mut Session, room: usize) -> Result<()> {
        let length = 1 + self.random.below(room / 2);
        let prompt = self.ids(length);
        let most = 1 + self.random.below((room - prompt.len()).clamp(1, 60));
        let hot = self.random.below(2) == 0;
        let sampling = Sampling {
            temperature: if hot { 1.2 } else { 0.0 },
            top_k: *self.random.pick(&[0, 1, 40]),
            repetition_penalty: if hot { 1.1 } else { 1.0 },
            seed: self.random.next(),
            ..Sampling::default()
        };
        let options =
            GenerateOptions { sampling, max_tokens: most, ignore_eos: true, stop: Vec::new() };
        let (end, at) = (self.random.below(4), self.random.below(most));
        let cancel = session.cancel_handle();
        self.counts.generations += 1;
        let timings = match end {
            // From elsewhere, at whatever moment that is.
            0 => {
                self.counts.cancels += 1;
                let wait = Duration::from_micros(self.random.below(20_000) as u64);
                let from_elsewhere = cancel.clone();
                let timings = thread::scope(|scope| {
                    scope.spawn(move || {
                        thread::sleep(wait);
                        from_elsewhere.cancel();
                    });
                    taken(session, &prompt, &options, usize::MAX, None)
                });
                cancel.reset();
                timings?
            }
            1 => {
                self.counts.cancels += 1;
                let timings = taken(session, &prompt, &options, at, Some(&cancel));
                cancel.reset();
                timings?
            }
            2 => {
                self.counts.left += 1;
                taken(session, &prompt, &options, at, None)?
            }
            _ => taken(session, &prompt, &options, usize::MAX, None)?,
        };
        self.counts.tokens += prompt.len() + timings.new_tokens;
        Ok(())
    }

    /// A prompt that is cancelled before it runs: the text stays as it was.
    fn cancelled_prompt(&mut self, session: &mut Session, room: usize) -> Result<()> {
        let ids = self.ids(room);
        let before = session.tokens().len();
        let cancel = session.cancel_handle();
        cancel.cancel();
        let run = session.evaluate(&ids);
        cancel.reset();
        match run {
            // What fits in one step is not asked.
            Ok(_) => self.counts.tokens += ids.len(),
            Err(Error::Cancelled) => {
                self.counts.cancels += 1;
                assert_eq!(session.tokens().len(), before, "a cancelled prompt changed the text");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn cut(&mut self, session: &mut Session) {
        self.counts.cuts += 1;
        session.truncate(self.random.below(session.tokens().len() + 1));
    }

    /// Through a file: the old session is gone when the new one goes on.
    fn restored(&mut self, mut session: Session) -> Result<Session> {
        session.save(&self.file)?;
        let text = session.tokens().to_vec();
        drop(session);
        let session = Session::load(self.model, &self.file)?;
        assert_eq!(session.tokens(), text, "a restored session has another text");
        self.counts.saved += 1;
        self.counts.sessions += 1;
        Ok(session)
    }

    /// Tokens of the vocabulary.
    fn ids(&mut self, count: usize) -> Vec<u32> {
        let vocabulary = self.model.config().vocabulary;
        (0..count).map(|_| self.random.below(vocabulary) as u32).collect()
    }
}

/// Takes up to `most` pieces of a generation, and then cancels it or leaves it.
fn taken(
    session: &mut Session,
    prompt: &[u32],
    options: &GenerateOptions,
    most: usize,
    then: Option<&Cancel>,
) -> Result<Timings> {
    let mut generation = match session.generate(prompt, options) {
        Err(Error::Cancelled) => return Ok(Timings::default()),
        generation => generation?,
    };
    for piece in generation.by_ref().take(most) {
        piece?;
    }
    if let Some(cancel) = then {
        cancel.cancel();
        for piece in generation.by_ref() {
            piece?;
        }
    }
    Ok(generation.timings())
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`; 0 where that is 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}
