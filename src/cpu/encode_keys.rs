//! Compresses the pages of keys that a step has completed.

use super::Machine;
use super::cache::{Cache, Keys};
use crate::delta::encode_page;

/// See [`crate::backend::Operations::encode_keys`].
pub(super) fn encode_keys(machine: &Machine, cache: &mut Cache) {
    let full = cache.length / cache.policy.page;
    let Keys::Compressed(keys) = &mut cache.keys else {
        return;
    };
    let mut work = std::mem::take(&mut keys.pages);
    let mut ends = std::mem::take(&mut keys.ends);
    let rest = &*keys;
    let items: Vec<_> = work.iter_mut().zip(&mut ends).enumerate().collect();
    machine.each_of(false, items, |_worker, (head, (pages, end))| {
        for page in pages.len()..full {
            let original = rest.page_keys(head, page);
            let previous = (page > 0 && !end.is_empty()).then_some(&end[..]);
            let page = encode_page(&rest.layout, &original, previous);
            pages.push(page);
            super::cache::find_end(&rest.layout, pages, end);
        }
    });
    (keys.pages, keys.ends) = (work, ends);
}
