//! Files that lie: thousands of spoilt inputs of every kind that this crate reads, each of which is
//! taken or refused with an error that names it, without a panic and without taking memory out of
//! proportion. See `hostile_common` for the rule, and `fuzz` for the same without end.
//!
//! Counts are fixed, not times, and so are the seeds: a failure comes again. `--nocapture` prints
//! what was tried.
#![cfg(feature = "chat")]

mod hostile_common;

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use hostile_common::spoil::{self, Random};
use hostile_common::valid::{self, json_of};
use hostile_common::{Outcome, forged, memory, targets};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// One kind at a time: memory is counted for the whole process.
static TURN: Mutex<()> = Mutex::new(());
/// Where panics were, those among them that the crate has contained.
static PANICS: Mutex<BTreeMap<String, usize>> = Mutex::new(BTreeMap::new());

/// Far above what any input takes on a slow machine: it is stuck.
const STUCK: Duration = Duration::from_secs(30);

fn panics() -> MutexGuard<'static, BTreeMap<String, usize>> {
    PANICS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was tried of a kind, and what came of it.
struct Kind {
    name: &'static str,
    accepted: usize,
    refused: usize,
    most: usize,
    slowest: Duration,
    started: Instant,
    /// What broke the rule: each message once, with how often and the first input.
    failures: BTreeMap<String, (usize, String)>,
    _turn: MutexGuard<'static, ()>,
}

impl Kind {
    fn new(name: &'static str) -> Self {
        static QUIET: Once = Once::new();
        QUIET.call_once(|| {
            let usual = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                let here = panic.location().map(|place| place.file().to_owned());
                let here = here.unwrap_or_default();
                // The tests' own failures are to be read; those of libraries are counted.
                if here.starts_with("tests/hostile.rs") {
                    usual(panic);
                } else {
                    let line = panic.location().map_or(0, |place| place.line());
                    let file = here.rsplit_once("/src/").map_or(&here[..], |(before, _)| before);
                    let file = file.rsplit('/').next().unwrap_or_default();
                    let inside = here.rsplit("/src/").next().unwrap_or_default();
                    *panics().entry(format!("{file}: {inside}:{line}")).or_default() += 1;
                }
            }));
        });
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // What is made once is not counted with the first input.
        valid::opened();
        panics().clear();
        Self {
            name,
            accepted: 0,
            refused: 0,
            most: 0,
            slowest: Duration::ZERO,
            started: Instant::now(),
            failures: BTreeMap::new(),
            _turn: turn,
        }
    }

    fn inputs(&self) -> usize {
        self.accepted + self.refused
    }

    /// Tries an input; what breaks the rule is told by [`Kind::done`].
    fn feed(&mut self, what: &str, bytes: &[u8], target: impl FnOnce(&[u8]) -> Outcome) -> bool {
        let start = Instant::now();
        let (outcome, peak) = memory::peak_of(|| catch_unwind(AssertUnwindSafe(|| target(bytes))));
        let elapsed = start.elapsed();
        self.most = self.most.max(peak);
        self.slowest = self.slowest.max(elapsed);
        let accepted = matches!(outcome, Ok(Outcome::Accepted));
        match accepted {
            true => self.accepted += 1,
            false => self.refused += 1,
        }
        if let Err(panic) = outcome {
            let message = panic.downcast_ref::<String>().cloned();
            let message = message.or(panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
            self.fail(message.unwrap_or_default(), what, bytes);
        }
        if peak > memory::allowed(bytes.len()) {
            let message =
                format!("takes {} MB of memory and more", (peak >> 20).next_power_of_two());
            self.fail(message, what, bytes);
        }
        if elapsed > STUCK {
            self.fail("takes too long".into(), what, bytes);
        }
        accepted
    }

    fn fail(&mut self, message: String, what: &str, bytes: &[u8]) {
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(300)]).into_owned();
        let first = format!("{what}, {} bytes that begin with {start:?}", bytes.len());
        self.failures.entry(message).or_insert((0, first)).0 += 1;
    }

    /// What was tried, and whether the rule held.
    fn done(self, least: usize) {
        println!(
            "{:<22} {:>6} inputs, {:>5} accepted, {:>6} refused, {:>4} MB at most, slowest {:>5} ms, \
             {:>5.1} s",
            self.name,
            self.inputs(),
            self.accepted,
            self.refused,
            self.most >> 20,
            self.slowest.as_millis(),
            self.started.elapsed().as_secs_f64()
        );
        for (place, count) in panics().iter() {
            println!("    a panic in {place}, {count} times");
        }
        let list = |(message, (count, first)): (&String, &(usize, String))| {
            format!("\n  {count} times: {message}\n      {first}")
        };
        let failures: String = self.failures.iter().map(list).collect();
        assert!(failures.is_empty(), "{}:{failures}", self.name);
        assert!(self.inputs() >= least, "{}: only {} inputs", self.name, self.inputs());
    }
}

/// Feeds a file of JSON, spoilt in every way of `spoil`.
fn feed_json(
    kind: &mut Kind,
    valid: &Value,
    most: usize,
    random: usize,
    target: &dyn Fn(&[u8]) -> Outcome,
) {
    let text = valid.to_string();
    assert!(kind.feed("the valid one", text.as_bytes(), target), "{}: refuses it", kind.name);
    spoil::json(valid, most, &mut |what, bytes| {
        kind.feed(what, bytes, target);
    });
    let mut numbers = Random(random as u64);
    for _ in 0..random {
        let bytes = spoil::json_at_random(valid, &mut numbers);
        kind.feed("several places", &bytes, target);
        let bytes = spoil::bytes(text.as_bytes(), &mut numbers);
        kind.feed("bytes", &bytes, target);
    }
    for (what, bytes) in spoil::never_valid() {
        assert!(!kind.feed(what, &bytes, target), "{}: takes {what}", kind.name);
    }
}

#[test]
fn configurations() {
    let mut kind = Kind::new("config.json");
    for files in valid::models() {
        let valid = json_of(&files["config.json"]);
        feed_json(&mut kind, &valid, 8, 300, &|bytes| targets::model(files, "config.json", bytes));
    }
    kind.done(2000);
}

#[test]
fn generation_configurations() {
    let mut kind = Kind::new("generation_config.json");
    let files = &valid::models()[0];
    let valid = json_of(&files["generation_config.json"]);
    feed_json(&mut kind, &valid, 8, 100, &|bytes| {
        targets::model(files, "generation_config.json", bytes)
    });
    kind.done(400);
}

#[test]
fn weights() {
    let mut kind = Kind::new("model.safetensors");
    for files in valid::models() {
        let target = |bytes: &[u8]| targets::model(files, "model.safetensors", bytes);
        let whole = &files["model.safetensors"][..];
        let (header, data) = forged::split(whole);
        assert!(kind.feed("the valid one", whole, target));
        // Headers that are JSON, and lie.
        spoil::json(&header, 3, &mut |what, header| {
            kind.feed(what, &forged::join(header, data), target);
        });
        // Cut everywhere in the header and around it, and here and there in the data.
        let begin = whole.len() - data.len();
        for length in (0..begin + 32).step_by(7).chain((begin..whole.len()).step_by(997)) {
            assert!(!kind.feed("cut", &whole[..length], target), "{length} bytes are a model");
        }
        for length in [0, 1, 7, 8, 1 << 20, 1 << 27, 1 << 31, 1 << 53, 1 << 63, u64::MAX] {
            let mut bytes = whole.to_vec();
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            assert!(!kind.feed("the header's length", &bytes, target), "{length}");
        }
        let mut numbers = Random(2);
        for _ in 0..400 {
            kind.feed("bytes", &spoil::bytes(whole, &mut numbers), target);
            let header = spoil::json_at_random(&header, &mut numbers);
            kind.feed("several places", &forged::join(&header, data), target);
            let data = spoil::bytes(data, &mut numbers);
            kind.feed("data", &forged::join(&header, &data), target);
        }
        for (what, bytes) in spoil::never_valid() {
            kind.feed(what, &bytes, target);
        }
    }
    // Offsets whose sum is beyond 64 bits, each of them right by itself.
    let part = (1u64 << 61) - 1;
    let tensor = |i: u64| {
        let place = [i * part, (i + 1) * part];
        json!({ "dtype": "U8", "shape": [part], "data_offsets": place })
    };
    let header: serde_json::Map<String, Value> =
        (0..8).map(|i| (format!("t{i}"), tensor(i))).collect();
    let bytes = forged::join(Value::from(header).to_string().as_bytes(), &[0; 64]);
    let files = &valid::models()[0];
    let target = |bytes: &[u8]| targets::model(files, "model.safetensors", bytes);
    assert!(!kind.feed("offsets beyond 64 bits", &bytes, target));
    let long =
        json!({ "x".repeat(100_000): { "dtype": "U8", "shape": [0], "data_offsets": [0, 0] } });
    assert!(!kind.feed("a long name", &forged::join(long.to_string().as_bytes(), &[]), target));
    kind.done(5000);
}

#[test]
fn shards() {
    let mut kind = Kind::new("index of shards");
    let files = valid::sharded();
    let name = "model.safetensors.index.json";
    let valid = json_of(&files[name]);
    feed_json(&mut kind, &valid, 3, 200, &|bytes| targets::model(&files, name, bytes));
    let first = valid["weight_map"].as_object().expect("a map").keys().next().expect("a tensor");
    for shard in
        ["", ".", "..", "/", "../part-0.safetensors", "/dev/zero", "a/b", "config.json", "absent"]
    {
        let mut spoilt = valid.clone();
        spoilt["weight_map"][first] = shard.into();
        let bytes = spoilt.to_string().into_bytes();
        let taken = kind.feed(shard, &bytes, |bytes| targets::model(&files, name, bytes));
        assert!(!taken, "{shard}");
    }
    kind.done(700);
}

#[test]
fn tokenizers() {
    let mut kind = Kind::new("tokenizer.json");
    let files = &valid::models()[0];
    let valid = json_of(&files["tokenizer.json"]);
    let target = |bytes: &[u8]| targets::model(files, "tokenizer.json", bytes);
    feed_json(&mut kind, &valid, 3, 400, &target);
    for (what, changed) in inconsistent_tokenizers(&valid) {
        kind.feed(what, changed.to_string().as_bytes(), target);
    }
    for (what, changed) in explosive_tokenizers(&valid) {
        let taken = kind.feed(what, changed.to_string().as_bytes(), target);
        assert!(!taken, "{what}: it is taken");
    }
    kind.done(2500);
}

/// Tokenizers whose parts contradict each other, and those of other kinds than ours.
fn inconsistent_tokenizers(valid: &Value) -> Vec<(&'static str, Value)> {
    let changed = |part: &str, value: Value| {
        let mut tokenizer = valid.clone();
        tokenizer[part] = value;
        tokenizer
    };
    let of_model = |change: &dyn Fn(&mut Value)| {
        let mut tokenizer = valid.clone();
        change(&mut tokenizer["model"]);
        tokenizer
    };
    let added = |id: u64, content: &str| {
        json!([{ "id": id, "content": content, "single_word": false, "lstrip": false,
                 "rstrip": false, "normalized": false, "special": true }])
    };
    let special = |ids: Value| {
        json!({ "type": "TemplateProcessing", "pair": [],
                "single": [{ "SpecialToken": { "id": "x", "type_id": 0 } },
                           { "Sequence": { "id": "A", "type_id": 0 } }],
                "special_tokens": { "x": { "id": "x", "ids": ids, "tokens": ["x"] } } })
    };
    let split = |pattern: &str| {
        json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated",
                "invert": false })
    };
    vec![
        ("two tokens of one id", of_model(&|m| m["vocab"]["!"] = json!(3))),
        ("a gap", of_model(&|m| m["vocab"]["!"] = json!(299))),
        ("an id beyond the embedding", of_model(&|m| m["vocab"]["!"] = json!(300))),
        ("an id of 32 bits", of_model(&|m| m["vocab"]["!"] = json!(u32::MAX))),
        ("no vocabulary", of_model(&|m| m["vocab"] = json!({}))),
        ("a merge of nothing", of_model(&|m| m["merges"] = json!([["", ""]]))),
        ("a merge of strangers", of_model(&|m| m["merges"] = json!([["zz", "yy"]]))),
        ("half a merge", of_model(&|m| m["merges"] = json!(["a"]))),
        ("an unknown token that is not there", of_model(&|m| m["unk_token"] = json!("nowhere"))),
        ("all tokens dropped", of_model(&|m| m["dropout"] = json!(1e30))),
        ("a prefix", of_model(&|m| m["continuing_subword_prefix"] = json!("aaaaaaaaaa"))),
        ("bytes that are not there", of_model(&|m| m["byte_fallback"] = json!(true))),
        ("a Unigram of nothing", changed("model", json!({ "type": "Unigram", "vocab": [] }))),
        (
            "a Unigram without its unknown token",
            changed("model", json!({ "type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]] })),
        ),
        (
            "a Unigram of infinities",
            changed(
                "model",
                json!({ "type": "Unigram", "unk_id": 0, "vocab": [["a", -1e308], ["", 1e308]] }),
            ),
        ),
        (
            "a WordPiece of nothing",
            changed(
                "model",
                json!({ "type": "WordPiece", "vocab": {}, "unk_token": "?",
                        "continuing_subword_prefix": "", "max_input_chars_per_word": 0 }),
            ),
        ),
        (
            "words",
            changed("model", json!({ "type": "WordLevel", "vocab": { "a": 7 }, "unk_token": "b" })),
        ),
        ("an added token beyond the embedding", changed("added_tokens", added(4000, "<x>"))),
        ("an added token of another id", changed("added_tokens", added(5, "!"))),
        ("an empty added token", changed("added_tokens", added(0, ""))),
        ("a special token beyond the embedding", changed("post_processor", special(json!([9999])))),
        ("a special token of no id", changed("post_processor", special(json!([])))),
        (
            "a template of the text that is not there",
            changed(
                "post_processor",
                json!({ "type": "TemplateProcessing", "pair": [], "special_tokens": {},
                        "single": [{ "Sequence": { "id": "B", "type_id": 0 } }] }),
            ),
        ),
        ("a class without end", changed("pre_tokenizer", split("[a"))),
        ("a pattern that looks back and forth", changed("pre_tokenizer", split("(a*)*\\1b(?=c)$"))),
        ("a pattern of millions", changed("pre_tokenizer", split("((a{999}){999}){999}"))),
        ("a deep pattern", changed("pre_tokenizer", split(&"(".repeat(9999)))),
        ("an empty pattern", changed("pre_tokenizer", split(""))),
        (
            "pieces of no length",
            changed("pre_tokenizer", json!({ "type": "FixedLength", "length": 0 })),
        ),
        (
            "a decoder that cuts more than there is",
            changed("decoder", json!({ "type": "Strip", "content": "H", "start": 0, "stop": 9 })),
        ),
        (
            "a normaliser that is not base64",
            changed("normalizer", json!({ "type": "Precompiled", "precompiled_charsmap": "!" })),
        ),
        (
            "a normaliser whose table lies",
            changed(
                "normalizer",
                json!({ "type": "Precompiled", "precompiled_charsmap": "/////w==" }),
            ),
        ),
        (
            "truncation to less than nothing",
            changed(
                "truncation",
                json!({ "max_length": 0,
            "strategy": "LongestFirst", "stride": 9, "direction": "Right" }),
            ),
        ),
        (
            "padding to no multiple",
            changed(
                "padding",
                json!({ "strategy": { "Fixed": 1u64 << 40 },
            "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "x" }),
            ),
        ),
    ]
}

/// Tokenizers that make a gigabyte of a letter.
fn explosive_tokenizers(valid: &Value) -> Vec<(&'static str, Value)> {
    let changed = |part: &str, value: Value| {
        let mut tokenizer = valid.clone();
        tokenizer[part] = value;
        tokenizer
    };
    let sequence = |list: &str, part: Value, count: usize| json!({ "type": "Sequence", list: vec![part; count] });
    let double = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aa" });
    let between = json!({ "type": "Replace", "pattern": { "Regex": "" }, "content": "aaaa" });
    let twice = json!({ "type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{ "Sequence": { "id": "A", "type_id": 0 } },
                   { "Sequence": { "id": "A", "type_id": 0 } }] });
    let piece = json!({ "SpecialToken": { "id": "x", "type_id": 0 } });
    let many = json!({ "type": "TemplateProcessing", "pair": [],
        "single": vec![piece; 20_000],
        "special_tokens": { "x": { "id": "x", "ids": vec![0; 20_000], "tokens": vec!["x"; 20_000] } } });
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
        "use_regex": false });
    let chain = |list: &str| {
        let inner = json!({ "type": "Sequence", list: [] });
        (0..40).fold(inner, |inner, _| json!({ "type": "Sequence", list: [inner] }))
    };
    vec![
        (
            "letters doubled forty times",
            changed("normalizer", sequence("normalizers", double.clone(), 40)),
        ),
        ("letters between letters", changed("normalizer", sequence("normalizers", between, 12))),
        ("bytes of bytes of bytes", changed("pre_tokenizer", sequence("pretokenizers", bytes, 40))),
        (
            "the text twice, forty times",
            changed("post_processor", sequence("processors", twice, 40)),
        ),
        ("twenty thousand times as many tokens", changed("post_processor", many)),
        (
            "a letter's text doubled forty times",
            changed("decoder", sequence("decoders", double, 40)),
        ),
        ("sequences in sequences to normalise", changed("normalizer", chain("normalizers"))),
        ("sequences in sequences to split", changed("pre_tokenizer", chain("pretokenizers"))),
        ("sequences in sequences to decode", changed("decoder", chain("decoders"))),
    ]
}

#[test]
fn tokenizer_configurations() {
    let mut kind = Kind::new("tokenizer_config.json");
    let files = &valid::models()[0];
    let mut valid = json_of(&files["tokenizer_config.json"]);
    valid["add_bos_token"] = true.into();
    let target = |bytes: &[u8]| targets::model(files, "tokenizer_config.json", bytes);
    feed_json(&mut kind, &valid, 10, 100, &target);
    valid["chat_template"] = json!([{ "name": "default", "template": valid::TEMPLATE },
                                    { "name": "tool_use", "template": "" }]);
    feed_json(&mut kind, &valid, 10, 100, &target);
    kind.done(1000);
}

#[test]
fn templates() {
    let mut kind = Kind::new("chat template");
    assert!(kind.feed("the valid one", valid::TEMPLATE.as_bytes(), targets::template));
    for source in EXPLOSIVE_TEMPLATES {
        let taken = kind.feed(source, source.as_bytes(), targets::template);
        assert!(!taken, "{source}: it is rendered");
    }
    let long = format!(
        "{{% set x %}}{{% for i in range(99999) %}}{}{{% endfor %}}{{% endset %}}",
        "many words ".repeat(2000)
    );
    assert!(!kind.feed("a long text, often", long.as_bytes(), targets::template));
    let wide = format!("{{{{ {} }}}}", vec!["1"; 100_000].join(" + "));
    kind.feed("a wide expression", wide.as_bytes(), targets::template);
    for (open, close) in
        [("(", ")"), ("[", "]"), ("{1:", "}"), ("not ", ""), ("-", ""), ("x[", "]")]
    {
        let deep = format!("{{{{ {}1{} }}}}", open.repeat(5000), close.repeat(5000));
        kind.feed(open, deep.as_bytes(), targets::template);
    }
    let nested = format!("{}x{}", "{% if 1 %}".repeat(5000), "{% endif %}".repeat(5000));
    kind.feed("deep blocks", nested.as_bytes(), targets::template);

    // Those of real models, of which tests/chat.rs knows what they give.
    let real: Value =
        serde_json::from_slice(include_bytes!("fixtures/chat/chat.json")).expect("JSON");
    let mut numbers = Random(3);
    let templates = real["templates"].as_object().expect("templates").values();
    let sources: Vec<&str> =
        templates.filter_map(|entry| entry["template"].as_str()).chain([valid::TEMPLATE]).collect();
    assert!(sources.len() > 3);
    for source in &sources {
        for length in (0..source.len()).step_by(23) {
            kind.feed("cut", &source.as_bytes()[..length], targets::template);
        }
    }
    for _ in 0..1500 {
        let source = *numbers.pick(&sources);
        kind.feed("bytes", &spoil::bytes(source.as_bytes(), &mut numbers), targets::template);
        let (one, other) = (*numbers.pick(&sources), *numbers.pick(&sources));
        let cut = |text: &str, at: usize| text.bytes().take(at).collect::<Vec<u8>>();
        let at = numbers.below(one.len());
        let mixed = [cut(one, at), other.as_bytes().to_vec()].concat();
        kind.feed("two in one", &mixed, targets::template);
    }
    kind.done(3000);
}

/// Templates that never end, or that take all memory there is.
const EXPLOSIVE_TEMPLATES: [&str; 27] = [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include 'chat_template' %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ 'x' * 99999999 }}",
    "{{ 'x' * 99999 * 999 }}",
    "{{ ('x' * 999) * 999 * 90 }}",
    "{{ [1] * 99999999 }}",
    "{{ ([1] * 99999999) | list }}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='xxxx') %}{% for i in range(99999) %}{% set ns.x = 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' ~ ns.x %}{% endfor %}",
    "{% macro f(x, n) %}{% if n %}{{ f(x ~ x, n - 1) }}{% endif %}{% endmacro %}{{ f('x', 99) }}",
    "{% macro f(x, y=x ~ x) %}{{ f(y) }}{% endmacro %}{{ f('xxxxxxxx') }}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set t %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = t %}{% endfor %}",
    "{% set ns = namespace(x=['x']) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=['x']) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "{% set ns = namespace(x=['x']) %}{% for i in range(99) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ (ns.x ~ '') | length }}",
    "{% set ns = namespace(x=['x']) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | join('') }}",
    "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x | replace('x', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('x', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x.join([ns.x, ns.x, ns.x]) %}{% endfor %}",
    "{{ 'a' | indent(99999999999) }}",
    "{{ '%99999999999d' | format(1) }}",
    "{{ '{:>99999999999}'.format(1) }}",
    "{{ [1] | batch(99999999999, 'x') | list }}",
    "{{ [1] | slice(99999999999, 'x') | list }}",
];

#[test]
fn policies() {
    let mut kind = Kind::new("policy file");
    feed_json(&mut kind, &valid::policy_file(), 12, 300, &targets::policy_file);
    kind.done(1500);

    let mut kind = Kind::new("policy text");
    let mut numbers = Random(4);
    let words: Vec<&str> = valid::POLICIES.iter().flat_map(|text| text.split(' ')).collect();
    let numbers_in_words =
        ["-1", "0", "1e39", "NaN", "inf", "99999999999999999999", "", "0x10", "½"];
    for text in valid::POLICIES.into_iter().chain(["0.5 1;2 3"]) {
        assert!(kind.feed("a valid one", text.as_bytes(), targets::policy_text), "{text}");
        for length in 0..text.len() {
            kind.feed("cut", &text.as_bytes()[..length], targets::policy_text);
        }
        for _ in 0..200 {
            kind.feed("bytes", &spoil::bytes(text.as_bytes(), &mut numbers), targets::policy_text);
            let word = |numbers: &mut Random| {
                let word = *numbers.pick(&words);
                match (numbers.below(3), word.split_once('=')) {
                    (0, Some((name, _))) => format!("{name}={}", numbers.pick(&numbers_in_words)),
                    _ => word.to_owned(),
                }
            };
            let mixed: Vec<String> = (0..numbers.below(8)).map(|_| word(&mut numbers)).collect();
            kind.feed("words", mixed.join(" ").as_bytes(), targets::policy_text);
        }
    }
    for (what, bytes) in spoil::never_valid() {
        assert!(!kind.feed(what, &bytes, targets::policy_text), "{what}");
    }
    kind.done(2000);
}

#[test]
fn sessions() {
    let mut kind = Kind::new("session file");
    let mut numbers = Random(5);
    for whole in valid::sessions() {
        assert!(kind.feed("the valid one", &whole, targets::session));
        let (header, data) = forged::split(&whole);
        spoil::json(&header, 12, &mut |what, header| {
            kind.feed(what, &forged::session(header, data), targets::session);
        });
        let begin = whole.len() - data.len();
        for length in (0..begin + 16).step_by(11).chain((begin..whole.len()).step_by(199)) {
            assert!(!kind.feed("cut", &whole[..length], targets::session), "{length}");
        }
        for _ in 0..300 {
            kind.feed("bytes", &spoil::bytes(&whole, &mut numbers), targets::session);
            // With a sum that is right: what a forger can do.
            let spoilt = spoil::json_at_random(&header, &mut numbers);
            kind.feed("forged fields", &forged::session(&spoilt, data), targets::session);
            let mut data = data.to_vec();
            for _ in 0..1 + numbers.below(3) {
                let at = numbers.below(data.len() / 4) * 4;
                let word =
                    *numbers.pick(&[0, 1, 16, 0x7fff, 0xffff, 1 << 31, 0x7f80_0000, u32::MAX]);
                data[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
            let text = header.to_string();
            kind.feed("forged data", &forged::session(text.as_bytes(), &data), targets::session);
        }
        // Numbers that are texts.
        for field in ["policy", "context", "prompt", "length", "exact_from", "thresholds"] {
            for text in [
                "0",
                "1",
                "-1",
                "16",
                "48",
                "51",
                "60",
                "61",
                "64",
                "65",
                "4294967296",
                "18446744073709551615",
                "",
                "NaN",
                "dense",
                "delta page=16 window=16",
                "paper page=128",
                "1;1",
                "1e4 1e4",
            ] {
                let mut spoilt = header.clone();
                spoilt["__metadata__"][field] = text.into();
                let bytes = forged::session(spoilt.to_string().as_bytes(), data);
                kind.feed(&format!("{field} = {text}"), &bytes, targets::session);
            }
        }
    }
    for (what, bytes) in spoil::never_valid() {
        assert!(!kind.feed(what, &bytes, targets::session), "{what}");
    }
    kind.done(5000);
}

#[test]
fn tunings() {
    let mut kind = Kind::new("tunings");
    feed_json(&mut kind, &valid::tunings(), 8, 200, &targets::tunings);
    kind.done(800);
}

#[test]
fn tasks() {
    let mut kind = Kind::new("tasks");
    let target = |bytes: &[u8]| targets::task("jsonl", bytes);
    for row in valid::rows() {
        feed_json(&mut kind, &row, 8, 40, &target);
    }
    feed_json(&mut kind, &valid::squad(), 8, 100, &|bytes| targets::task("json", bytes));
    for (what, bytes) in spoil::never_valid() {
        kind.feed(what, &bytes, |bytes| targets::task("txt", bytes));
    }
    let rows: Vec<String> = valid::rows().iter().map(Value::to_string).collect();
    kind.feed("every kind in one file", rows.join("\n").as_bytes(), target);
    let long = |text: &str| text.repeat(1 << 20);
    let wide = |count: usize| vec!["b"; count];
    let context = "c".repeat(300_000);
    for (what, row) in [
        ("a line of megabytes", json!({ "text": long("word ") })),
        ("many choices", json!({ "context": "c", "choices": wide(100_000), "label": 0 })),
        ("no choices", json!({ "context": "c", "choices": [], "label": 0 })),
        (
            "a long text with many choices",
            json!({ "context": context, "choices": wide(50_000), "label": 0 }),
        ),
        (
            "a long text with a thousand choices",
            json!({ "context": context, "choices": wide(1000), "label": 0 }),
        ),
        (
            "a long text with many endings",
            json!({ "ctx_a": context, "ctx_b": "", "activity_label": "", "label": 0,
                    "endings": wide(50_000) }),
        ),
        (
            "a long question with many answers",
            json!({ "question": context, "answerKey": "b",
                    "choices": { "text": wide(50_000), "label": wide(50_000) } }),
        ),
        (
            "brackets without end",
            json!({ "ctx_a": long("[") , "ctx_b": "", "activity_label": "",
            "label": 0, "endings": ["a", "b"] }),
        ),
    ] {
        kind.feed(what, row.to_string().as_bytes(), target);
    }
    let question = json!({ "question": "q", "answers": [] });
    let paragraph = json!({ "context": context, "qas": vec![question; 20_000] });
    let file = json!({ "data": [{ "paragraphs": [paragraph] }] }).to_string();
    kind.feed("a long text with many questions", file.as_bytes(), |bytes| {
        targets::task("json", bytes)
    });
    kind.done(4000);
}

#[test]
fn places_where_files_should_be() {
    let mut kind = Kind::new("directory");
    let files = valid::sharded();
    let names: Vec<&String> = files.keys().collect();
    let write = || {
        let dir = tempfile::tempdir().expect("a directory");
        files.iter().for_each(|(name, bytes)| {
            fs::write(dir.path().join(name), &bytes[..]).expect("written")
        });
        dir
    };
    let dir = write();
    assert!(kind.feed("the valid one", b"", |_| targets::directory(dir.path())));
    for name in names {
        let spoilt = |kind: &mut Kind, what: &str, spoil: &dyn Fn(&std::path::Path)| {
            let dir = write();
            let path = dir.path().join(name);
            fs::remove_file(&path).expect("removed");
            spoil(&path);
            kind.feed(&format!("{name} {what}"), b"", |_| targets::directory(dir.path()))
        };
        spoilt(&mut kind, "is not there", &|_| ());
        spoilt(&mut kind, "is empty", &|path| fs::write(path, b"").expect("written"));
        let taken =
            spoilt(&mut kind, "is a directory", &|path| fs::create_dir(path).expect("made"));
        assert!(!taken, "{name}: a directory is read");
        #[cfg(unix)]
        for to in ["absent", "/dev/zero", "/dev/null", "..", name.as_str()] {
            let what = format!("is a link to {to}");
            let link = |path: &std::path::Path| {
                std::os::unix::fs::symlink(to, path).expect("a link");
            };
            assert!(!spoilt(&mut kind, &what, &link), "{name} {what}: it is read");
        }
        #[cfg(unix)]
        assert!(
            !spoilt(&mut kind, "is a pipe", &|path| {
                let made = std::process::Command::new("mkfifo").arg(path).status();
                assert!(made.expect("mkfifo").success());
            }),
            "{name}: a pipe is read"
        );
    }
    kind.done(40);
}
