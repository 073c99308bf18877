//! Sharing the work of one operation among threads.

use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// The threads of a backend: those of its own pool, and the caller of each operation.
pub(super) struct Threads {
    /// All but the caller; none where one thread is enough.
    pool: Option<rayon::ThreadPool>,
    count: usize,
}

impl Threads {
    /// `count` threads, or one for each core that this process may use.
    pub(super) fn new(count: Option<usize>) -> Result<Self> {
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let count = count.unwrap_or_else(available).max(1);
        let pool = (count > 1).then(|| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(count - 1)
                .thread_name(|i| format!("deltallm-{i}"))
                .build()
        });
        let failed = |e: rayon::ThreadPoolBuildError| Error::Device {
            device: "CPU".into(),
            what: format!("starting {count} threads"),
            message: e.to_string(),
        };
        Ok(Self { pool: pool.transpose().map_err(failed)?, count })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Runs `work` on up to `tasks` threads at once, each with its index; returns when all have.
    ///
    /// The caller works too, so that nothing waits for a sleeping thread to wake up.
    fn everywhere(&self, tasks: usize, work: impl Fn(usize) + Sync) {
        match &self.pool {
            Some(pool) if tasks > 1 => pool.in_place_scope(|scope| {
                let work = &work;
                for worker in 1..self.count.min(tasks) {
                    scope.spawn(move |_| work(worker));
                }
                work(0);
            }),
            _ => work(0),
        }
    }

    /// Calls `task` with each of `items`, which may be disjoint parts of an output, and with the
    /// index of the thread that it runs on.
    ///
    /// Threads take the next item when they are free: cores may differ in speed, or be busy.
    pub(super) fn each_of<T: Send>(
        &self,
        items: impl ExactSizeIterator<Item = T> + Send,
        task: impl Fn(usize, T) + Sync,
    ) {
        let tasks = items.len();
        let items = Mutex::new(items);
        // A poisoned lock means that another thread panicked; the scope panics in its turn.
        let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
        self.everywhere(tasks, |worker| {
            while let Some(item) = next() {
                task(worker, item);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for count in [1, 2, 5] {
            let threads = Threads::new(Some(count)).expect("threads start");
            for tasks in [0, 1, 2, 3, 100] {
                let mut out = vec![0; tasks];
                threads.each_of(out.iter_mut(), |worker, item| {
                    assert!(worker < count);
                    *item += 1;
                });
                assert!(out.iter().all(|&n| n == 1));
            }
        }
    }
}
