//! How fast a model runs on a device, and how that compares with what the device could do.
//!
//! A [`Bench`] is a model on a device with an attention policy. [`Bench::run`] measures it as
//! [`BenchOptions`] says: prompts and generation at several depths, each some times over. Of each
//! test a [`Line`] has the rate with its spread, and what a token took, which is counted: bytes,
//! launches, submissions, bytes read back. [`Bench::read_speed`] is measured on the spot: the
//! share of it that a test uses says how much faster it could be, if it is bound by memory.
//!
//! Bytes are the least that the operations move: see [`Cost`].

mod cost;
mod measure;
mod observed;
mod observer;
mod plan;
mod profile;
mod spread;

pub use cost::Cost;
pub use measure::{Bench, Event, FirstToken, Line, PerToken};
pub(crate) use observed::Observed;
pub(crate) use observer::Observer;
pub use plan::{BenchOptions, Test, TestKind};
pub use profile::{Clock, Profile, ProfiledKernel, ProfiledOperation};
pub use spread::Spread;
