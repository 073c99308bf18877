//! Where the time of a test goes, kernel by kernel.

use std::time::Duration;

use super::cost::Cost;
use super::observer::Tally;
use crate::backend::MatrixFormat;
use crate::error::Result;

/// Where the time of a test went.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Whose clock it was.
    pub clock: Clock,
    /// The operations, the one that took longest first.
    pub operations: Vec<ProfiledOperation>,
    /// From the test's begin to its end, the taking of times included.
    pub wall: Duration,
}

/// Whose clock times were taken by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The device's, before and after each launch.
    Device,
    /// The host's, around each operation until it was done; on a GPU that holds what it takes to
    /// submit it.
    Host,
}

/// An operation of the forward pass, all its calls together.
#[derive(Clone, Debug)]
pub struct ProfiledOperation {
    /// Its name, as [`crate::backend::Operations`] has it.
    pub name: String,
    /// Which of several: the shape and format of a matrix; empty where there is one.
    pub detail: String,
    /// Calls.
    pub calls: u64,
    /// What they moved and computed.
    pub cost: Cost,
    /// Multiply-adds a second of which the device is capable, of the kind that these are; nothing
    /// where there are none.
    pub multiply_speed: Option<f64>,
    /// The kernels that did it, the one that took longest first.
    pub kernels: Vec<ProfiledKernel>,
}

/// A kernel within an operation.
#[derive(Clone, Debug)]
pub struct ProfiledKernel {
    /// Its name, that of its file under `shaders/`; the operation's on the host's clock.
    pub name: String,
    /// Launches.
    pub launches: u64,
    /// Their time.
    pub time: Duration,
}

impl ProfiledOperation {
    /// Time of all its kernels.
    pub fn time(&self) -> Duration {
        self.kernels.iter().map(|kernel| kernel.time).sum()
    }
}

impl Profile {
    /// Time of all operations.
    pub fn time(&self) -> Duration {
        self.operations.iter().map(ProfiledOperation::time).sum()
    }

    /// `speed` gives [`Backend::multiply_speed`](crate::backend::Backend::multiply_speed).
    pub(super) fn new(
        tally: Tally,
        wall: Duration,
        mut speed: impl FnMut(MatrixFormat) -> Result<f64>,
    ) -> Result<Self> {
        let mut clock = Clock::Device;
        let mut operations = Vec::with_capacity(tally.operations.len());
        for ((name, detail), operation) in tally.operations {
            let mut kernels = Vec::with_capacity(operation.kernels.len());
            for (kernel, (launches, time)) in operation.kernels {
                if kernel.is_empty() {
                    clock = Clock::Host;
                }
                let kernel = if kernel.is_empty() { name } else { kernel };
                kernels.push(ProfiledKernel { name: kernel.to_owned(), launches, time });
            }
            kernels.sort_by_key(|kernel| std::cmp::Reverse(kernel.time));
            let multiplies = operation.cost.multiply_adds > 0;
            operations.push(ProfiledOperation {
                name: name.to_owned(),
                detail: detail.to_string(),
                calls: operation.calls,
                cost: operation.cost,
                multiply_speed: multiplies.then(|| speed(operation.format)).transpose()?,
                kernels,
            });
        }
        operations.sort_by_key(|operation| std::cmp::Reverse(operation.time()));
        Ok(Self { clock, operations, wall })
    }
}
