//! `config.json` and `generation_config.json`: which architecture, and every number of it.

use serde_json::Value;

use super::files::Files;
use super::json::Object;
use crate::error::Result;
use crate::formats::{Activation, AttentionShape};
use crate::sampler::Sampling;

/// The decoder families that the forward pass knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `BitNetForCausalLM`: Llama with ternary linears, 8-bit activations, sub-norms and relu^2.
    BitNet,
}

impl Architecture {
    /// The name in transformers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::BitNet => "BitNetForCausalLM",
        }
    }
}

/// How a BitNet checkpoint stores the matrices of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ternary {
    /// Packed trits, the product multiplied by `weight_scale` (`linear_class: autobitlinear`).
    PackedMultiply,
    /// Packed trits, the product divided by `weight_scale` (`linear_class: bitlinear`).
    PackedDivide,
    /// Float master weights, to be ternarised at load (`quantization_mode: online`).
    Master,
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f64,
    /// Llama 3's stretching of the low frequencies.
    pub scaling: Option<Llama3Scaling>,
}

/// `rope_type: llama3`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// What the low frequencies are divided by.
    pub factor: f64,
    /// Wavelengths above `original_context / low_freq_factor` are stretched in full.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_context / high_freq_factor` stay as they are.
    pub high_freq_factor: f64,
    /// Context length before stretching.
    pub original_context: f64,
}

impl RopeConfig {
    /// Frequencies in radians a token, `[head_dim / 2]`: `theta^(-2 i / D)`, stretched by
    /// [`Llama3Scaling`] as transformers' `_compute_llama3_parameters` does.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let frequency = |i: usize| {
            let plain = self.theta.powf(-2.0 * i as f64 / head_dim as f64);
            let Some(s) = self.scaling else { return plain as f32 };
            let wavelength = 2.0 * std::f64::consts::PI / plain;
            let scaled = if wavelength < s.original_context / s.high_freq_factor {
                plain
            } else if wavelength > s.original_context / s.low_freq_factor {
                plain / s.factor
            } else {
                let smooth = (s.original_context / wavelength - s.low_freq_factor)
                    / (s.high_freq_factor - s.low_freq_factor);
                (1.0 - smooth) * plain / s.factor + smooth * plain
            };
            scaled as f32
        };
        (0..head_dim / 2).map(frequency).collect()
    }

    /// (cosine, sine) of every position and pair, `[positions, head_dim / 2]`.
    ///
    /// Made on the host: GPUs may compute sines of large angles with an error of 2^-11 and more.
    pub fn table(&self, positions: usize, head_dim: usize) -> Vec<[f32; 2]> {
        let frequencies = self.frequencies(head_dim);
        let row = |position: usize| {
            frequencies.iter().map(move |f| {
                let angle = position as f32 * f;
                [angle.cos(), angle.sin()]
            })
        };
        (0..positions).flat_map(row).collect()
    }
}

/// Everything that `config.json` says about a model, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The decoder family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width between gate and down projection.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Heads and their size.
    pub attention: AttentionShape,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Epsilon of every RMSNorm.
    pub norm_eps: f32,
    /// Activation of the gate.
    pub activation: Activation,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Longest context that the model was trained for, in tokens.
    pub context: usize,
    /// Whether the head is the embedding; `None` where the file does not say.
    pub tied_head: Option<bool>,
    /// Storage of ternary matrices; `None` for Llama.
    pub ternary: Option<Ternary>,
    /// Tokens that end a text: those of `generation_config.json`, else those of `config.json`.
    pub eos: Vec<u32>,
    /// How `generation_config.json` recommends to choose tokens; greedily where it does not say.
    pub sampling: Sampling,
}

impl ModelConfig {
    /// Reads the configuration of a checkpoint.
    ///
    /// # Errors
    /// Names the file and field that is missing, malformed or not supported.
    pub(super) fn read(files: &Files) -> Result<Self> {
        let config = Object::read(files, "config.json")?;
        let generation = Object::read_optional(files, "generation_config.json")?;
        let mut parsed = Self::parse(&config)?;
        parsed.eos = config.token_ids("eos_token_id")?;
        if let Some(generation) = generation {
            let eos = generation.token_ids("eos_token_id")?;
            if !eos.is_empty() {
                parsed.eos = eos;
            }
            parsed.sampling = recommended(&generation);
        }
        Ok(parsed)
    }

    /// Weights of the model: those that the forward pass multiplies or adds, norms and embedding
    /// included; scales of ternary matrices are not counted.
    pub fn parameters(&self) -> u64 {
        // Of a configuration that lies, the number may be beyond 64 bits.
        let (hidden, wide) = (self.hidden as u128, self.intermediate as u128);
        let (q, kv) = (self.attention.width() as u128, self.attention.kv_width() as u128);
        let sub_norms = match self.architecture {
            Architecture::Llama => 0,
            Architecture::BitNet => hidden + wide,
        };
        let layer = hidden * (2 * q + 2 * kv + 3 * wide) + 2 * hidden + sub_norms;
        let tables = if self.tied_head == Some(true) { 1 } else { 2 };
        let all = self.layers as u128 * layer + hidden + tables * hidden * self.vocabulary as u128;
        u64::try_from(all).unwrap_or(u64::MAX)
    }

    fn parse(config: &Object) -> Result<Self> {
        let architecture = architecture(config)?;
        refuse_unknown_variants(config)?;
        let count = |field| config.required(field, config.count(field)?);

        let hidden = count("hidden_size")?;
        let intermediate = count("intermediate_size")?;
        let attention = attention(config, architecture, hidden)?;
        let (activation, default_theta) = match architecture {
            Architecture::Llama => (Activation::Silu, 1e4),
            Architecture::BitNet => (Activation::Relu2, 5e5),
        };
        let expected = match activation {
            Activation::Silu => "silu",
            Activation::Relu2 => "relu2",
        };
        let norm_eps = config.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32;
        if !norm_eps.is_normal() {
            return Err(config.error("rms_norm_eps", format!("is {norm_eps} as an f32")));
        }
        let rope = rope(config, default_theta)?;
        let context = config.count("max_position_embeddings")?.unwrap_or(2048);
        check_angles(config, &rope, attention.head_dim, context)?;
        let found = config.text("hidden_act")?.unwrap_or(expected);
        if found != expected {
            return Err(config.unsupported(format!("hidden_act {found:?}"), expected));
        }
        Ok(Self {
            architecture,
            hidden,
            intermediate,
            layers: count("num_hidden_layers")?,
            attention,
            vocabulary: count("vocab_size")?,
            norm_eps,
            activation,
            rope,
            context,
            tied_head: config.flag("tie_word_embeddings")?,
            ternary: ternary(config, architecture)?,
            eos: Vec::new(),
            sampling: Sampling::default(),
        })
    }
}

fn architecture(config: &Object) -> Result<Architecture> {
    let first = config.get("architectures").and_then(|list| list.get(0)?.as_str());
    let name = match (config.text("model_type")?, first) {
        (Some(name), _) | (None, Some(name)) => name,
        (None, None) => return Err(config.error("model_type", "is missing")),
    };
    match name {
        "llama" | "LlamaForCausalLM" => Ok(Architecture::Llama),
        "bitnet" | "BitNetForCausalLM" => Ok(Architecture::BitNet),
        other => Err(config.unsupported(format!("architecture {other:?}"), "llama and bitnet are")),
    }
}

/// Switches that change the arithmetic and that no supported model sets: an unread one would give
/// silently wrong text.
fn refuse_unknown_variants(config: &Object) -> Result<()> {
    for field in ["attention_bias", "mlp_bias"] {
        if config.flag(field)? == Some(true) {
            return Err(config.unsupported(format!("{field} = true"), "linears without bias are"));
        }
    }
    if let Some(factor) = config.positive("partial_rotary_factor")?
        && factor != 1.0
    {
        let what = format!("partial_rotary_factor = {factor}");
        return Err(config.unsupported(what, "1 is"));
    }
    Ok(())
}

fn attention(config: &Object, arch: Architecture, hidden: usize) -> Result<AttentionShape> {
    let field = "num_attention_heads";
    let heads = config.required(field, config.count(field)?)?;
    let kv_heads = config.count("num_key_value_heads")?.unwrap_or(heads);
    if heads % kv_heads != 0 {
        let message = format!("is {kv_heads}, which does not divide {field} = {heads}");
        return Err(config.error("num_key_value_heads", message));
    }
    let head_dim = match config.count("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let message = format!("is {heads}, which does not divide hidden_size = {hidden}");
            return Err(config.error(field, message));
        }
    };
    if head_dim % 2 != 0 {
        return Err(config.error("head_dim", format!("is {head_dim}, which is odd")));
    }
    if heads.saturating_mul(head_dim) > 1 << 31 {
        let message = format!("is {head_dim}, times {heads} heads: beyond 2^31");
        return Err(config.error("head_dim", message));
    }
    // attn_sub_norm has hidden_size weights but runs over the heads.
    if arch == Architecture::BitNet && heads * head_dim != hidden {
        let message = format!("is {head_dim}: BitNet needs heads * head_dim = hidden_size");
        return Err(config.error("head_dim", message));
    }
    Ok(AttentionShape { heads, kv_heads, head_dim })
}

/// The sampling that `generation_config.json` recommends. What it leaves out is as in transformers:
/// 50 candidates, temperature 1. It is advice: what cannot be used is no reason to refuse a model.
fn recommended(generation: &Object) -> Sampling {
    let number = |field| generation.get(field).and_then(Value::as_f64).map(|x| x as f32);
    let repetition_penalty = number("repetition_penalty").unwrap_or(1.0);
    let mut sampling = Sampling { repetition_penalty, ..Sampling::default() };
    if generation.get("do_sample").and_then(Value::as_bool) == Some(true) {
        sampling.temperature = number("temperature").unwrap_or(1.0);
        sampling.top_k = generation.get("top_k").and_then(Value::as_u64).unwrap_or(50) as usize;
        sampling.top_p = number("top_p").unwrap_or(1.0);
        sampling.min_p = number("min_p").unwrap_or(0.0);
    }
    match sampling.check() {
        Ok(()) => sampling,
        Err(error) => {
            log::warn!("generation_config.json recommends {error}; tokens are chosen greedily");
            Sampling::default()
        }
    }
}

/// Both spellings: `rope_theta` beside `rope_scaling`, and `rope_parameters` with all of it.
fn rope(config: &Object, default_theta: f64) -> Result<RopeConfig> {
    let settings = match config.object("rope_parameters")? {
        Some(settings) => Some(settings),
        None => config.object("rope_scaling")?,
    };
    let outer_theta = config.positive("rope_theta")?;
    let Some(settings) = settings else {
        return Ok(RopeConfig { theta: outer_theta.unwrap_or(default_theta), scaling: None });
    };
    let theta = settings.positive("rope_theta")?.or(outer_theta).unwrap_or(default_theta);
    if let Some(factor) = settings.positive("partial_rotary_factor")?
        && factor != 1.0
    {
        let what = format!("partial_rotary_factor = {factor}");
        return Err(settings.unsupported(what, "1 is"));
    }
    let kind = match settings.text("rope_type")? {
        Some(kind) => kind,
        None => settings.text("type")?.unwrap_or("default"),
    };
    let scaling = match kind {
        "default" => None,
        "llama3" => Some(llama3(config, &settings)?),
        other => {
            let what = format!("rope type {other:?}");
            return Err(settings.unsupported(what, "default and llama3 are"));
        }
    };
    Ok(RopeConfig { theta, scaling })
}

/// Refuses numbers of which no angles come: a NaN that a GPU works with may become anything.
fn check_angles(config: &Object, rope: &RopeConfig, head_dim: usize, context: usize) -> Result<()> {
    // Frequencies fall or rise with the channel, but for a head of very many, whose weights no file
    // has, all of them are too much to look at.
    let pairs = (head_dim / 2).min(1 << 16);
    let widest = context as f32;
    let bad = |f: &f32| !(f * widest).is_finite();
    match rope.frequencies(2 * pairs).into_iter().find(bad) {
        None => Ok(()),
        Some(frequency) => Err(config.error(
            "rope_theta",
            format!("and its scaling give {frequency} radians a token, over {context} tokens"),
        )),
    }
}

fn llama3(config: &Object, settings: &Object) -> Result<Llama3Scaling> {
    let number = |field| settings.required(field, settings.positive(field)?);
    let original = "original_max_position_embeddings";
    let original_context = match settings.positive(original)? {
        Some(tokens) => tokens,
        None => settings.required(original, config.positive(original)?)?,
    };
    let scaling = Llama3Scaling {
        factor: number("factor")?,
        low_freq_factor: number("low_freq_factor")?,
        high_freq_factor: number("high_freq_factor")?,
        original_context,
    };
    if scaling.high_freq_factor <= scaling.low_freq_factor {
        let message = format!("must be above low_freq_factor = {}", scaling.low_freq_factor);
        return Err(settings.error("high_freq_factor", message));
    }
    Ok(scaling)
}

fn ternary(config: &Object, architecture: Architecture) -> Result<Option<Ternary>> {
    let quantization = config.object("quantization_config")?;
    match (architecture, quantization) {
        (Architecture::Llama, None) => Ok(None),
        (Architecture::Llama, Some(quantization)) => {
            let method = quantization.text("quant_method")?.unwrap_or("unnamed");
            let what = format!("quantization {method:?} of a Llama model");
            Err(config.unsupported(
                what,
                "f32, f16 and bf16 weights are; --weights makes 8 or 4 bits of them",
            ))
        }
        (Architecture::BitNet, None) => Err(config.unsupported(
            "a bitnet model without quantization_config",
            "transformers runs it as a dense float model, which gives garbage for trained \
             weights; where they are ternary master weights, add \"quantization_config\": \
             {\"quant_method\": \"bitnet\", \"linear_class\": \"autobitlinear\", \
             \"quantization_mode\": \"online\"}",
        )),
        (Architecture::BitNet, Some(quantization)) => bitnet(&quantization).map(Some),
    }
}

fn bitnet(quantization: &Object) -> Result<Ternary> {
    let text = |field, default| Ok::<_, crate::Error>(quantization.text(field)?.unwrap_or(default));
    let method = text("quant_method", "bitnet")?;
    if method != "bitnet" {
        return Err(quantization.unsupported(format!("quantization {method:?}"), "bitnet is"));
    }
    if quantization.flag("use_rms_norm")? == Some(true) {
        return Err(quantization.unsupported("use_rms_norm = true", "false is"));
    }
    let kept = quantization.get("modules_to_not_convert").and_then(|list| list.as_array());
    if let Some(module) = kept.into_iter().flatten().find(|module| *module != "lm_head") {
        let what = format!("modules_to_not_convert with {module}");
        return Err(quantization.unsupported(what, "only \"lm_head\" is"));
    }
    match (text("quantization_mode", "offline")?, text("linear_class", "bitlinear")?) {
        ("online", "autobitlinear") => Ok(Ternary::Master),
        // transformers' other class reads packed trits whatever the mode says.
        ("online", class) => Err(quantization.unsupported(
            format!("quantization_mode \"online\" with linear_class {class:?}"),
            "\"autobitlinear\" is",
        )),
        ("offline", "autobitlinear") => Ok(Ternary::PackedMultiply),
        ("offline", "bitlinear") => Ok(Ternary::PackedDivide),
        ("offline", class) => Err(quantization
            .unsupported(format!("linear_class {class:?}"), "bitlinear and autobitlinear are")),
        (mode, _) => Err(quantization
            .unsupported(format!("quantization_mode {mode:?}"), "offline and online are")),
    }
}
