//! Checkpoints with random weights, in the exact layout of real ones.
//!
//! They serve where real weights cannot: to measure speed and memory at full size, and to test odd
//! shapes. Their text is noise.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use safetensors::{Dtype, View};
use serde_json::{Map, Value, json};

use super::config::{Architecture, Llama3Scaling, ModelConfig, RopeConfig, Ternary};
use super::matrix::{Bytes, FloatType};
use crate::error::{Error, Result};
use crate::formats::{Activation, AttentionShape};
use crate::sampler::Sampling;

/// A checkpoint to be made.
#[derive(Clone, Debug)]
pub struct Synthetic {
    /// Its shape.
    pub config: ModelConfig,
    /// The format of float tensors.
    pub float: FloatType,
    /// The same seed gives the same file.
    pub seed: u64,
}

impl Synthetic {
    /// The names that [`Synthetic::named`] knows.
    pub const NAMES: [&str; 4] = ["tiny", "bitnet-2b", "bitnet-2b-master", "llama-1b"];

    /// A known shape: `tiny` (a BitNet of 3 M parameters), `bitnet-2b` (BitNet-b1.58-2B-4T, packed),
    /// `bitnet-2b-master` (the same as bf16 master weights) or `llama-1b` (Llama-3.2-1B-Instruct).
    pub fn named(name: &str) -> Option<Self> {
        let bitnet_2b = || bitnet(2560, 6912, 30, (20, 5, 128), 128_256, 4096);
        let config = match name {
            "tiny" => bitnet(256, 640, 4, (4, 2, 64), 2048, 2048),
            "bitnet-2b" => bitnet_2b(),
            "bitnet-2b-master" => ModelConfig { ternary: Some(Ternary::Master), ..bitnet_2b() },
            "llama-1b" => llama_1b(),
            _ => return None,
        };
        Some(Self { config, float: FloatType::BF16, seed: 0 })
    }

    /// Writes `config.json`, `generation_config.json`, `tokenizer.json` and `model.safetensors`
    /// into `dir`, which is made if need be.
    ///
    /// The largest tensor is held in memory while it is written.
    ///
    /// # Errors
    /// A directory or file that cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let write_json = |name: &str, value: &Value| {
            let path = dir.join(name);
            fs::write(&path, format!("{value:#}\n")).map_err(Error::io(&path))
        };
        write_json("config.json", &self.config_json())?;
        write_json("generation_config.json", &json!({ "eos_token_id": self.config.eos }))?;
        write_json("tokenizer.json", &tokenizer_json(self.config.vocabulary))?;
        let path = dir.join("model.safetensors");
        safetensors::serialize_to_file(self.tensors(), None, &path).map_err(|error| {
            Error::Malformed { path: path.clone(), message: format!("cannot be written: {error}") }
        })
    }

    /// The same files in memory, as [`Checkpoint::from_memory`](super::Checkpoint::from_memory) takes
    /// them: all weights, and while they are made the largest tensor once more.
    ///
    /// # Errors
    /// A shape that no file can have.
    pub fn files(&self) -> Result<Vec<(String, Bytes)>> {
        let text = |value: Value| Bytes::from(value.to_string().into_bytes());
        let weights = safetensors::serialize(self.tensors(), None).map_err(|error| {
            let message = format!("cannot be made: {error}");
            Error::Malformed { path: "model.safetensors".into(), message }
        })?;
        Ok(vec![
            ("config.json".to_owned(), text(self.config_json())),
            ("generation_config.json".to_owned(), text(json!({ "eos_token_id": self.config.eos }))),
            ("tokenizer.json".to_owned(), text(tokenizer_json(self.config.vocabulary))),
            ("model.safetensors".to_owned(), Bytes::from(weights)),
        ])
    }

    fn config_json(&self) -> Value {
        let c = &self.config;
        let mut config = json!({
            "architectures": [c.architecture.name()],
            "hidden_size": c.hidden,
            "intermediate_size": c.intermediate,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.attention.heads,
            "num_key_value_heads": c.attention.kv_heads,
            "vocab_size": c.vocabulary,
            "rms_norm_eps": f64::from(c.norm_eps),
            "rope_theta": c.rope.theta,
            "max_position_embeddings": c.context,
            "tie_word_embeddings": c.tied_head.unwrap_or(true),
            "eos_token_id": c.eos,
        });
        let (model_type, act) = match c.architecture {
            Architecture::Llama => ("llama", "silu"),
            Architecture::BitNet => ("bitnet", "relu2"),
        };
        config["model_type"] = json!(model_type);
        config["hidden_act"] = json!(act);
        if c.architecture == Architecture::Llama {
            config["head_dim"] = json!(c.attention.head_dim);
        }
        if let Some(s) = c.rope.scaling {
            config["rope_scaling"] = json!({
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_context,
            });
        }
        if let Some(storage) = c.ternary {
            let (mode, class) = match storage {
                Ternary::PackedMultiply => ("offline", "autobitlinear"),
                Ternary::PackedDivide => ("offline", "bitlinear"),
                Ternary::Master => ("online", "autobitlinear"),
            };
            config["quantization_config"] = json!({
                "quant_method": "bitnet", "quantization_mode": mode, "linear_class": class,
            });
        }
        config
    }

    /// Every tensor with its name; the numbers are made when the writer asks for them.
    fn tensors(&self) -> Vec<(String, RandomTensor)> {
        let ModelConfig { hidden, intermediate, attention, vocabulary, .. } = self.config;
        let (q, kv) = (attention.width(), attention.kv_width());
        let mut list = TensorList { of: self, tensors: Vec::new() };

        // With a residual stream of norm 1 an element, logits get a standard deviation of 3.
        let vocabulary_std = 3.0 / (hidden as f32).sqrt();
        list.float("model.embed_tokens.weight", &[vocabulary, hidden], vocabulary_std);
        for index in 0..self.config.layers {
            let name = |part: &str| format!("model.layers.{index}.{part}");
            list.ones(&name("input_layernorm.weight"), hidden);
            list.matrix(&name("self_attn.q_proj"), q, hidden);
            list.matrix(&name("self_attn.k_proj"), kv, hidden);
            list.matrix(&name("self_attn.v_proj"), kv, hidden);
            list.matrix(&name("self_attn.o_proj"), hidden, q);
            list.ones(&name("post_attention_layernorm.weight"), hidden);
            list.matrix(&name("mlp.gate_proj"), intermediate, hidden);
            list.matrix(&name("mlp.up_proj"), intermediate, hidden);
            list.matrix(&name("mlp.down_proj"), hidden, intermediate);
            if self.config.ternary.is_some() {
                list.ones(&name("self_attn.attn_sub_norm.weight"), q);
                list.ones(&name("mlp.ffn_sub_norm.weight"), intermediate);
            }
        }
        list.ones("model.norm.weight", hidden);
        if self.config.tied_head == Some(false) {
            list.float("lm_head.weight", &[vocabulary, hidden], vocabulary_std);
        }
        list.tensors
    }
}

fn bitnet(
    hidden: usize,
    intermediate: usize,
    layers: usize,
    (heads, kv_heads, head_dim): (usize, usize, usize),
    vocabulary: usize,
    context: usize,
) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::BitNet,
        hidden,
        intermediate,
        layers,
        attention: AttentionShape { heads, kv_heads, head_dim },
        vocabulary,
        norm_eps: 1e-5,
        activation: Activation::Relu2,
        rope: RopeConfig { theta: 5e5, scaling: None },
        context,
        tied_head: Some(true),
        ternary: Some(Ternary::PackedMultiply),
        eos: vec![vocabulary as u32 - 1],
        sampling: Sampling::default(),
    }
}

fn llama_1b() -> ModelConfig {
    let scaling = Llama3Scaling {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192.0,
    };
    ModelConfig {
        architecture: Architecture::Llama,
        activation: Activation::Silu,
        rope: RopeConfig { theta: 5e5, scaling: Some(scaling) },
        ternary: None,
        ..bitnet(2048, 8192, 16, (32, 8, 64), 128_256, 131_072)
    }
}

struct TensorList<'a> {
    of: &'a Synthetic,
    tensors: Vec<(String, RandomTensor)>,
}

impl TensorList<'_> {
    fn push(&mut self, name: &str, shape: &[usize], content: Content) {
        let seed = self.of.seed ^ (self.tensors.len() as u64 + 1).wrapping_mul(0x9e37_79b9);
        let tensor = RandomTensor { shape: shape.to_vec(), content, seed };
        self.tensors.push((name.to_owned(), tensor));
    }

    fn float(&mut self, name: &str, shape: &[usize], std: f32) {
        self.push(name, shape, Content::Float(self.of.float, std));
    }

    fn ones(&mut self, name: &str, width: usize) {
        self.push(name, &[width], Content::Constant(self.of.float, 1.0));
    }

    /// A matrix of the body, whose output has the variance of its input.
    fn matrix(&mut self, name: &str, rows: usize, cols: usize) {
        let weight = format!("{name}.weight");
        let std = 1.0 / (cols as f32).sqrt();
        // A trit that is -1, 0 and +1 equally often has a variance of 2/3.
        let scale = std / (2.0f32 / 3.0).sqrt();
        match self.of.config.ternary {
            None | Some(Ternary::Master) => self.float(&weight, &[rows, cols], std),
            Some(storage) => {
                let stored = if storage == Ternary::PackedDivide { 1.0 / scale } else { scale };
                self.push(&weight, &[rows / 4, cols], Content::Trits);
                let name = format!("{name}.weight_scale");
                self.push(&name, &[1], Content::Constant(self.of.float, stored));
            }
        }
    }
}

enum Content {
    /// Uniform numbers of this standard deviation.
    Float(FloatType, f32),
    Constant(FloatType, f32),
    /// Four trits a byte, equally likely.
    Trits,
}

struct RandomTensor {
    shape: Vec<usize>,
    content: Content,
    seed: u64,
}

impl RandomTensor {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl View for RandomTensor {
    fn dtype(&self) -> Dtype {
        match self.content {
            Content::Trits => Dtype::U8,
            Content::Float(float, _) | Content::Constant(float, _) => match float {
                FloatType::F32 => Dtype::F32,
                FloatType::F16 => Dtype::F16,
                FloatType::BF16 => Dtype::BF16,
            },
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bits = RandomBits { state: self.seed, word: 0, left: 0 };
        let mut out = Vec::with_capacity(self.data_len());
        match self.content {
            Content::Trits => {
                // 81 bytes stand for the 81 ways of four trits, as evenly as a byte can.
                let packed: [u8; 81] = std::array::from_fn(|n| {
                    let digit = |place: usize| (n / 3usize.pow(place as u32) % 3) as u8;
                    digit(0) | digit(1) << 2 | digit(2) << 4 | digit(3) << 6
                });
                out.extend(
                    (0..self.elements()).map(|_| packed[(usize::from(bits.next()) * 81) >> 16]),
                );
            }
            Content::Constant(float, value) => {
                (0..self.elements()).for_each(|_| push_float(&mut out, float, value));
            }
            Content::Float(float, std) => {
                // A uniform number in [-1, 1] has a variance of 1/3.
                let scale = std * 3.0f32.sqrt() / 32768.0;
                for _ in 0..self.elements() {
                    let value = (f32::from(bits.next()) - 32767.5) * scale;
                    push_float(&mut out, float, value);
                }
            }
        }
        Cow::Owned(out)
    }

    fn data_len(&self) -> usize {
        let bytes = match self.content {
            Content::Trits => 1,
            Content::Float(float, _) | Content::Constant(float, _) => float.bytes(),
        };
        self.elements() * bytes
    }
}

fn push_float(out: &mut Vec<u8>, float: FloatType, value: f32) {
    match float {
        FloatType::F32 => out.extend_from_slice(&value.to_le_bytes()),
        FloatType::F16 => out.extend_from_slice(&f16::from_f32(value).to_le_bytes()),
        FloatType::BF16 => out.extend_from_slice(&bf16::from_f32(value).to_le_bytes()),
    }
}

/// Sixteen random bits at a time, four from each step of SplitMix64.
struct RandomBits {
    state: u64,
    word: u64,
    left: u32,
}

impl RandomBits {
    fn next(&mut self) -> u16 {
        if self.left == 0 {
            self.word = crate::sampler::splitmix64(&mut self.state);
            self.left = 4;
        }
        self.left -= 1;
        let bits = self.word as u16;
        self.word >>= 16;
        bits
    }
}

/// A byte-level tokenizer without merges: text becomes bytes. The rest of the vocabulary are
/// made-up words, so that noise can be read; the last two entries begin and end a text.
fn tokenizer_json(vocabulary: usize) -> Value {
    let mut vocab = Map::new();
    let words = vocabulary.saturating_sub(2);
    for (id, byte) in byte_alphabet().into_iter().enumerate().take(words) {
        vocab.insert(byte.to_string(), json!(id));
    }
    for id in 256..words {
        vocab.insert(word(id - 256), json!(id));
    }
    let special = |id: usize, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true })
    };
    let bos = "<|begin_of_text|>";
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(words, bos), special(words + 1, "<|end_of_text|>")],
        "normalizer": null,
        "pre_tokenizer":
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
              "use_regex": true },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": bos, "type_id": 0 } },
                       { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } },
                     { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { bos: { "id": bos, "ids": [words], "tokens": [bos] } },
        },
        "decoder":
            { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
              "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null,
                   "continuing_subword_prefix": null, "end_of_word_suffix": null,
                   "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                   "vocab": vocab, "merges": [] },
    })
}

/// The characters that stand for the bytes 0 to 255 in a byte-level vocabulary (GPT-2): printable
/// bytes are themselves, the others follow from U+0100 on.
pub(crate) fn byte_alphabet() -> Vec<char> {
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    (0..256u32)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap_or('?')
        })
        .collect()
}

/// The `n`th made-up word: a space and at least two syllables.
fn word(n: usize) -> String {
    const CONSONANTS: [&str; 12] = ["b", "d", "f", "k", "l", "m", "n", "p", "r", "s", "t", "v"];
    const VOWELS: [&str; 5] = ["a", "e", "i", "o", "u"];
    let mut word = "\u{120}".to_owned(); // the byte-level space
    let (mut n, mut syllables) = (n, 0);
    while n > 0 || syllables < 2 {
        let syllable = n % 60;
        word += CONSONANTS[syllable % 12];
        word += VOWELS[syllable / 12];
        n /= 60;
        syllables += 1;
    }
    word
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn made_up_words_differ() {
        let words: HashSet<String> = (0..128_000).map(word).collect();
        assert_eq!(words.len(), 128_000);
    }

    #[test]
    fn the_byte_alphabet_is_gpt2s() {
        let alphabet = byte_alphabet();
        assert_eq!(alphabet.iter().collect::<HashSet<_>>().len(), 256);
        assert_eq!((alphabet[b' ' as usize], alphabet[b'a' as usize]), ('\u{120}', 'a'));
        assert_eq!((alphabet[0], alphabet[b'\n' as usize]), ('\u{100}', '\u{10a}'));
    }
}
