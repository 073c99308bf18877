//! Which original keys a cache still has.

use super::policy::AttentionPolicy;
use super::window::{ExactRule, Phase};

/// Which original keys a cache still has, those of the sink aside: all of them where keys are
/// plain, else the last ones that were written, [`AttentionPolicy::recent_slots`] of them.
///
/// Cutting a text back brings none of them again: the slots hold what was written last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Originals {
    slots: Option<usize>,
    from: usize,
}

impl Originals {
    /// Those of an empty cache for `context` tokens, written in steps of up to `rows`.
    pub fn new(policy: &AttentionPolicy, context: usize, rows: usize) -> Self {
        let slots = (!policy.is_dense()).then(|| policy.recent_slots(context, rows));
        Self { slots, from: 0 }
    }

    /// The first position whose original key, and that of every one after it, is there.
    pub fn from(&self) -> usize {
        self.from
    }

    /// Takes note that keys up to position `end` were written.
    pub fn write_until(&mut self, end: usize) {
        if let Some(slots) = self.slots {
            self.from = self.from.max(end.saturating_sub(slots));
        }
    }

    /// Takes note that the cache is empty, or was restored with the keys from a position on.
    pub fn restart(&mut self, from: usize) {
        self.from = from;
    }

    /// Takes note that the keys before a position are gone.
    pub fn forget(&mut self, from: usize) {
        self.from = self.from.max(from);
    }

    /// Whether a text of `length` tokens can be continued by a step of `phase`, and then, as after
    /// every prompt, by decoding.
    pub fn can_continue(&self, policy: &AttentionPolicy, phase: Phase, length: usize) -> bool {
        let covers = |phase| self.cover(&policy.rule(phase), length);
        covers(phase) && covers(Phase::Decode)
    }

    /// Whether the window of the next query, and so that of every later one, is whole in a text of
    /// `length` tokens. It holds the page that is being filled, which will be encoded.
    pub fn cover(&self, rule: &ExactRule, length: usize) -> bool {
        rule.start(length) >= self.from
    }
}
