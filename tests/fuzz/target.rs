//! Every fuzzer: which it is, its name says.
#![no_main]

#[path = "../hostile_common/mod.rs"]
mod hostile_common;

use hostile_common::{memory, targets};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let (_, peak) = memory::peak_of(|| targets::by_name(env!("CARGO_BIN_NAME"), bytes));
    assert!(peak <= memory::allowed(bytes.len()), "takes {peak} bytes of memory");
});
