//! Calls into libraries that panic on some files which they should refuse.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// What `call` returns; `None` where it panicked.
///
/// The standard hook has told of the panic by then, unless the program has set another: what a
/// library is known to stumble over is better refused beforehand. A program that is built to abort
/// where it panics does that here too.
///
/// Whoever calls this uses nothing again that `call` could have left half changed.
pub(crate) fn contained<T>(call: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(call)).ok()
}
