//! The method, free of any backend: which keys are exact, how the others are stored, and what that
//! costs in bytes and in error.
//!
//! Decoding a token reads every cached key and value once, so that memory traffic is what
//! attention costs there. DeltaLLM (<https://arxiv.org/abs/2507.19608>) needs no training to make
//! keys sparse: a key is stored as its difference from a reference, and of that difference only
//! the channels beyond a threshold `theta`. Two kinds of keys carry the accuracy and stay as they
//! are: the first ones, which all queries attend to (the *sink*), and the most recent (the
//! *window*).
//!
//! | file | what |
//! |---|---|
//! | `policy` | [`AttentionPolicy`]: every choice in one value |
//! | `policy_text` | the same printed whole, and read |
//! | `thresholds` | [`Thresholds`]: one for each layer and KV head in place of a policy's |
//! | `policy_file` | [`PolicyFile`]: both as a file |
//! | `window` | [`ExactRule`]: which keys a query sees exactly |
//! | `page` | [`PageLayout`], [`Page`]: the bits of a compressed page, the same on every device |
//! | `encode` | [`encode_page`]: keys to a page, the exact arithmetic that devices repeat |
//! | `values` | [`encode_value`], [`decode_value`]: values to bytes and back |
//! | `plain` | [`plain`]: the paper line by line in `f64`, which the pages are held against |
//! | `image` | [`CacheImage`]: a layer's cache as bytes, to be saved and restored |
//! | `statistics` | [`CacheStatistics`]: zeros, bits and bytes, counted from the pages |
//! | `analysis` | [`LayerTrace`]: what a policy does to keys and attention of a text, on the host |
//! | `calibrate` | [`allocate`]: thresholds for each head from what they cost it |
//!
//! # Pages
//!
//! Keys are compressed a *page* at a time: [`AttentionPolicy::page`] consecutive tokens of one
//! layer and KV head. A page is encoded once, when its last key is there, from the original keys:
//! decoding token by token and prefilling at once therefore give the same bits. It also means
//! that a query sees the keys of its own page exactly, whatever the window: see [`ExactRule`].

mod analysis;
mod calibrate;
mod encode;
mod image;
mod level;
mod originals;
mod page;
pub mod plain;
mod policy;
mod policy_file;
mod policy_text;
mod statistics;
mod thresholds;
mod values;
mod window;

pub use analysis::{CompressedHead, HeadAnalysis, LayerTrace};
pub use calibrate::{Curve, CurvePoint, allocate, reachable_zeros, uniform_theta};
pub use encode::encode_page;
pub use image::CacheImage;
pub use originals::Originals;
pub use page::{Page, PageLayout};
pub use policy::{
    AttentionPolicy, ChannelBits, DeltaFormat, DeltaKeys, KeyFormat, PrefillWindow, Reference,
    Threshold, ValueFormat, WindowShape,
};
pub use policy_file::{Calibration, Measured, PolicyFile};
pub use statistics::{CacheStatistics, PageStatistics, ThetaRange};
pub use thresholds::Thresholds;
pub use values::{decode_value, encode_value};
pub use window::{ExactRule, Phase, Window};
