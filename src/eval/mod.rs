//! How well a model does under a policy, measured on texts.

mod calibration;
mod divergence;

pub use calibration::{Budget, Calibrated, CalibrationProgress, CalibrationText, calibrate};
pub use divergence::{Divergence, divergence, divergences};
