//! Sharing the work of one operation among threads.
//!
//! A decoding step is some hundred operations of tens of microseconds each, so that what counts is
//! how fast threads start and stop. A general pool has to wait until each of its threads has
//! woken up and seen the work, even where the others have long finished it. Here the caller
//! begins at once, nobody waits for a thread that has not begun, and threads look out for the next
//! operation a few microseconds longer before they sleep.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How long a thread looks out for work before it sleeps. More than passes between the operations
/// of a step, less than would heat anyone's lap.
const PATIENCE: Duration = Duration::from_micros(50);

/// More threads than any machine of today has cores for.
const MAX_THREADS: usize = 1024;

/// The threads of a backend: its own, and the caller of each operation.
pub(super) struct Threads {
    shared: Arc<Shared>,
    /// Held during an operation: those of several sessions take turns.
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    desk: Mutex<Desk>,
    /// Signalled when there is work, or the end.
    work: Condvar,
    /// Signalled when the last thread leaves the work.
    left: Condvar,
    /// [`Desk::round`], to look at without the lock.
    round: AtomicUsize,
    /// [`Desk::busy`], likewise.
    busy: AtomicUsize,
    /// Whether a thread panicked in this round.
    panicked: AtomicBool,
}

/// What is being done.
struct Desk {
    /// The work, while it may be begun. Not really `'static`: see [`Threads::everywhere`].
    work: Option<&'static (dyn Fn(usize) + Sync)>,
    /// Counts the works.
    round: usize,
    /// Threads at it, without the caller.
    busy: usize,
    sleeping: usize,
    end: bool,
}

impl Shared {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        // Nothing panics while it holds the lock.
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each thread of the backend does until the end.
    fn serve(&self, index: usize) {
        let mut seen = 0;
        loop {
            look_out(|| self.round.load(Ordering::Acquire) != seen);
            let mut desk = self.desk();
            while desk.round == seen && !desk.end {
                desk.sleeping += 1;
                desk = self.work.wait(desk).unwrap_or_else(PoisonError::into_inner);
                desk.sleeping -= 1;
            }
            if desk.end {
                return;
            }
            seen = desk.round;
            let Some(work) = desk.work else {
                continue;
            };
            desk.busy += 1;
            self.busy.store(desk.busy, Ordering::Release);
            drop(desk);
            if catch_unwind(AssertUnwindSafe(|| work(index))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            let mut desk = self.desk();
            desk.busy -= 1;
            self.busy.store(desk.busy, Ordering::Release);
            if desk.busy == 0 {
                self.left.notify_one();
            }
        }
    }

    /// Takes the work from the desk and waits for the threads that are at it.
    fn close(&self) {
        self.desk().work = None;
        look_out(|| self.busy.load(Ordering::Acquire) == 0);
        let mut desk = self.desk();
        while desk.busy > 0 {
            desk = self.left.wait(desk).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Waits for `condition`, but not for long.
fn look_out(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() && start.elapsed() < PATIENCE {
        for _ in 0..16 {
            std::hint::spin_loop();
        }
    }
}

impl Threads {
    /// `count` threads, or one for each core that this process may use.
    pub(super) fn new(count: Option<usize>) -> Result<Self> {
        let available =
            || std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
        let count = count.unwrap_or_else(available);
        if !(1..=MAX_THREADS).contains(&count) {
            let allowed = format!("must be from 1 to {MAX_THREADS}");
            return Err(Error::Parameter { name: "threads", value: count.to_string(), allowed });
        }
        let desk = Desk { work: None, round: 0, busy: 0, sleeping: 0, end: false };
        let shared = Arc::new(Shared {
            desk: Mutex::new(desk),
            work: Condvar::new(),
            left: Condvar::new(),
            round: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
        });
        let mut threads = Self { shared, turn: Mutex::new(()), workers: Vec::new() };
        for index in 1..count {
            let shared = threads.shared.clone();
            let thread = std::thread::Builder::new().name(format!("deltallm-{index}"));
            let started = thread.spawn(move || shared.serve(index));
            threads.workers.push(started.map_err(|e| Error::Device {
                device: "CPU".into(),
                what: format!("starting {count} threads"),
                message: e.to_string(),
            })?);
        }
        Ok(threads)
    }

    /// How many there are, the caller of an operation included.
    pub(super) fn count(&self) -> usize {
        1 + self.workers.len()
    }

    /// Runs `work` here, and on as many other threads as come in time, each with its index; returns
    /// when all that have begun have ended.
    ///
    /// # Panics
    /// If `work` does.
    fn everywhere(&self, work: &(dyn Fn(usize) + Sync)) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.panicked.store(false, Ordering::Relaxed);
        // SAFETY: the work is taken from the desk again, and all threads have left it, before this
        // function returns or unwinds: nothing between here and `close` panics but what is caught.
        let lasting = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(work)
        };
        let mut desk = self.shared.desk();
        desk.work = Some(lasting);
        desk.round += 1;
        self.shared.round.store(desk.round, Ordering::Release);
        let sleeping = desk.sleeping;
        drop(desk);
        if sleeping > 0 {
            self.shared.work.notify_all();
        }
        let result = catch_unwind(AssertUnwindSafe(|| work(0)));
        self.shared.close();
        if let Err(panic) = result {
            resume_unwind(panic);
        }
        assert!(!self.shared.panicked.load(Ordering::Relaxed), "a thread of the backend panicked");
    }

    /// Calls `task` with each of `items`, which may be disjoint parts of an output, and with the
    /// index of the thread that it runs on.
    ///
    /// Each thread has a share of neighbouring items and takes them in order, so that what it
    /// reads goes on where it was, and what it asks the memory for ahead is its own. Cores may
    /// differ in speed, or be busy: who is done takes items from the end of another's share.
    pub(super) fn each_of<T: Send>(&self, items: Vec<T>, task: impl Fn(usize, T) + Sync) {
        if items.len() < 2 || self.workers.is_empty() {
            items.into_iter().for_each(|item| task(0, item));
            return;
        }
        let shares = shares(items, self.count());
        self.everywhere(&|worker| {
            let lock = |share: usize| shares[share].lock().unwrap_or_else(PoisonError::into_inner);
            while let Some(item) = { lock(worker).next() } {
                task(worker, item);
            }
            for other in (1..shares.len()).map(|i| (worker + i) % shares.len()) {
                while let Some(item) = { lock(other).next_back() } {
                    task(worker, item);
                }
            }
        });
    }
}

/// Cuts `items` into `count` shares of neighbours.
fn shares<T>(mut items: Vec<T>, count: usize) -> Vec<Mutex<std::vec::IntoIter<T>>> {
    let total = items.len();
    let mut shares: Vec<_> = (0..count)
        .rev()
        .map(|share| Mutex::new(items.split_off(share * total / count).into_iter()))
        .collect();
    shares.reverse();
    shares
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.desk().end = true;
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // It catches what panics.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for count in [1, 2, 5] {
            let threads = Threads::new(Some(count)).expect("threads start");
            assert_eq!(threads.count(), count);
            for round in 0..300 {
                let mut out = vec![0; round % 37];
                threads.each_of(out.iter_mut().collect(), |worker, item| {
                    assert!(worker < count);
                    *item += 1;
                });
                assert!(out.iter().all(|&n| n == 1));
            }
        }
    }

    #[test]
    fn sessions_take_turns() {
        let threads = Threads::new(Some(3)).expect("threads start");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let mut out = [0; 20];
                        threads.each_of(out.iter_mut().collect(), |_, item| *item += 1);
                        assert!(out.iter().all(|&n| n == 1));
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_harms_nobody_else() {
        let threads = Threads::new(Some(3)).expect("threads start");
        let result = catch_unwind(AssertUnwindSafe(|| {
            threads.each_of((0..50).collect(), |_, i| assert!(i != 25, "as planned"));
        }));
        assert!(result.is_err());
        let mut out = [0; 50];
        threads.each_of(out.iter_mut().collect(), |_, item| *item += 1);
        assert!(out.iter().all(|&n| n == 1));
    }
}
