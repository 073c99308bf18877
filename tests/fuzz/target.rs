//! Every fuzzer: which it is, its name says.
#![no_main]

#[path = "../hostile_common/mod.rs"]
mod hostile_common;

use std::sync::Once;

use hostile_common::{memory, targets};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// libFuzzer's hook ends the process at every panic, also at those of other libraries that are
/// contained. What is not contained ends it all the same, when it reaches the fuzzer.
static HOOK: Once = Once::new();

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    HOOK.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let (_, peak) = memory::peak_of(|| targets::by_name(env!("CARGO_BIN_NAME"), bytes));
    assert!(peak <= memory::allowed(bytes.len()), "takes {peak} bytes of memory");
});
