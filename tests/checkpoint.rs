//! Opening checkpoints: what a wrong one says, and what a made-up one holds.

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::{MAIN_SEPARATOR, Path, PathBuf};

use common::{fixture, logits};
use deltallm::backend::CacheFormat;
use deltallm::checkpoint::synthetic::Synthetic;
use deltallm::checkpoint::{Bytes, Checkpoint, FloatType, Ternary};
use deltallm::delta::AttentionPolicy;
use deltallm::model::{WeightFormat, plan_memory};
use deltallm::{DeviceChoice, Model, ModelOptions, Session, SessionOptions};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A copy of a fixture that a test may break.
struct Copy(TempDir);

impl Copy {
    fn of(name: &str) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        for entry in fs::read_dir(fixture(name)).expect("fixture") {
            let path = entry.expect("entry").path();
            fs::copy(&path, dir.path().join(path.file_name().expect("name"))).expect("copy");
        }
        Self(dir)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    /// Changes a JSON file.
    fn json(&self, file: &str, change: impl FnOnce(&mut Value)) -> &Self {
        let text = fs::read_to_string(self.path(file)).expect("file");
        let mut value = serde_json::from_str(&text).expect("json");
        change(&mut value);
        fs::write(self.path(file), value.to_string()).expect("write");
        self
    }

    /// Changes the tensors of model.safetensors: (name, type, shape, bytes).
    fn tensors(
        &self,
        change: impl FnOnce(&mut Vec<(String, Dtype, Vec<usize>, Vec<u8>)>),
    ) -> &Self {
        let path = self.path("model.safetensors");
        let bytes = fs::read(&path).expect("weights");
        let file = SafeTensors::deserialize(&bytes).expect("tensors");
        let mut list: Vec<_> = file
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec()))
            .collect();
        change(&mut list);
        let views = list.iter().map(|(name, dtype, shape, data)| {
            (name, TensorView::new(*dtype, shape.clone(), data).expect("view"))
        });
        safetensors::serialize_to_file(views, None, &path).expect("write");
        self
    }

    /// The error of opening it on the CPU.
    fn error(&self) -> String {
        let options = ModelOptions { device: DeviceChoice::Cpu, ..ModelOptions::default() };
        match Model::open(self.0.path(), &options) {
            Ok(_) => panic!("a broken checkpoint was opened"),
            Err(error) => error.to_string(),
        }
    }

    /// That error names each of these.
    fn says(&self, words: &[&str]) {
        let error = self.error();
        for word in words {
            assert!(error.contains(word), "{error:?} does not say {word:?}");
        }
    }
}

#[test]
fn a_missing_or_malformed_file_is_named() {
    let options = ModelOptions { device: DeviceChoice::Cpu, ..ModelOptions::default() };
    let error = Model::open("no/such/model", &options).expect_err("opened").to_string();
    assert!(error.contains("no/such/model") && error.contains("does not exist"), "{error}");
    let error = Model::open(fixture("llama-32").join("config.json"), &options);
    assert!(error.expect_err("opened").to_string().contains("a model is a directory"));

    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        let copy = Copy::of("llama-32");
        fs::remove_file(copy.path(file)).expect("remove");
        copy.says(&[file]);
    }
    for file in ["config.json", "tokenizer.json", "generation_config.json"] {
        for text in ["", "{", "[1, 2]", "\"text\"", "\u{fffd}"] {
            let copy = Copy::of("llama-32");
            fs::write(copy.path(file), text).expect("write");
            copy.says(&[file]);
        }
    }
    let copy = Copy::of("llama-32");
    fs::rename(copy.path("model.safetensors"), copy.path("pytorch_model.bin")).expect("rename");
    copy.says(&["pytorch_model.bin", "safetensors"]);
}

#[test]
fn a_damaged_safetensors_file_is_named() {
    let damaged = |change: fn(&mut Vec<u8>)| {
        let copy = Copy::of("llama-32");
        let mut bytes = fs::read(copy.path("model.safetensors")).expect("weights");
        change(&mut bytes);
        fs::write(copy.path("model.safetensors"), bytes).expect("write");
        copy
    };
    let whole = ["model.safetensors", "not a whole safetensors file"];
    damaged(|bytes| bytes.truncate(bytes.len() - 1)).says(&whole);
    damaged(|bytes| bytes.truncate(9)).says(&whole);
    damaged(|bytes| bytes.truncate(3)).says(&whole);
    damaged(|bytes| bytes.push(0)).says(&whole);
    damaged(|bytes| bytes[..8].fill(0xff)).says(&whole);
    damaged(|bytes| bytes[9] = b'!').says(&whole);
    damaged(Vec::clear).says(&["model.safetensors", "is empty"]);
    damaged(|bytes| *bytes = b"version https://git-lfs.github.com/spec/v1\n".to_vec())
        .says(&["model.safetensors", "git lfs pull"]);
}

#[test]
fn a_wrong_shard_index_is_named() {
    let index = "model.safetensors.index.json";
    let copy = Copy::of("llama-80");
    let first = "model.norm.weight";
    copy.json(index, |json| json["weight_map"][first] = json!("../elsewhere.safetensors"));
    copy.says(&[index, first, "not a plain file name"]);
    copy.json(index, |json| json["weight_map"][first] = json!("absent.safetensors"));
    copy.says(&["absent.safetensors"]);
    let copy = Copy::of("llama-80");
    copy.json(index, |json| {
        let shard = json["weight_map"][first].clone();
        json["weight_map"]["model.extra.weight"] = shard;
    });
    copy.says(&["model.extra.weight", "missing"]);
    copy.json(index, |json| json["weight_map"] = json!(3));
    copy.says(&[index, "weight_map"]);
}

#[test]
fn a_wrong_tensor_is_named() {
    let norm = "model.layers.1.input_layernorm.weight";
    let up = "model.layers.0.mlp.up_proj.weight";
    let copy = Copy::of("llama-32");
    copy.tensors(|list| list.retain(|(name, ..)| name != up)).says(&[up, "missing"]);

    let copy = Copy::of("llama-32");
    copy.tensors(|list| {
        let tensor = list.iter_mut().find(|(name, ..)| name == up).expect("tensor");
        tensor.2.reverse();
    });
    copy.says(&[up, "shape", "expected"]);

    let copy = Copy::of("llama-32");
    copy.tensors(|list| {
        let tensor = list.iter_mut().find(|(name, ..)| name == up).expect("tensor");
        tensor.1 = Dtype::I16;
    });
    copy.says(&[up, "I16", "BF16"]);

    let copy = Copy::of("llama-32");
    copy.tensors(|list| {
        let tensor = list.iter_mut().find(|(name, ..)| name == norm).expect("tensor");
        tensor.3[2..4].copy_from_slice(&0x7fc0u16.to_le_bytes());
    });
    copy.says(&[norm, "element 1 is NaN"]);

    let copy = Copy::of("llama-32");
    copy.tensors(|list| {
        let bias =
            ("model.layers.0.self_attn.q_proj.bias".into(), Dtype::BF16, vec![1], vec![0; 2]);
        list.push(bias);
    });
    copy.says(&["q_proj.bias", "not supported"]);
}

#[test]
fn what_would_be_left_out_silently_is_refused() {
    let copy = Copy::of("llama-32");
    copy.tensors(|list| {
        let norm = "model.layers.0.self_attn.q_norm.weight".into();
        list.push((norm, Dtype::BF16, vec![1], vec![0; 2]));
    });
    copy.says(&["q_norm", "does not have"]);
    let copy = Copy::of("llama-32");
    copy.json("config.json", |json| json["num_hidden_layers"] = json!(2));
    copy.says(&["model.layers.2."]);

    // A tied head beside the embedding: fine if it is the same, else which one is meant?
    let copy = Copy::of("llama-32");
    let add_head = |list: &mut Vec<(String, Dtype, Vec<usize>, Vec<u8>)>| {
        let table = list.iter().find(|(name, ..)| name == "model.embed_tokens.weight");
        let (_, dtype, shape, data) = table.expect("embedding").clone();
        list.push(("lm_head.weight".into(), dtype, shape, data));
    };
    copy.tensors(add_head);
    assert_eq!(Checkpoint::open(copy.0.path()).expect("opened").config.tied_head, Some(true));
    copy.tensors(|list| {
        let head = list.iter_mut().find(|(name, ..)| name == "lm_head.weight").expect("head");
        head.3[0] ^= 1;
    });
    copy.says(&["lm_head.weight", "tie_word_embeddings"]);
}

#[test]
fn weights_that_are_not_numbers_never_become_text() {
    let nan = |copy: &Copy, name: &str| {
        copy.tensors(|list| {
            let tensor = list.iter_mut().find(|(n, ..)| n == name).expect("tensor");
            assert_eq!(tensor.1, Dtype::BF16);
            tensor.3[2..4].copy_from_slice(&0x7fc0u16.to_le_bytes());
        });
    };
    let down = "model.layers.0.mlp.down_proj.weight";
    let copy = Copy::of("bitnet-80");
    nan(&copy, down);
    copy.says(&[down, "NaN"]);

    let copy = Copy::of("llama-32");
    nan(&copy, down);
    for (device, options) in common::devices() {
        for weights in [WeightFormat::Stored, WeightFormat::Q8] {
            let model = Model::open(copy.0.path(), &ModelOptions { weights, ..options.clone() });
            let mut session =
                Session::new(&model.expect("opened"), &SessionOptions::default()).expect("session");
            let error = session.evaluate(&[1, 2, 3]).expect_err("NaN");
            assert!(matches!(error, deltallm::Error::NotFinite { .. }), "{device}: {error}");
            let place = "the down projection of layer 0, tokens 0 to 2";
            assert!(error.to_string().contains(place), "{device}: {error}");
            let generation = session.generate(&[1, 2, 3], &deltallm::GenerateOptions::default());
            let piece = generation.expect("prompt").next().expect("a piece");
            let error = piece.expect_err("NaN");
            assert!(matches!(error, deltallm::Error::NotFinite { .. }), "{device}: {error}");
            assert!(error.to_string().contains(place), "{device}: {error}");
        }
    }
}

#[test]
fn an_inconsistent_tokenizer_is_an_error() {
    let copy = Copy::of("llama-64");
    copy.json("tokenizer.json", |json| {
        let special = json!({ "SpecialToken": { "id": "<|no such token|>", "type_id": 0 } });
        json["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [special, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [], "special_tokens": {},
        });
    });
    copy.says(&["tokenizer.json"]);
}

#[test]
fn the_beginning_of_text_follows_the_tokenizer_config() {
    let cpu = ModelOptions { device: DeviceChoice::Cpu, ..ModelOptions::default() };
    let encode = |config: Value| {
        let copy = Copy::of("bitnet-32"); // whose tokenizer.json adds nothing
        fs::write(copy.path("tokenizer_config.json"), config.to_string()).expect("write");
        let model = Model::open(copy.0.path(), &cpu).expect("opened");
        let plain = model.tokenizer().encode_continuation("a").expect("encoded");
        let ids = model.tokenizer().encode("a").expect("encoded");
        let token = model.tokenizer().token(ids[0]).expect("a token");
        (ids.len() - plain.len(), token)
    };
    let tokens = fs::read_to_string(fixture("bitnet-32").join("tokenizer.json")).expect("file");
    let tokens: Value = serde_json::from_str(&tokens).expect("json");
    let bos = tokens["added_tokens"][0]["content"].clone();
    assert_eq!(encode(json!({})).0, 0);
    assert_eq!(encode(json!({ "add_bos_token": false, "bos_token": bos })).0, 0);
    let added = (1, bos.as_str().expect("text").to_owned());
    assert_eq!(encode(json!({ "add_bos_token": true, "bos_token": bos })), added);
    assert_eq!(encode(json!({ "add_bos_token": true, "bos_token": { "content": bos } })), added);
    let llama = "LlamaTokenizerFast";
    assert_eq!(encode(json!({ "tokenizer_class": llama, "bos_token": bos })), added);
    let off = json!({ "tokenizer_class": llama, "add_bos_token": false, "bos_token": bos });
    assert_eq!(encode(off).0, 0);
}

#[test]
fn a_wrong_bitnet_tensor_is_named() {
    let scale = "model.layers.0.mlp.gate_proj.weight_scale";
    let copy = Copy::of("bitnet-32");
    copy.tensors(|list| list.retain(|(name, ..)| name != scale)).says(&[scale, "missing"]);
    let copy = Copy::of("bitnet-32");
    copy.tensors(|list| {
        let tensor = list.iter_mut().find(|(name, ..)| name == scale).expect("tensor");
        tensor.3.fill(0);
    });
    copy.says(&[scale, "is 0"]);

    let up = "model.layers.1.mlp.up_proj.weight";
    let copy = Copy::of("bitnet-32");
    copy.tensors(|list| {
        let tensor = list.iter_mut().find(|(name, ..)| name == up).expect("tensor");
        tensor.3[5] = 0b11_00_00_00;
    });
    copy.says(&[up, "byte 5", "trits"]);

    // Master weights where packed ones are announced, and the other way round.
    let copy = Copy::of("bitnet-80");
    copy.json("config.json", |json| {
        json["quantization_config"]["quantization_mode"] = json!("offline");
    });
    copy.says(&["online", "U8"]);
    let copy = Copy::of("bitnet-32");
    copy.json("config.json", |json| {
        json["quantization_config"]["quantization_mode"] = json!("online");
    });
    copy.says(&["shape"]);
    let copy = Copy::of("bitnet-80");
    copy.json("config.json", |json| {
        json.as_object_mut().expect("object").remove("quantization_config");
    });
    copy.says(&["quantization_config", "online"]);
    let copy = Copy::of("bitnet-32");
    copy.json("config.json", |json| json["quantization_config"]["linear_class"] = json!("other"));
    copy.says(&["linear_class", "other", "autobitlinear"]);
}

#[test]
fn a_wrong_config_field_is_named() {
    let cases: [(&str, Value, &[&str]); 16] = [
        ("hidden_size", json!(null), &["hidden_size", "missing"]),
        ("hidden_size", json!("wide"), &["hidden_size", "wide", "whole number"]),
        ("hidden_size", json!(-5), &["hidden_size", "-5"]),
        ("hidden_size", json!(102), &["shape"]),
        ("num_hidden_layers", json!(9), &["model.layers.", "missing"]),
        ("num_attention_heads", json!(5), &["num_key_value_heads", "divide"]),
        ("num_key_value_heads", json!(2), &["num_key_value_heads", "divide"]),
        ("head_dim", json!(31), &["head_dim", "odd"]),
        ("vocab_size", json!(100), &["tokenizer.json", "100 rows"]),
        ("vocab_size", json!(5000), &["model.embed_tokens.weight", "shape"]),
        ("model_type", json!("mamba"), &["mamba", "not supported"]),
        ("hidden_act", json!("gelu"), &["gelu", "silu"]),
        ("attention_bias", json!(true), &["attention_bias"]),
        ("rms_norm_eps", json!(0), &["rms_norm_eps", "above 0"]),
        ("rope_scaling", json!({ "rope_type": "yarn" }), &["yarn", "llama3"]),
        ("rope_scaling", json!({ "type": "llama3", "factor": 8 }), &["rope_scaling.", "missing"]),
    ];
    for (field, value, words) in cases {
        let copy = Copy::of("llama-32");
        copy.json("config.json", |json| json[field] = value);
        copy.says(words);
    }
    let copy = Copy::of("llama-32");
    copy.json("config.json", |json| {
        json["quantization_config"] = json!({ "quant_method": "gptq" })
    });
    copy.says(&["gptq", "config.json"]);
}

#[test]
fn sampling_is_recommended_by_the_generation_config_and_bad_advice_is_no_obstacle() {
    let sampling = |generation: serde_json::Value| {
        let copy = Copy::of("llama-32");
        copy.json("generation_config.json", |json| *json = generation);
        Checkpoint::open(copy.0.path()).expect("opens").config.sampling
    };
    let found = sampling(json!({ "do_sample": true, "temperature": 0.6, "top_p": 0.9 }));
    assert_eq!((found.temperature, found.top_p, found.top_k), (0.6, 0.9, 50));
    // What is recommended for drawing says nothing where nothing is drawn.
    let found = sampling(json!({ "temperature": 0.6, "repetition_penalty": 1.2 }));
    assert_eq!((found.temperature, found.repetition_penalty), (0.0, 1.2));
    for bad in [
        json!({ "do_sample": true, "top_p": 0.0 }),
        json!({ "do_sample": true, "temperature": -1 }),
        json!({ "do_sample": "yes", "temperature": [] }),
    ] {
        assert_eq!(sampling(bad), deltallm::Sampling::default());
    }
}

#[test]
fn end_of_sequence_ids_come_from_the_generation_config_first() {
    let copy = Copy::of("llama-64");
    copy.json("config.json", |json| json["eos_token_id"] = json!(3));
    copy.json("generation_config.json", |json| json["eos_token_id"] = json!([5, 7]));
    assert_eq!(Checkpoint::open(copy.0.path()).expect("opened").config.eos, [5, 7]);
    fs::remove_file(copy.path("generation_config.json")).expect("remove");
    assert_eq!(Checkpoint::open(copy.0.path()).expect("opened").config.eos, [3]);
}

#[test]
fn older_spellings_are_read_too() {
    let copy = Copy::of("llama-64");
    let before = Checkpoint::open(copy.0.path()).expect("opened").config;
    copy.json("config.json", |json| {
        let scaling = json["rope_scaling"].as_object_mut().expect("llama3 scaling");
        let kind = scaling.remove("rope_type").expect("rope_type");
        scaling.insert("type".into(), kind);
        json.as_object_mut().expect("object").remove("model_type");
    });
    assert_eq!(Checkpoint::open(copy.0.path()).expect("opened").config, before);

    // Without a linear_class the product is divided by weight_scale, as in transformers.
    let copy = Copy::of("bitnet-64");
    copy.json("config.json", |json| {
        json["quantization_config"].as_object_mut().expect("object").remove("linear_class");
    });
    let config = Checkpoint::open(copy.0.path()).expect("opened").config;
    assert_eq!(config.ternary, Some(Ternary::PackedDivide));
}

fn write(synthetic: &Synthetic) -> TempDir {
    let dir = tempfile::tempdir().expect("temporary directory");
    synthetic.write(dir.path()).expect("written");
    dir
}

#[test]
fn made_up_checkpoints_of_every_kind_open_and_run() {
    let tiny = Synthetic::named("tiny").expect("known");
    let llama = {
        let config = Synthetic::named("llama-1b").expect("known").config;
        let mut small = tiny.config.clone();
        (small.architecture, small.activation) = (config.architecture, config.activation);
        (small.rope, small.ternary, small.tied_head) = (config.rope, None, Some(false));
        Synthetic { config: small, ..tiny.clone() }
    };
    let ternary = |storage| {
        let mut made = tiny.clone();
        made.config.ternary = Some(storage);
        made
    };
    let float = |float| Synthetic { float, ..llama.clone() };
    let kinds = [
        tiny.clone(),
        ternary(Ternary::PackedDivide),
        ternary(Ternary::Master),
        float(FloatType::F32),
        float(FloatType::F16),
        float(FloatType::BF16),
    ];
    let cpu = ModelOptions { device: DeviceChoice::Cpu, ..ModelOptions::default() };
    for made in kinds {
        let dir = write(&made);
        assert_eq!(Checkpoint::open(dir.path()).expect("opened").config, made.config);
        for weights in [WeightFormat::Stored, WeightFormat::Q8] {
            let model = Model::open(dir.path(), &ModelOptions { weights, ..cpu.clone() });
            let model = model.expect("opened");
            assert_eq!(model.tokenizer().len(), made.config.vocabulary);
            let ids = model.tokenizer().encode("Anna put").expect("encoded");
            let rows = logits(&model, &ids, CacheFormat::F16);
            let last = &rows[(ids.len() - 1) * made.config.vocabulary..];
            let mean = last.iter().sum::<f32>() / last.len() as f32;
            let variance = last.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / last.len() as f32;
            assert!((1.0..10.0).contains(&variance.sqrt()), "spread {}", variance.sqrt());
        }
    }
}

#[test]
fn the_planned_memory_is_what_a_session_holds() {
    let dir = write(&Synthetic::named("tiny").expect("known"));
    for (device, options) in common::devices() {
        if device == "reference" {
            continue; // It keeps every weight in f32 on purpose.
        }
        for (weights, cache) in
            [(WeightFormat::Stored, CacheFormat::F16), (WeightFormat::Q8, CacheFormat::F32)]
        {
            let model = Model::open(dir.path(), &ModelOptions { weights, ..options.clone() });
            let model = model.expect("opened");
            let attention = AttentionPolicy::plain(cache);
            let session_options =
                SessionOptions { context: Some(1024), attention, thresholds: None };
            // Memory grows with the text, up to what is planned for the context.
            let mut session = Session::new(&model, &session_options).expect("session");
            let text: Vec<u32> = (0..1024).map(|i| 3 + i % 50).collect();
            session.evaluate(&text).expect("a full context");
            let held = session.memory();
            let plan = plan_memory(model.config(), 2, weights, 1024, &attention);
            let near = |held: u64, plan: u64| held.abs_diff(plan) * 20 <= plan;
            assert_eq!((held.keys, held.values), (plan.keys, plan.values), "{device}");
            assert!(near(held.weights, plan.weights), "{device}: {held:?}, planned {plan:?}");
            assert!(
                near(held.activations, plan.activations),
                "{device}: {held:?}, planned {plan:?}"
            );
        }
    }
}

#[test]
fn a_made_up_checkpoint_is_the_same_every_time() {
    let tiny = Synthetic::named("tiny").expect("known");
    let read = |dir: &Path| fs::read(dir.join("model.safetensors")).expect("weights");
    assert_eq!(read(write(&tiny).path()), read(write(&tiny).path()));
}

type MemoryFiles = Vec<(String, Vec<u8>)>;

/// The files of a fixture, in memory.
fn in_memory(name: &str) -> MemoryFiles {
    let files =
        fs::read_dir(fixture(name)).expect("fixture").map(|file| file.expect("file").path());
    let named = |path: PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        (name, fs::read(path).expect("bytes"))
    };
    files.map(named).collect()
}

fn open_in_memory(files: MemoryFiles) -> deltallm::Result<Model> {
    let files = files.into_iter().map(|(name, bytes)| (name, Bytes::from(bytes)));
    let checkpoint = Checkpoint::from_memory("inside", files)?;
    let options = ModelOptions { device: DeviceChoice::Cpu, ..ModelOptions::default() };
    Model::open_checkpoint(checkpoint, &options, |_| ControlFlow::Continue(()))
}

/// One file and shards; float, packed and master weights.
#[test]
fn a_checkpoint_in_memory_is_the_one_on_disk() {
    for name in common::LLAMAS.into_iter().chain(common::BITNETS) {
        let options = ModelOptions { device: DeviceChoice::Cpu, ..ModelOptions::default() };
        let (disk, memory) = (common::open(name, &options), open_in_memory(in_memory(name)));
        let memory = memory.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(memory.config(), disk.config(), "{name}");
        let ids = disk.tokenizer().encode("Hello there").expect("ids");
        assert_eq!(memory.tokenizer().encode("Hello there").expect("ids"), ids, "{name}");
        let of = |model: &Model| logits(model, &ids, CacheFormat::F32);
        assert_eq!(of(&memory), of(&disk), "{name}");
    }
}

#[test]
fn a_wrong_file_in_memory_is_named() {
    let error = |change: &dyn Fn(&mut MemoryFiles)| {
        let mut files = in_memory("llama-64");
        change(&mut files);
        open_in_memory(files).expect_err("a broken checkpoint was opened").to_string()
    };
    for file in ["config.json", "tokenizer.json"] {
        let error = error(&|files| files.retain(|(name, _)| name != file));
        assert!(error.starts_with(&format!("inside{MAIN_SEPARATOR}{file}")), "{error}");
    }
    let none = error(&|files| files.retain(|(name, _)| name != "model.safetensors"));
    assert!(none.starts_with("inside: has neither model.safetensors nor"), "{none}");
    for keep in [0, 5, 100, 10_000] {
        let error = error(&|files| {
            let found = files.iter_mut().find(|(name, _)| name == "model.safetensors");
            found.expect("weights").1.truncate(keep);
        });
        assert!(error.contains("model.safetensors: is "), "{keep}: {error}");
    }
}
