//! Faults on demand, so that tests can see what becomes of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What a device is to suffer, and at which of its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A submission loses the device, and says so at once.
    Lost,
    /// A submission loses the device; the news comes to whoever waits, as with most drivers.
    LostUnnoticed,
    /// A submission holds a command that is refused.
    Invalid,
    /// A submission never ends: whoever waits is told that its time is over, without waiting for it.
    Hangs,
    /// There is no memory for a buffer.
    OutOfMemory,
    /// There is no adapter where a device is opened.
    Gone,
}

/// What happens to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Submission,
    Allocation,
    Opening,
}

impl Fault {
    fn event(self) -> Event {
        match self {
            Self::Lost | Self::LostUnnoticed | Self::Invalid | Self::Hangs => Event::Submission,
            Self::OutOfMemory => Event::Allocation,
            Self::Gone => Event::Opening,
        }
    }
}

/// Faults that tests give to devices. The default has none, and costs a look at an empty option.
///
/// All devices that are opened with clones of one `Faults` share it, also the one that is opened in
/// place of a lost one: events are counted over all of them.
#[derive(Clone, Debug, Default)]
pub struct Faults(Option<Arc<Plan>>);

#[derive(Debug, Default)]
struct Plan {
    planned: Mutex<Vec<Planned>>,
    submissions: AtomicU64,
    allocations: AtomicU64,
    openings: AtomicU64,
    held: Arc<AtomicU64>,
}

#[derive(Clone, Copy, Debug)]
struct Planned {
    fault: Fault,
    /// Events that pass before it.
    skip: u64,
    /// Events that suffer it then.
    count: u64,
}

impl Faults {
    /// None yet, but they can be injected at any time.
    pub fn possible() -> Self {
        Self(Some(Arc::default()))
    }

    /// Whether some could be injected.
    pub(super) fn are_possible(&self) -> bool {
        self.0.is_some()
    }

    /// Lets the next `skip` events of its kind pass, and has the `count` after them suffer `fault`.
    /// Does nothing for the default, which no fault is possible with.
    pub fn inject(&self, fault: Fault, skip: u64, count: u64) {
        if let Some(plan) = &self.0 {
            plan.planned().push(Planned { fault, skip, count });
        }
    }

    /// Takes back what was injected.
    pub fn clear(&self) {
        if let Some(plan) = &self.0 {
            plan.planned().clear();
        }
    }

    /// Submissions so far.
    pub fn submissions(&self) -> u64 {
        self.0.as_ref().map_or(0, |plan| plan.submissions.load(Ordering::Relaxed))
    }

    /// Buffers that were asked for so far.
    pub fn allocations(&self) -> u64 {
        self.0.as_ref().map_or(0, |plan| plan.allocations.load(Ordering::Relaxed))
    }

    /// Devices that were opened, or could not be, so far.
    pub fn openings(&self) -> u64 {
        self.0.as_ref().map_or(0, |plan| plan.openings.load(Ordering::Relaxed))
    }

    /// Bytes of the buffers that are alive, on lost devices too.
    pub fn held(&self) -> u64 {
        self.0.as_ref().map_or(0, |plan| plan.held.load(Ordering::Relaxed))
    }

    /// What a device counts its bytes with.
    pub(super) fn counter(&self) -> Arc<AtomicU64> {
        self.0.as_ref().map(|plan| Arc::clone(&plan.held)).unwrap_or_default()
    }

    /// What an event that happens now is to suffer.
    #[inline]
    pub(super) fn strike(&self, event: Event) -> Option<Fault> {
        self.0.as_ref().and_then(|plan| plan.strike(event))
    }
}

impl Plan {
    fn planned(&self) -> std::sync::MutexGuard<'_, Vec<Planned>> {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn strike(&self, event: Event) -> Option<Fault> {
        let counter = match event {
            Event::Submission => &self.submissions,
            Event::Allocation => &self.allocations,
            Event::Opening => &self.openings,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        let mut planned = self.planned();
        let mut struck = None;
        for one in planned.iter_mut().filter(|one| one.fault.event() == event) {
            if one.skip > 0 {
                one.skip -= 1;
            } else if struck.is_none() && one.count > 0 {
                one.count -= 1;
                struck = Some(one.fault);
            }
        }
        planned.retain(|one| one.count > 0);
        struck
    }
}

/// The same faults, not only such as were planned alike.
impl PartialEq for Faults {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

impl Eq for Faults {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_strike_the_events_that_they_are_planned_for() {
        let faults = Faults::possible();
        faults.inject(Fault::Lost, 1, 2);
        faults.inject(Fault::OutOfMemory, 0, 1);
        let submissions: Vec<_> = (0..4).map(|_| faults.strike(Event::Submission)).collect();
        assert_eq!(submissions, [None, Some(Fault::Lost), Some(Fault::Lost), None]);
        assert_eq!(faults.strike(Event::Allocation), Some(Fault::OutOfMemory));
        assert_eq!(faults.strike(Event::Allocation), None);
        assert_eq!((faults.submissions(), faults.allocations()), (4, 2));
    }

    #[test]
    fn by_default_no_fault_is_possible() {
        let none = Faults::default();
        none.inject(Fault::Lost, 0, u64::MAX);
        assert_eq!(none.strike(Event::Submission), None);
        assert_eq!((none.submissions(), none.held()), (0, 0));
        assert_ne!(Faults::possible(), Faults::possible());
    }
}
