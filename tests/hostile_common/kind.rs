//! The inputs of one kind: tried, counted, and told of.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use super::{Outcome, memory, valid};

/// One kind at a time: memory is counted for the whole process.
static TURN: Mutex<()> = Mutex::new(());
/// Where panics were, those among them that the crate has contained.
static PANICS: Mutex<BTreeMap<String, usize>> = Mutex::new(BTreeMap::new());

/// Far above what any input takes on a slow machine: it is stuck.
const STUCK: Duration = Duration::from_secs(30);

fn panics() -> MutexGuard<'static, BTreeMap<String, usize>> {
    PANICS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was tried of a kind, and what came of it.
pub struct Kind {
    pub name: &'static str,
    accepted: usize,
    refused: usize,
    most: usize,
    slowest: Duration,
    started: Instant,
    /// What broke the rule: each message once, with how often and the first input.
    failures: BTreeMap<String, (usize, String)>,
    _turn: MutexGuard<'static, ()>,
}

impl Kind {
    pub fn new(name: &'static str) -> Self {
        static QUIET: Once = Once::new();
        QUIET.call_once(|| {
            let usual = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                let here = panic.location().map(|place| place.file().to_owned());
                let here = here.unwrap_or_default();
                // The tests' own failures are to be read; those of libraries are counted.
                if here.ends_with("hostile.rs") || here.ends_with("kind.rs") {
                    usual(panic);
                } else {
                    let line = panic.location().map_or(0, |place| place.line());
                    let file = here.rsplit_once("/src/").map_or(&here[..], |(before, _)| before);
                    let file = file.rsplit('/').next().unwrap_or_default();
                    let inside = here.rsplit("/src/").next().unwrap_or_default();
                    *panics().entry(format!("{file}: {inside}:{line}")).or_default() += 1;
                }
            }));
        });
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // What is made once is not counted with the first input.
        valid::opened();
        panics().clear();
        Self {
            name,
            accepted: 0,
            refused: 0,
            most: 0,
            slowest: Duration::ZERO,
            started: Instant::now(),
            failures: BTreeMap::new(),
            _turn: turn,
        }
    }

    /// Messages so far about what broke the rule.
    pub fn failed(&self) -> usize {
        self.failures.len()
    }

    pub fn inputs(&self) -> usize {
        self.accepted + self.refused
    }

    /// Tries an input; what breaks the rule is told by [`Kind::done`].
    pub fn feed(
        &mut self,
        what: &str,
        bytes: &[u8],
        target: impl FnOnce(&[u8]) -> Outcome,
    ) -> bool {
        // For what ends the whole process.
        if std::env::var_os("HOSTILE_TRACE").is_some() {
            eprintln!("{}: {what:.2000}", self.name);
        }
        let start = Instant::now();
        let (outcome, peak) = memory::peak_of(|| catch_unwind(AssertUnwindSafe(|| target(bytes))));
        let elapsed = start.elapsed();
        self.most = self.most.max(peak);
        self.slowest = self.slowest.max(elapsed);
        let accepted = matches!(outcome, Ok(Outcome::Accepted));
        match accepted {
            true => self.accepted += 1,
            false => self.refused += 1,
        }
        if let Err(panic) = outcome {
            let message = panic.downcast_ref::<String>().cloned();
            let message = message.or(panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
            self.fail(message.unwrap_or_default(), what, bytes);
        }
        if peak > memory::allowed(bytes.len()) {
            let message =
                format!("takes {} MB of memory and more", (peak >> 20).next_power_of_two());
            self.fail(message, what, bytes);
        }
        if elapsed > STUCK {
            self.fail("takes too long".into(), what, bytes);
        }
        accepted
    }

    pub fn fail(&mut self, message: String, what: &str, bytes: &[u8]) {
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(300)]).into_owned();
        let first = format!("{what}, {} bytes that begin with {start:?}", bytes.len());
        self.failures.entry(message).or_insert((0, first)).0 += 1;
    }

    /// What was tried, and whether the rule held.
    pub fn done(self, least: usize) {
        println!(
            "{:<22} {:>6} inputs, {:>5} accepted, {:>6} refused, {:>4} MB at most, slowest {:>5} ms, \
             {:>5.1} s",
            self.name,
            self.inputs(),
            self.accepted,
            self.refused,
            self.most >> 20,
            self.slowest.as_millis(),
            self.started.elapsed().as_secs_f64()
        );
        for (place, count) in panics().iter() {
            println!("    a panic in {place}, {count} times");
        }
        let list = |(message, (count, first)): (&String, &(usize, String))| {
            format!("\n  {count} times: {message}\n      {first}")
        };
        let failures: String = self.failures.iter().map(list).collect();
        assert!(failures.is_empty(), "{}:{failures}", self.name);
        assert!(self.inputs() >= least, "{}: only {} inputs", self.name, self.inputs());
    }
}
