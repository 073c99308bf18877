//! Known answers before a device is trusted.
//!
//! Drivers miscompile. So whatever a model or a session is about to use is asked first, on a few small
//! inputs, and compared with the host's answer within the bounds of [`crate::conformance`]. A kernel
//! that is wrong is linked without one optional ability after the other; where that does not help,
//! there is an error, never a text. What was found out is remembered: by this process, and in a file
//! where the user has named one.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::findings::{Finding, Findings};
use super::pipelines::Plainer;
use super::shader::{Abilities, Kernel};
use super::tuning::Tuning;
use super::{Gpu, GpuOptions};
use crate::backend::DeviceInfo;
use crate::conformance::Check;
use crate::conformance::known::Question;
use crate::error::{Error, Result};

/// A driver does not change while a process runs.
static PROCESS: Mutex<Option<Findings>> = Mutex::new(None);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What this process knows.
fn known(info: &DeviceInfo, tuning: &Tuning) -> Option<Finding> {
    locked(&PROCESS).as_ref().and_then(|all| all.of(info, tuning).cloned())
}

/// What a device was asked.
pub(super) struct SelfTest {
    on: bool,
    file: Option<PathBuf>,
    /// Whether findings are about the driver, and so of use to others.
    shared: bool,
    tuning: Tuning,
    state: Mutex<State>,
}

struct State {
    finding: Finding,
    /// Whether the file, where there is one, has all of it.
    saved: bool,
    /// Kernels that had a part in a right answer since the device was opened.
    sound: Vec<Kernel>,
}

impl SelfTest {
    pub(super) fn new(options: &GpuOptions, info: &DeviceInfo, tuning: &Tuning) -> Self {
        // What is broken on purpose says nothing about a driver.
        let shared = options.sabotage.0.is_empty() && !options.faults.are_possible();
        let file = options.findings.clone();
        let (mut finding, mut saved) = (None, true);
        if options.self_test && shared {
            let read = || {
                // The next self-test writes a new one.
                let read = file.as_deref().map(Findings::read)?;
                let all = read.inspect_err(|error| log::warn!("{error}: testing anew")).ok()?;
                all.of(info, tuning).cloned()
            };
            let (known, read) = (known(info, tuning), read());
            saved = file.is_none() || known.is_none() || known == read;
            finding = known.or(read);
        }
        let finding = finding.unwrap_or_else(|| Finding::none(tuning));
        let state = Mutex::new(State { finding, saved, sound: Vec::new() });
        Self { on: options.self_test, file, shared, tuning: *tuning, state }
    }

    /// The kernels that must do without some abilities.
    pub(super) fn plainer(&self) -> Plainer {
        locked(&self.state).finding.plainer.clone()
    }

    /// Tells other devices of this process, and other processes.
    fn remember(&self, info: &DeviceInfo, finding: &Finding) {
        if !self.shared {
            return;
        }
        locked(&PROCESS).get_or_insert_default().insert(info, finding.clone());
        let Some(file) = &self.file else {
            return;
        };
        // What cannot be read is replaced. Of two processes that write at once one is forgotten, and
        // tests again.
        let mut all = Findings::read(file).unwrap_or_default();
        let others = all.of(info, &self.tuning).cloned();
        let mut finding = finding.clone();
        if let Some(others) = others {
            finding.right.extend(others.right);
        }
        all.insert(info, finding);
        if let Err(error) = all.write(file) {
            log::warn!("{error}: the self-test of {} will run again", info.name);
        }
    }
}

/// Asks a device what it has not been asked yet.
///
/// # Errors
/// [`Error::WrongResults`] where an answer is wrong whatever variant of the kernels gives it; a device
/// that was lost, or has no memory.
pub(super) fn ask(gpu: &Gpu, questions: &[Question<Gpu>]) -> Result<()> {
    let device = &gpu.device;
    let test = &device.self_test;
    if !test.on {
        return Ok(());
    }
    let mut state = locked(&test.state);
    let asked: Vec<_> =
        questions.iter().filter(|q| !state.finding.right.contains(&q.name)).collect();
    if asked.is_empty() && state.saved {
        return Ok(());
    }
    let (start, waited) = (Instant::now(), device.pipelines.waited());
    for question in &asked {
        ask_one(gpu, &mut state, question)?;
    }
    log::info!(
        "{}: {} more known answers in {} ms, of which kernels were compiled in {}",
        device.info.name,
        asked.len(),
        start.elapsed().as_millis(),
        (device.pipelines.waited() - waited).as_millis()
    );
    test.remember(&device.info, &state.finding);
    state.saved = true;
    Ok(())
}

fn ask_one(gpu: &Gpu, state: &mut State, question: &Question<Gpu>) -> Result<()> {
    let device = &gpu.device;
    let (answer, used) = watched(gpu, question);
    let Some(wrong) = judged(answer)? else {
        state.finding.right.insert(question.name.clone());
        state.sound.extend(used);
        return Ok(());
    };
    log::info!("{}: {wrong}", device.info.name);
    // An operation is tested with others that were right before.
    let (sound, mut suspects): (Vec<_>, Vec<_>) =
        used.into_iter().partition(|kernel| state.sound.contains(kernel));
    if suspects.is_empty() {
        suspects = sound;
    }
    let mut tried = device.abilities;
    for abilities in device.abilities.plainer().skip(1) {
        let differs = |kernel: &Kernel| {
            kernel.program(abilities).wgsl() != kernel.program(device.abilities).wgsl()
        };
        let changed: Vec<_> = suspects.iter().copied().filter(differs).collect();
        if changed.is_empty() {
            continue;
        }
        tried = abilities;
        device.pipelines.replace(&changed, abilities);
        let (answer, used) = watched(gpu, question);
        if judged(answer)?.is_none() {
            log::warn!(
                "{} ({}): {} is computed wrongly with {}, and rightly without: so it runs from now on",
                device.info.name,
                device.info.driver,
                names(&changed),
                lost(device.abilities, abilities)
            );
            for kernel in changed {
                state.finding.plainer.insert(format!("{kernel:?}"), abilities);
            }
            state.finding.right.insert(question.name.clone());
            state.sound.extend(used);
            return Ok(());
        }
        device.pipelines.replace(&changed, device.abilities);
    }
    log::debug!("{}: last tried {}", device.info.name, tried.names());
    Err(Error::WrongResults {
        device: device.info.name.clone(),
        operation: question.operation,
        case: wrong,
    })
}

/// An answer, and the kernels that had a part in it.
fn watched(gpu: &Gpu, question: &Question<Gpu>) -> (Result<Vec<Check>>, Vec<Kernel>) {
    gpu.device.pipelines.watch();
    let answer = question.ask(gpu);
    (answer, gpu.device.pipelines.watched())
}

/// What is wrong with an answer: a kernel that the driver does not compile or run is as wrong as one
/// that gives wrong results.
///
/// # Errors
/// What no other kernel would mend.
fn judged(answer: Result<Vec<Check>>) -> Result<Option<String>> {
    match answer {
        Ok(checks) => Ok(checks.iter().find(|check| !check.pass).map(ToString::to_string)),
        Err(Error::Device { what, message, .. }) => Ok(Some(format!("{what}: {message}"))),
        Err(Error::NotFinite { what }) => Ok(Some(format!("NaN or infinity in {what}"))),
        Err(error) => Err(error),
    }
}

fn names(kernels: &[Kernel]) -> String {
    let mut names: Vec<_> = kernels.iter().map(|kernel| kernel.name()).collect();
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}

/// The abilities that one has and the other has not.
fn lost(full: Abilities, plainer: Abilities) -> String {
    let lost = Abilities {
        f16: full.f16 && !plainer.f16,
        subgroups: full.subgroups && !plainer.subgroups,
        packed_dot: full.packed_dot && !plainer.packed_dot,
        matrix_unit: full.matrix_unit.filter(|_| plainer.matrix_unit.is_none()),
    };
    lost.names()
}
