//! How good a model is at tasks, what a policy costs of that, and which thresholds cost least.
//!
//! A [`Task`] is a file of rows: texts (perplexity), choices, questions with answers in a text, and
//! passkeys. [`Prepared`] makes tokens of a row, [`Scorer`] runs it with several policies side by
//! side, and [`Summary`] has the figures with their standard errors. [`divergence`] is how far a
//! policy moves what a model expects of a text; [`calibrate`] finds thresholds within a budget.

mod calibration;
mod divergence;
mod estimate;
mod formats;
mod lockstep;
mod passkey;
mod prepare;
mod rows;
mod score;
pub mod squad;
mod summary;

pub use calibration::{Budget, Calibrated, CalibrationProgress, CalibrationText, calibrate};
pub use divergence::{Divergence, divergence, divergences};
pub use estimate::Estimate;
pub use passkey::PasskeyOptions;
pub use prepare::{Part, PrepareOptions, Prepared};
pub use rows::{Content, Row, Task, TaskKind};
pub use score::{Candidate, KeyCounts, Outcome, Score, Scorer, Stage};
pub use summary::{Metric, Summary};
