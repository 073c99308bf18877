//! Where the operations of a model that is measured leave what they cost.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::cost::Cost;
use crate::backend::{Activity, MatrixFormat};

/// What is taken note of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Bytes and launches.
    Count,
    /// Also the time of each launch by the device's clock, and where it has none as
    /// [`Mode::HostClock`].
    DeviceClock,
    /// Also the time from the call of each operation until it is done.
    HostClock,
}

/// What operations have cost since it was last asked.
#[derive(Debug)]
pub(crate) struct Observer {
    mode: AtomicU8,
    tally: Mutex<Tally>,
}

/// What some operations cost together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub cost: Cost,
    pub activity: Activity,
    /// By name and detail, while times are taken.
    pub operations: BTreeMap<(&'static str, Arc<str>), OperationTally>,
}

/// What one operation cost, all its calls together.
#[derive(Clone, Debug)]
pub(crate) struct OperationTally {
    /// Of the weights that it multiplies.
    pub format: MatrixFormat,
    pub calls: u64,
    pub cost: Cost,
    /// Launches and time of each kernel; those of one without a name where the host's clock was
    /// taken.
    pub kernels: BTreeMap<&'static str, (u64, Duration)>,
}

impl Default for OperationTally {
    fn default() -> Self {
        let (calls, cost, kernels) = (0, Cost::default(), BTreeMap::new());
        Self { format: MatrixFormat::F32, calls, cost, kernels }
    }
}

impl OperationTally {
    pub fn add(&mut self, kernel: &'static str, launches: u64, time: Duration) {
        let (all, total) = self.kernels.entry(kernel).or_default();
        *all += launches;
        *total += time;
    }
}

impl Tally {
    pub fn operation(&mut self, name: &'static str, detail: &Arc<str>) -> &mut OperationTally {
        self.operations.entry((name, Arc::clone(detail))).or_default()
    }

    pub fn add(&mut self, other: Self) {
        self.cost += other.cost;
        self.activity.launches += other.activity.launches;
        self.activity.submissions += other.activity.submissions;
        self.activity.readback_bytes += other.activity.readback_bytes;
        for (name, operation) in other.operations {
            let sum = self.operations.entry(name).or_default();
            sum.format = operation.format;
            sum.calls += operation.calls;
            sum.cost += operation.cost;
            for (kernel, (launches, time)) in operation.kernels {
                sum.add(kernel, launches, time);
            }
        }
    }
}

impl Default for Observer {
    fn default() -> Self {
        Self { mode: AtomicU8::new(Mode::Count as u8), tally: Mutex::default() }
    }
}

impl Observer {
    pub fn mode(&self) -> Mode {
        let mode = self.mode.load(Ordering::Relaxed);
        let known = [Mode::Count, Mode::DeviceClock, Mode::HostClock];
        known.into_iter().find(|known| *known as u8 == mode).unwrap_or(Mode::Count)
    }

    /// Takes effect with the next step.
    pub fn set_mode(&self, mode: Mode) {
        self.mode.store(mode as u8, Ordering::Relaxed);
    }

    pub fn add(&self, tally: Tally) {
        self.tally().add(tally);
    }

    /// What was counted since the last call.
    pub fn take(&self) -> Tally {
        std::mem::take(&mut self.tally())
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
