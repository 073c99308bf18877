//! The compiled kernels of a device, and the threads that compile them ahead.
//!
//! A driver takes milliseconds to seconds for a kernel. Whatever is brought to the device announces
//! the kernels that work on it, so that they are compiled beside the loading of weights; who needs one
//! that is not ready waits for it, or compiles it where nobody has begun.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::pipeline::Pipeline;
use super::shader::{Abilities, Kernel};

/// A kernel's pipeline, or what the driver said; empty while nobody has compiled it.
type Slot = Arc<OnceLock<Result<Arc<Pipeline>, String>>>;

/// Compiles a kernel, linked for these abilities.
type Compile = dyn Fn(Kernel, Abilities) -> Result<Pipeline, String> + Send + Sync;

/// Kernels that are linked without some of the device's abilities, by their description.
pub(super) type Plainer = BTreeMap<String, Abilities>;

/// Threads at most: a phone's other cores read weights.
const MAX_THREADS: usize = 4;

#[derive(Default)]
struct State {
    slots: HashMap<Kernel, Slot>,
    /// Announced, and not begun.
    waiting: VecDeque<(Kernel, Slot)>,
    /// Threads that will look for more.
    busy: usize,
    plainer: Plainer,
    /// What was needed since [`Pipelines::watch`].
    watched: Option<Vec<Kernel>>,
    /// How long those who needed kernels have waited for them.
    waited: Duration,
    /// Kernels that were needed and never announced.
    #[cfg(test)]
    missed: Vec<&'static str>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    compile: Box<Compile>,
    abilities: Abilities,
    state: Mutex<State>,
}

/// All kernels of a device that anybody has asked for.
pub(super) struct Pipelines {
    shared: Arc<Shared>,
    max_threads: usize,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self, kernel: Kernel, slot: &Slot) -> Result<Arc<Pipeline>, String> {
        let compile = || {
            // What a driver does must neither end a thread nor reach a caller as a panic.
            let abilities = self.abilities_of(kernel);
            catch_unwind(AssertUnwindSafe(|| (self.compile)(kernel, abilities)))
                .unwrap_or_else(|_| Err("the compiler panicked".to_owned()))
        };
        slot.get_or_init(|| compile().map(Arc::new)).clone()
    }

    fn abilities_of(&self, kernel: Kernel) -> Abilities {
        let state = self.state();
        if state.plainer.is_empty() {
            return self.abilities;
        }
        // Whatever a file says, a device has no abilities but its own.
        let plainer = state.plainer.get(&format!("{kernel:?}"));
        plainer.map_or(self.abilities, |plainer| self.abilities.shared_with(*plainer))
    }

    /// Compiles what waits, until nothing does.
    fn serve(&self) {
        loop {
            let mut state = self.state();
            let Some((kernel, slot)) = state.waiting.pop_front() else {
                state.busy -= 1;
                return;
            };
            drop(state);
            // A failure is told to whoever needs the kernel.
            let _ = self.fill(kernel, &slot);
        }
    }
}

impl Pipelines {
    pub(super) fn new(
        abilities: Abilities,
        plainer: Plainer,
        compile: impl Fn(Kernel, Abilities) -> Result<Pipeline, String> + Send + Sync + 'static,
    ) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let state = Mutex::new(State { plainer, ..State::default() });
        let shared = Shared { compile: Box::new(compile), abilities, state };
        Self {
            shared: Arc::new(shared),
            max_threads: cores.saturating_sub(1).clamp(1, MAX_THREADS),
        }
    }

    /// The pipeline of a kernel.
    ///
    /// # Errors
    /// What the driver said.
    pub(super) fn get(&self, kernel: Kernel) -> Result<Arc<Pipeline>, String> {
        let mut state = self.shared.state();
        if !state.slots.contains_key(&kernel) {
            log::debug!("{} is compiled when it is needed", kernel.name());
            #[cfg(test)]
            state.missed.push(kernel.name());
        }
        let slot = Arc::clone(state.slots.entry(kernel).or_default());
        if let Some(watched) = &mut state.watched
            && !watched.contains(&kernel)
        {
            watched.push(kernel);
        }
        drop(state);
        let start = Instant::now();
        let pipeline = self.shared.fill(kernel, &slot);
        self.shared.state().waited += start.elapsed();
        pipeline
    }

    /// How long those who needed kernels have waited for them, until now.
    pub(super) fn waited(&self) -> Duration {
        self.shared.state().waited
    }

    /// Begins to note which kernels are needed.
    pub(super) fn watch(&self) {
        self.shared.state().watched = Some(Vec::new());
    }

    /// Those that were, since; ceases to note them.
    pub(super) fn watched(&self) -> Vec<Kernel> {
        self.shared.state().watched.take().unwrap_or_default()
    }

    /// Links kernels for these abilities from now on. Who has one already keeps it.
    pub(super) fn replace(&self, kernels: &[Kernel], abilities: Abilities) {
        let mut guard = self.shared.state();
        let state = &mut *guard;
        for &kernel in kernels {
            state.plainer.insert(format!("{kernel:?}"), abilities);
            state.slots.insert(kernel, Slot::default());
        }
    }

    /// Kernels that were needed and never announced.
    #[cfg(test)]
    pub(super) fn missed(&self) -> Vec<&'static str> {
        self.shared.state().missed.clone()
    }

    /// Has kernels compiled that will be needed; returns at once.
    pub(super) fn announce(&self, kernels: impl IntoIterator<Item = Kernel>) {
        let mut guard = self.shared.state();
        let state = &mut *guard;
        for kernel in kernels {
            if let Entry::Vacant(entry) = state.slots.entry(kernel) {
                let slot = entry.insert(Slot::default());
                state.waiting.push_back((kernel, Arc::clone(slot)));
            }
        }
        while state.busy < self.max_threads.min(state.waiting.len()) {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("deltallm-compile".into());
            // Without a thread, kernels are compiled when they are needed.
            let Ok(thread) = thread.spawn(move || shared.serve()) else {
                break;
            };
            state.busy += 1;
            state.threads.retain(|thread| !thread.is_finished());
            state.threads.push(thread);
        }
    }
}

/// No thread is left within a driver that is about to go.
impl Drop for Pipelines {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.waiting.clear();
        let threads = std::mem::take(&mut state.threads);
        drop(state);
        for thread in threads {
            // It catches what panics.
            let _ = thread.join();
        }
    }
}
