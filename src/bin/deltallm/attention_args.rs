//! The options that choose an [`AttentionPolicy`], for every command that needs one.

use std::fmt::Display;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use deltallm::Error;
use deltallm::backend::CacheFormat;
use deltallm::checkpoint::ModelConfig;
use deltallm::delta::{
    AttentionPolicy, ChannelBits, DeltaFormat, DeltaKeys, KeyFormat, PolicyFile, Reference,
    Threshold, Thresholds, ValueFormat, WindowShape,
};

/// Every option of [`AttentionArgs`].
pub const OPTIONS: [&str; 14] = [
    "attention",
    "keys",
    "theta",
    "reference",
    "deltas",
    "values",
    "sink",
    "alpha",
    "window_shape",
    "window",
    "page",
    "cache",
    "policy",
    "policy_file",
];

/// How keys and values are kept, and which of them attention sees exactly.
///
/// Nothing that is given is ignored: an option that would have no effect is an error.
#[derive(Args)]
#[command(next_help_heading = "Attention")]
pub struct AttentionArgs {
    /// Where the other options start from: all keys as they are, delta attention as the measurements
    /// favour it, or with the paper's settings [default: dense]
    #[arg(long, value_enum, value_name = "PRESET")]
    attention: Option<Preset>,

    #[arg(long, value_enum, value_name = "FORMAT",
        help = default_help("How the keys of full pages are kept", |p| p.keys.name().to_owned()))]
    keys: Option<Keys>,

    #[arg(long, value_name = "X|Xsigma", allow_hyphen_values = true, help = delta_help(
        "Delta keys: keep differences beyond X, or beyond X standard deviations of a page's keys",
        |d| d.threshold.to_string()))]
    theta: Option<Threshold>,

    #[arg(long, value_enum, value_name = "KEY", help = delta_help(
        "Delta keys: differences from what", |d| d.reference.name().to_owned()))]
    reference: Option<References>,

    #[arg(long, value_enum, value_name = "FORMAT", help = delta_help(
        "Delta keys: number format of kept differences", |d| d.deltas.name().to_owned()))]
    deltas: Option<Deltas>,

    #[arg(long, value_enum, value_name = "FORMAT",
        help = default_help("How values are kept", |p| p.values.name().to_owned()))]
    values: Option<Values>,

    #[arg(long, value_name = "N", help = default_help(
        "Compressed keys: first tokens that every query sees exactly", |p| p.sink.to_string()))]
    sink: Option<usize>,

    #[arg(long, value_name = "A", allow_negative_numbers = true, help = default_help(
        "Compressed keys: share of a prompt that its queries see exactly as their window",
        |p| p.prefill.share.to_string()))]
    alpha: Option<f32>,

    #[arg(long, value_enum, value_name = "SHAPE", help = default_help(
        "Compressed keys: where the window of a prompt's query lies",
        |p| p.prefill.shape.name().to_owned()))]
    window_shape: Option<Shapes>,

    #[arg(long, value_name = "W", help = default_help(
        "Compressed keys: most recent tokens that decoding sees exactly, at least",
        |p| p.window.to_string()))]
    window: Option<usize>,

    #[arg(long, value_name = "C", help = default_help(
        "Compressed keys: tokens that are compressed together: 16, 32, 64 or 128",
        |p| p.page.to_string()))]
    page: Option<usize>,

    #[arg(long, value_enum, value_name = "FORMAT", help = default_help(
        "Format of keys and values that are not compressed", |p| p.exact.name().to_owned()))]
    cache: Option<Cache>,

    /// All of the above in one text, as --verbose and --json print it
    #[arg(long, value_name = "TEXT", conflicts_with_all = OPTIONS.into_iter().filter(|o| *o != "policy"))]
    policy: Option<String>,

    /// All of the above from a file, with a threshold for each layer and KV head, as `deltallm
    /// calibrate` writes it
    #[arg(long, value_name = "FILE", conflicts_with_all = OPTIONS.into_iter().filter(|o| *o != "policy_file"))]
    policy_file: Option<PathBuf>,
}

/// What the options say.
#[derive(Clone)]
pub struct Attention {
    pub policy: AttentionPolicy,
    /// Of each layer and KV head, in place of the policy's one.
    pub thresholds: Option<Thresholds>,
}

impl Attention {
    /// Refuses thresholds that are not of this model's shape. Sessions do it too: this is for what
    /// runs without one.
    pub fn check(&self, config: &ModelConfig) -> Result<(), Error> {
        match &self.thresholds {
            Some(thresholds) => {
                thresholds.check(&self.policy, config.layers, config.attention.kv_heads)
            }
            None => Ok(()),
        }
    }

    /// The policy of one KV head.
    pub fn of_head(&self, layer: usize, kv_head: usize) -> AttentionPolicy {
        let thresholds = self.thresholds.as_ref().and_then(|all| all.layer(layer));
        self.policy.with_theta(thresholds.and_then(|heads| heads.get(kv_head)).copied())
    }
}

/// Where the options start from.
#[derive(Clone, Copy, ValueEnum)]
enum Preset {
    Dense,
    Delta,
    Paper,
}

#[derive(Clone, Copy, ValueEnum)]
enum Keys {
    /// As they are
    Plain,
    /// 8 bits, one scale a token
    Int8,
    /// 4 bits, scale and minimum a channel
    Channel4,
    /// 2 bits, likewise
    Channel2,
    /// Thresholded differences
    Delta,
}

#[derive(Clone, Copy, ValueEnum)]
enum References {
    /// The key before, through the whole text (the paper's)
    Continuous,
    /// The key before, begun anew with each page
    Anchored,
    /// The mean of the page
    Mean,
}

#[derive(Clone, Copy, ValueEnum)]
enum Deltas {
    /// Half precision
    F16,
    /// 8 bits, one scale a channel
    Int8,
    /// 4 bits, one scale a channel
    Int4,
}

#[derive(Clone, Copy, ValueEnum)]
enum Values {
    /// As they are
    Plain,
    /// 8 bits, one scale a token
    Int8,
    /// 4 bits, scale and minimum a token
    Int4,
}

#[derive(Clone, Copy, ValueEnum)]
enum Shapes {
    /// From the start of the query's own block on (the paper's)
    Block,
    /// The tokens just before the query
    Sliding,
}

#[derive(Clone, Copy, ValueEnum)]
enum Cache {
    /// Half precision
    F16,
    /// 32 bits, for comparing with other engines
    F32,
}

impl AttentionArgs {
    /// The same where a text is run as one prompt, and nothing decoded.
    pub fn prompt_policy(&self) -> Result<Attention, Error> {
        if let Some(window) = self.window {
            let allowed =
                "has no effect here: it is the window of decoding, and nothing is decoded";
            return Err(refused("window", window.to_string(), allowed));
        }
        self.policy()
    }

    /// What the options say.
    pub fn policy(&self) -> Result<Attention, Error> {
        self.policy_from(AttentionPolicy::dense())
    }

    /// The same where delta attention is the default: for what compresses keys in any case.
    pub fn delta_policy(&self) -> Result<Attention, Error> {
        self.policy_from(AttentionPolicy::delta())
    }

    fn policy_from(&self, default: AttentionPolicy) -> Result<Attention, Error> {
        if let Some(path) = &self.policy_file {
            let PolicyFile { policy, thresholds, .. } = PolicyFile::read(path)?;
            return Ok(Attention { policy, thresholds });
        }
        let policy = match &self.policy {
            Some(text) => text.parse()?,
            None => self.policy_of_options(default)?,
        };
        Ok(Attention { policy, thresholds: None })
    }

    fn policy_of_options(&self, default: AttentionPolicy) -> Result<AttentionPolicy, Error> {
        let mut policy = match self.attention {
            None => default,
            Some(Preset::Dense) => AttentionPolicy::dense(),
            Some(Preset::Delta) => AttentionPolicy::delta(),
            Some(Preset::Paper) => AttentionPolicy::paper(),
        };
        match (self.attention, self.keys) {
            (_, None) => {}
            (Some(Preset::Dense), Some(keys)) if !matches!(keys, Keys::Plain) => {
                let allowed = "--attention dense keeps keys plain: leave it out";
                return Err(refused("keys", self.key_format(&policy, keys).name(), allowed));
            }
            (Some(Preset::Delta | Preset::Paper), Some(Keys::Plain)) => {
                let allowed = "contradicts --attention delta and paper: use --attention dense";
                return Err(refused("keys", "plain", allowed));
            }
            (_, Some(keys)) => policy.keys = self.key_format(&policy, keys),
        }
        self.set_deltas(&mut policy)?;
        self.set_windows(&mut policy)?;
        if let Some(values) = self.values {
            policy.values = match values {
                Values::Plain => ValueFormat::Plain,
                Values::Int8 => ValueFormat::Int8,
                Values::Int4 => ValueFormat::Int4,
            };
        }
        if let Some(cache) = self.cache {
            policy.exact = match cache {
                Cache::F16 => CacheFormat::F16,
                Cache::F32 => CacheFormat::F32,
            };
        }
        policy.check()?;
        Ok(policy)
    }

    fn key_format(&self, policy: &AttentionPolicy, keys: Keys) -> KeyFormat {
        match (keys, policy.keys) {
            (Keys::Plain, _) => KeyFormat::Plain,
            (Keys::Int8, _) => KeyFormat::Int8,
            (Keys::Channel4, _) => KeyFormat::Channel(ChannelBits::Four),
            (Keys::Channel2, _) => KeyFormat::Channel(ChannelBits::Two),
            // A preset with delta keys has its own.
            (Keys::Delta, delta @ KeyFormat::Delta(_)) => delta,
            (Keys::Delta, _) => AttentionPolicy::delta().keys,
        }
    }

    fn set_deltas(&self, policy: &mut AttentionPolicy) -> Result<(), Error> {
        let reference = self.reference.map(|reference| match reference {
            References::Continuous => Reference::Continuous,
            References::Anchored => Reference::Anchored,
            References::Mean => Reference::Mean,
        });
        let deltas = self.deltas.map(|deltas| match deltas {
            Deltas::F16 => DeltaFormat::F16,
            Deltas::Int8 => DeltaFormat::Int8,
            Deltas::Int4 => DeltaFormat::Int4,
        });
        let KeyFormat::Delta(delta) = &mut policy.keys else {
            let given = [
                self.theta.map(|theta| ("theta", theta.to_string())),
                reference.map(|reference| ("reference", reference.name().to_owned())),
                deltas.map(|deltas| ("deltas", deltas.name().to_owned())),
            ];
            return match given.into_iter().flatten().next() {
                None => Ok(()),
                Some((name, value)) => {
                    let allowed = match self.keys {
                        Some(_) => {
                            format!("needs delta keys, but --keys is {}", policy.keys.name())
                        }
                        None => "needs delta keys: add --attention delta, --attention paper or \
                                 --keys delta"
                            .to_owned(),
                    };
                    Err(refused(name, value, &allowed))
                }
            };
        };
        delta.threshold = self.theta.unwrap_or(delta.threshold);
        delta.reference = reference.unwrap_or(delta.reference);
        delta.deltas = deltas.unwrap_or(delta.deltas);
        Ok(())
    }

    fn set_windows(&self, policy: &mut AttentionPolicy) -> Result<(), Error> {
        let shape = self.window_shape.map(|shape| match shape {
            Shapes::Block => WindowShape::Block,
            Shapes::Sliding => WindowShape::Sliding,
        });
        if policy.is_dense() {
            let given = [
                self.sink.map(|n| ("sink", n.to_string())),
                self.alpha.map(|share| ("alpha", share.to_string())),
                shape.map(|shape| ("window-shape", shape.name().to_owned())),
                self.window.map(|n| ("window", n.to_string())),
                self.page.map(|n| ("page", n.to_string())),
            ];
            if let Some((name, value)) = given.into_iter().flatten().next() {
                let allowed = "needs compressed keys: add --attention delta, --attention paper or \
                               --keys with a format";
                return Err(refused(name, value, allowed));
            }
        }
        policy.sink = self.sink.unwrap_or(policy.sink);
        policy.prefill.share = self.alpha.unwrap_or(policy.prefill.share);
        policy.prefill.shape = shape.unwrap_or(policy.prefill.shape);
        policy.window = self.window.unwrap_or(policy.window);
        policy.page = self.page.unwrap_or(policy.page);
        Ok(())
    }
}

fn refused(name: &'static str, value: impl Into<String>, allowed: &str) -> Error {
    Error::Parameter { name, value: value.into(), allowed: allowed.to_owned() }
}

/// A help text with the default of each preset where they differ.
fn default_help(text: &str, field: impl Fn(&AttentionPolicy) -> String) -> String {
    let dense = field(&AttentionPolicy::dense());
    let delta = field(&AttentionPolicy::delta());
    let paper = field(&AttentionPolicy::paper());
    let mut defaults = dense.clone();
    for (name, preset) in [("delta", delta), ("paper", paper)] {
        if preset != dense {
            defaults += &format!(", {preset} with --attention {name}");
        }
    }
    with_default(text, defaults)
}

/// The same for a field of delta keys.
fn delta_help(text: &str, field: impl Fn(&DeltaKeys) -> String) -> String {
    let of = |policy: AttentionPolicy| match policy.keys {
        KeyFormat::Delta(delta) => field(&delta),
        _ => String::new(),
    };
    let (delta, paper) = (of(AttentionPolicy::delta()), of(AttentionPolicy::paper()));
    with_default(text, format!("{delta}, {paper} with --attention paper"))
}

fn with_default(text: &str, defaults: impl Display) -> String {
    format!("{text} [default: {defaults}]")
}
