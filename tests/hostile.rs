//! Files that lie: thousands of spoilt inputs of every kind that this crate reads, each of which is
//! taken or refused with an error that names it, without a panic and without taking memory out of
//! proportion. See `hostile_common` for the rule, and `fuzz` for the same without end.
//!
//! Counts are fixed, not times, and so are the seeds: a failure comes again. `--nocapture` prints
//! what was tried.
#![cfg(feature = "chat")]

mod hostile_common;

use std::cell::RefCell;
use std::fs;

use hostile_common::kind::Kind;
use hostile_common::spoil::{self, Random};
use hostile_common::valid::{self, json_of};
use hostile_common::{Outcome, explosive, forged, memory, targets};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

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

/// Every kind has a fuzzer, and takes what is valid.
#[test]
fn every_kind_has_a_fuzzer() {
    let fuzzers = include_str!("fuzz/Cargo.toml");
    let mut kind = Kind::new("valid inputs");
    for name in targets::NAMES {
        assert!(fuzzers.contains(&format!("name = \"{name}\"\n")), "{name} has no fuzzer");
        for seed in valid::seeds(name) {
            assert!(kind.feed(name, &seed, |bytes| targets::by_name(name, bytes)), "{name}");
        }
    }
    // And one program that writes the seeds.
    assert_eq!(fuzzers.matches("[[bin]]").count(), targets::NAMES.len() + 1);
    kind.done(14);
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
    feed_json(&mut kind, &valid, 3, 200, &|bytes| targets::model(files, name, bytes));
    let first = valid["weight_map"].as_object().expect("a map").keys().next().expect("a tensor");
    for shard in
        ["", ".", "..", "/", "../part-0.safetensors", "/dev/zero", "a/b", "config.json", "absent"]
    {
        let mut spoilt = valid.clone();
        spoilt["weight_map"][first] = shard.into();
        let bytes = spoilt.to_string().into_bytes();
        let taken = kind.feed(shard, &bytes, |bytes| targets::model(files, name, bytes));
        assert!(!taken, "{shard}");
    }
    // A fuzzer found that this filled the screen.
    let mut spoilt = valid.clone();
    spoilt["weight_map"]["weight".repeat(300)] = "part-0.safetensors".into();
    let bytes = spoilt.to_string().into_bytes();
    assert!(!kind.feed("a long name", &bytes, |bytes| targets::model(files, name, bytes)));
    kind.done(700);
}

#[test]
fn tokenizers() {
    let mut kind = Kind::new("tokenizer.json");
    let files = &valid::models()[0];
    let valid = json_of(&files["tokenizer.json"]);
    let target = |bytes: &[u8]| targets::model(files, "tokenizer.json", bytes);
    feed_json(&mut kind, &valid, 3, 800, &target);
    for (what, changed) in explosive::inconsistent_tokenizers(&valid) {
        kind.feed(what, changed.to_string().as_bytes(), target);
    }
    for (what, changed) in explosive::explosive_tokenizers(&valid) {
        let taken = kind.feed(what, changed.to_string().as_bytes(), target);
        assert!(!taken, "{what}: it is taken");
    }
    kind.done(2500);
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
    for source in explosive::TEMPLATES {
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
    // What is too much by far, and what is just below the limits: neither overflows the stack.
    let chains = [
        ("1", " ~ 1"),
        ("x", ".y"),
        ("x", "[0]"),
        ("x", "|list"),
        ("1", " and 1"),
        ("f", "()"),
        ("1", " == 1"),
        ("1", " is odd"),
        ("1", " if 1 else 1"),
        ("1", " ** 1"),
        ("'a'", " 'a'"),
        ("", "-"),
        ("", "not "),
        ("", "x, "),
        ("x", "|trim|trim"),
        ("", "[1, "),
        ("", "f(x ~ "),
    ];
    for count in [40, 90, 190, 50_000] {
        let branches = format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(count));
        kind.feed("many branches", branches.as_bytes(), targets::template);
        for (first, more) in chains {
            let close = match more {
                "[1, " => "]".repeat(count),
                "f(x ~ " => ")".repeat(count),
                _ => String::new(),
            };
            let last = if first.is_empty() { "1" } else { "" };
            let chain = format!("{{{{ {first}{}{last}{close} }}}}", more.repeat(count));
            kind.feed(more, chain.as_bytes(), targets::template);
        }
        let tall =
            (0..count.min(140)).fold("1".to_owned(), |inner, _| format!("({inner} + 1 + 1)"));
        kind.feed("tall", format!("{{{{ {tall} }}}}").as_bytes(), targets::template);
    }
    let tags = "{{ x }}".repeat(140_000);
    kind.feed("many tags", tags.as_bytes(), targets::template);

    let mut numbers = Random(6);
    for _ in 0..200 {
        let source = explosive::growing_template(&mut numbers);
        kind.feed("growing", source.as_bytes(), targets::template);
    }

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
fn self_tests() {
    let mut kind = Kind::new("self-tests");
    feed_json(&mut kind, &valid::self_tests(), 8, 200, &targets::self_tests);
    kind.done(400);
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

/// JSON of whatever shape, with the names that rows and policies have.
fn any_json(names: &'static [&'static str]) -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-2i64..12).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[ -~]{0,8}|\\PC{0,3}".prop_map(Value::from),
        proptest::sample::select(names).prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 6, move |inner| {
        let name = prop_oneof![
            8 => proptest::sample::select(names).prop_map(str::to_owned),
            1 => "\\PC{0,4}",
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((name, inner), 0..8).prop_map(|entries| Value::from(
                entries.into_iter().collect::<serde_json::Map<_, _>>()
            )),
        ]
    })
}

/// What a property test makes; what breaks the rule is made as small as it gets.
fn feed_any<T: Strategy>(
    kind: &mut Kind,
    cases: u32,
    strategy: T,
    text: fn(&T::Value) -> String,
    target: &dyn Fn(&[u8]) -> Outcome,
) {
    let config = Config {
        cases,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(1),
        ..Config::default()
    };
    let kind = RefCell::new(kind);
    let run = TestRunner::new(config).run(&strategy, |value| {
        let mut kind = kind.borrow_mut();
        let before = kind.failed();
        kind.feed("any", text(&value).as_bytes(), target);
        prop_assert!(kind.failed() == before, "it breaks the rule");
        Ok(())
    });
    if let Err(error) = run {
        kind.borrow_mut().fail(error.to_string(), "at the least", b"");
    }
}

#[test]
fn whatever_is_json() {
    let mut kind = Kind::new("any JSON");
    let rows = any_json(&[
        "text",
        "context",
        "choices",
        "label",
        "question",
        "question_stem",
        "answers",
        "answer",
        "answerKey",
        "depth",
        "length",
        "sentence",
        "option1",
        "option2",
        "goal",
        "sol1",
        "sol2",
        "ctx_a",
        "ctx_b",
        "activity_label",
        "endings",
        "doc",
        "arguments",
        "target",
        "gen_args_0",
        "arg_0",
        "arg_1",
        "id",
        "title",
        "prompt",
        "no_answer",
        "a _ b",
        "1",
    ]);
    feed_any(&mut kind, 3000, rows, Value::to_string, &|bytes| targets::task("jsonl", bytes));
    let squad = any_json(&["data", "paragraphs", "qas", "context", "question", "answers", "title"]);
    feed_any(&mut kind, 1000, squad, Value::to_string, &|bytes| targets::task("json", bytes));
    let policy = any_json(&[
        "format",
        "deltallm policy",
        "version",
        "policy",
        "delta",
        "thresholds",
        "calibration",
        "model",
        "measured",
        "dense",
    ]);
    feed_any(&mut kind, 1000, policy, Value::to_string, &targets::policy_file);
    let text = "(dense|delta|paper|)( (keys|theta|sink|page|window|alpha)=[-0-9.a-z]{0,6}){0,4}";
    feed_any(&mut kind, 1000, text, String::clone, &targets::policy_text);
    let template = "(\\{\\{|\\{%|set|for|in|ns|messages|if|~|\\+|\\*|\\||trim|tojson|'x'|\\(|\\)|\\[|\\]| |%\\}|\\}\\}){0,24}";
    feed_any(&mut kind, 2000, template, String::clone, &targets::template);
    kind.done(8000);
}

#[test]
fn places_where_files_should_be() {
    let mut kind = Kind::new("directory");
    let files = valid::sharded();
    let names: Vec<&String> = files.keys().collect();
    let write = || {
        let dir = valid::directory();
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
