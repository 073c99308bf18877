//! Compresses the pages of keys that a step has completed.

use std::ops::Range;

use super::Machine;
use super::cache::{Cache, Keys, find_end};
use crate::delta::{Page, encode_page};

/// Pages of one head that are encoded one after another.
struct Run {
    head: usize,
    range: Range<usize>,
    encoded: Vec<Page>,
    /// The last key that the pages before stand for, then that of these; empty where no page
    /// depends on the one before.
    end: Vec<f32>,
}

/// See [`crate::backend::Operations::encode_keys`].
pub(super) fn encode_keys(machine: &Machine, cache: &mut Cache) {
    let full = cache.length / cache.policy.page;
    let Keys::Compressed(keys) = &mut cache.keys else {
        return;
    };
    let done = keys.pages.first().map_or(full, Vec::len);
    if done >= full {
        return;
    }
    let mut runs = Vec::new();
    for (head, end) in keys.ends.iter().enumerate() {
        // A chain runs through all pages of its head; others stand alone.
        let length = if end.is_empty() { 1 } else { full - done };
        runs.extend((done..full).step_by(length).map(|first| Run {
            head,
            range: first..first + length,
            encoded: Vec::with_capacity(length),
            end: end.clone(),
        }));
    }
    let (layout, thresholds) = (&keys.layout, &keys.thresholds);
    machine.each_of(false, runs.iter_mut().collect(), |_worker, run: &mut Run| {
        let layout = &layout.with_theta(thresholds.as_ref().map(|thetas| thetas[run.head]));
        for page in run.range.clone() {
            let original = keys.page_keys(run.head, page);
            let previous = (page > 0 && !run.end.is_empty()).then_some(&run.end[..]);
            run.encoded.push(encode_page(layout, &original, previous));
            find_end(layout, &run.encoded, &mut run.end);
        }
    });
    for run in runs {
        keys.pages[run.head].extend(run.encoded);
        keys.ends[run.head] = run.end;
    }
}
