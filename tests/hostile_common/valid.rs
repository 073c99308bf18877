//! Valid inputs, as small as they can be: what is spoilt.

use std::collections::BTreeMap;
use std::fs;
use std::sync::OnceLock;

use deltallm::backend::{Activation, AttentionShape};
use deltallm::checkpoint::synthetic::Synthetic;
use deltallm::checkpoint::{Architecture, Bytes, FloatType, ModelConfig, RopeConfig, Ternary};
use deltallm::{Model, Sampling, Session, SessionOptions};
use serde_json::{Value, json};

use super::targets;

/// The files of a model, by name.
pub type Files = BTreeMap<String, Bytes>;

/// A byte-level BPE with merges and a template, of 281 tokens.
const TOKENIZER: &[u8] = include_bytes!("../fixtures/llama-32/tokenizer.json");
const TOKENIZER_CONFIG: &[u8] = include_bytes!("../fixtures/llama-32/tokenizer_config.json");
/// It uses most of what templates use.
pub const TEMPLATE: &str = "{%- set ns = namespace(text='') %}{{ bos_token }}\
    {%- for message in messages %}{%- if message['role'] == 'system' and loop.first %}\
    {%- set ns.text = message.content | trim ~ '\\n' %}{%- else %}\
    {{- '<' + message.role + '>\\n' ~ message.content.strip() }}{%- endif %}{%- endfor %}\
    {%- macro end(n, what=[]) %}{{ what | tojson }}{{ '-' * n }}{%- endmacro %}\
    {%- if add_generation_prompt %}{{ end(3, messages) }}{{ ns.text }}{%- endif %}";

fn shape(architecture: Architecture) -> ModelConfig {
    let (activation, ternary) = match architecture {
        Architecture::Llama => (Activation::Silu, None),
        Architecture::BitNet => (Activation::Relu2, Some(Ternary::PackedMultiply)),
    };
    ModelConfig {
        architecture,
        hidden: 32,
        intermediate: 32,
        layers: 1,
        attention: AttentionShape { heads: 2, kv_heads: 1, head_dim: 16 },
        vocabulary: 300,
        norm_eps: 1e-5,
        activation,
        rope: RopeConfig { theta: 1e4, scaling: None },
        context: 64,
        tied_head: Some(true),
        ternary,
        eos: vec![1],
        sampling: Sampling::default(),
    }
}

/// A model of one layer.
pub fn model(architecture: Architecture) -> Files {
    let made = Synthetic { config: shape(architecture), float: FloatType::BF16, seed: 1 };
    let mut files: Files = made.files().expect("files").into_iter().collect();
    let mut config = json_of(&files["config.json"]);
    config["rope_scaling"] = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    });
    let generation = json!({
        "eos_token_id": [1, 2], "do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.9,
        "min_p": 0.01, "repetition_penalty": 1.1,
    });
    let mut tokens = json_of(&Bytes::from(TOKENIZER_CONFIG));
    tokens["chat_template"] = TEMPLATE.into();
    tokens["bos_token"] = "<s>".into();
    files.insert("config.json".into(), text(&config));
    files.insert("generation_config.json".into(), text(&generation));
    files.insert("tokenizer.json".into(), Bytes::from(TOKENIZER));
    files.insert("tokenizer_config.json".into(), text(&tokens));
    files
}

/// The two models.
pub fn models() -> &'static [Files; 2] {
    static MODELS: OnceLock<[Files; 2]> = OnceLock::new();
    MODELS.get_or_init(|| [model(Architecture::Llama), model(Architecture::BitNet)])
}

/// The first model with its tensors in two shards.
pub fn sharded() -> &'static Files {
    static SHARDED: OnceLock<Files> = OnceLock::new();
    SHARDED.get_or_init(cut_in_two)
}

fn cut_in_two() -> Files {
    let mut files = models()[0].clone();
    let whole = files.remove("model.safetensors").expect("weights");
    let all = safetensors::SafeTensors::deserialize(&whole).expect("tensors");
    let (mut shards, mut map) = ([Vec::new(), Vec::new()], serde_json::Map::new());
    for (i, (name, view)) in all.iter().enumerate() {
        shards[i % 2].push((name, view));
        map.insert(name.to_owned(), format!("part-{}.safetensors", i % 2).into());
    }
    for (i, shard) in shards.iter().enumerate() {
        let bytes = safetensors::serialize(shard.iter().map(|(name, view)| (name, view)), None);
        files.insert(format!("part-{i}.safetensors"), Bytes::from(bytes.expect("a shard")));
    }
    let index = json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    files.insert("model.safetensors.index.json".into(), text(&index));
    files
}

/// The first model, opened.
pub fn opened() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| targets::open(&models()[0]).expect("a valid model"))
}

/// A directory for thousands of small files: in memory, where the system has such a place.
pub fn directory() -> tempfile::TempDir {
    let in_memory = tempfile::tempdir_in("/dev/shm");
    in_memory.or_else(|_| tempfile::tempdir()).expect("a directory")
}

/// Sessions of [`opened`] as files, of plain and of compressed keys.
pub fn sessions() -> Vec<Vec<u8>> {
    let dir = directory();
    let path = dir.path().join("session");
    let save = |policy: &str, thresholds: Option<&str>| {
        let options = SessionOptions {
            context: Some(60),
            attention: policy.parse().expect(policy),
            thresholds: thresholds.map(|text| text.parse().expect(text)),
        };
        let mut session = Session::new(opened(), &options).expect("a session");
        let ids: Vec<u32> = (0..50).map(|i| 3 + i * 7 % 200).collect();
        session.evaluate(&ids).expect("runs");
        session.save(&path).expect("saved");
        fs::read(&path).expect("a file")
    };
    vec![
        save("dense", None),
        save("delta page=16 window=16 sink=2 values=int4", Some("0.5")),
        save("paper page=16 window=16 deltas=int8", None),
        save("keys=channel4 values=int8 page=16 window=16 exact=f32", None),
    ]
}

/// A policy's file with all that there may be in it.
pub fn policy_file() -> Value {
    json!({
        "format": "deltallm policy", "version": 1,
        "policy": "delta theta=0.7sigma page=32", "thresholds": [[0.5, 0.25], [1, 2]],
        "calibration": {
            "model": { "architecture": "LlamaForCausalLM", "layers": 2, "heads": 4, "kv_heads": 2,
                       "head_dim": 64 },
            "budget": "sparsity 0.5", "length": 64, "fitting_segments": 2, "held_out_segments": 0,
            "measured": [{ "policy": "calibrated", "text": "held out", "tokens": 1, "sparsity": 0.5,
                           "bits_per_key_element": 2.5, "kl": 0.01, "perplexity": 7.5,
                           "dense_perplexity": 7.25 }],
        },
    })
}

/// Texts of policies.
pub const POLICIES: [&str; 5] = [
    "dense",
    "delta theta=0.7sigma reference=mean deltas=int4 values=plain exact=f16 sink=4 alpha=0.05 \
     shape=sliding window=128 page=64",
    "paper theta=1.5 window=256",
    "keys=channel2 values=int8 page=16",
    "keys=int8 exact=f32 alpha=1 shape=block",
];

/// What `deltallm tune` writes.
pub fn tunings() -> Value {
    // Versions that did not measure tiles, or packings, wrote none.
    let cut = |rows: u32| json!({ "workgroup": 64, "rows": rows });
    let both = |rows: u32, tile: u32| {
        let tile = json!({ "workgroup": 256, "rows": tile, "tokens": 4 });
        json!({ "workgroup": 64, "rows": rows, "tile": tile })
    };
    let mut ternary = both(2, 1);
    ternary["packing"] = "five".into();
    json!({ "a GPU, vulkan, 1.0, f16": {
        "ternary": ternary, "f32": cut(4), "f16": both(4, 4), "bf16": cut(8), "q8": cut(4),
        "q4": both(4, 8),
    }})
}

/// What self-tests of GPUs leave.
pub fn self_tests() -> Value {
    json!({ "a GPU, vulkan, 1.0, f16": {
        "build": "0.1.0 12ab 34cd",
        "right": ["norm: to F32", "sample: greedy, drawn, and NaN"],
        "plainer": { "SampleDraw": { "f16": true, "subgroups": false, "packed_dot": true } },
    }})
}

/// A row of each kind of task that a line may hold.
pub fn rows() -> Vec<Value> {
    let pair = |text: &str| json!(["Question: q\nAnswer:", text]);
    vec![
        json!({ "text": "A text of some words.", "id": 7 }),
        json!({ "context": "The sky is", "choices": [" blue", " green"], "label": 0 }),
        json!({ "context": "Tom has a ball.", "question": "Who?", "answers": ["Tom"],
                "title": "Balls", "no_answer": "unknown" }),
        json!({ "context": "The key is 7. What is it?", "answer": "7", "depth": 0.5, "length": 9 }),
        json!({ "sentence": "Tom gave Ann _ ball.", "option1": "a", "option2": "the",
                "answer": "2" }),
        json!({ "question": "What melts?", "answerKey": "B",
                "choices": { "text": ["stone", "ice"], "label": ["A", "B"] } }),
        json!({ "goal": "Open it", "sol1": "Push", "sol2": "Eat", "label": 1 }),
        json!({ "ctx_a": "A man [x] sails.", "ctx_b": "he", "activity_label": "Sea",
                "endings": ["sinks. [title] End", "flies"], "label": "1" }),
        json!({ "doc": { "goal": "g", "sol1": "a", "sol2": "b", "label": 1 }, "target": "1",
                "arguments": [pair(" a"), pair(" b")] }),
        json!({ "doc": { "context": "c", "question": "q", "answers": { "text": ["a"] } },
                "target": "a", "arguments": { "gen_args_0": { "arg_0": "prompt", "arg_1": {} } } }),
    ]
}

/// A file in SQuAD's own format.
pub fn squad() -> Value {
    json!({ "version": "v2.0", "data": [{ "title": "T", "paragraphs": [{
        "context": "Tom has a ball.",
        "qas": [{ "question": "Who?", "id": "1", "answers": [{ "text": "Tom", "answer_start": 0 }] },
                { "question": "Why?", "id": "2", "answers": [], "is_impossible": true }],
    }] }] })
}

/// Valid inputs of a kind of [`targets::NAMES`].
pub fn seeds(name: &str) -> Vec<Vec<u8>> {
    let of_model = |file: &str| vec![models()[0][file].to_vec()];
    let texts = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    match name {
        "config" => of_model("config.json"),
        "generation_config" => of_model("generation_config.json"),
        "weights" => of_model("model.safetensors"),
        "shards" => vec![sharded()["model.safetensors.index.json"].to_vec()],
        "tokenizer" => of_model("tokenizer.json"),
        "tokenizer_config" => of_model("tokenizer_config.json"),
        "template" => texts(&[TEMPLATE]),
        "policy_file" => vec![policy_file().to_string().into_bytes()],
        "policy_text" => texts(&POLICIES),
        "session" => sessions(),
        "tunings" => vec![tunings().to_string().into_bytes()],
        "self_tests" => vec![self_tests().to_string().into_bytes()],
        "task_lines" => rows().iter().map(|row| row.to_string().into_bytes()).collect(),
        "task_squad" => vec![squad().to_string().into_bytes()],
        _ => panic!("there is no kind {name:?}"),
    }
}

pub fn json_of(bytes: &Bytes) -> Value {
    serde_json::from_slice(bytes).expect("JSON")
}

pub fn text(value: &Value) -> Bytes {
    Bytes::from(value.to_string().into_bytes())
}
