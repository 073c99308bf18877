//! The command line, as a newcomer, a script and an impatient user meet it.
#![cfg(all(feature = "cli", feature = "demo"))]

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{Golden, distance, fixture};
use deltallm::delta::AttentionPolicy;
use safetensors::SafeTensors;
use serde_json::Value;

fn deltallm(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deltallm"));
    // What is found out about adapters is nothing to leave in a user's home.
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    command.args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    deltallm(args).output().expect("the program starts")
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&out(output)).expect("one JSON object")
}

fn ok(output: Output) -> Output {
    assert!(output.status.success(), "{}", err(&output));
    output
}

#[test]
fn without_a_model_the_one_inside_runs_and_says_so() {
    let adapter = common::test_adapter();
    for device in ["cpu", &adapter] {
        let args = ["generate", "Anna put the red ball", "--device", device, "-n", "8"];
        let output = ok(run(&[&args[..], &["--ignore-eos"]].concat()));
        assert!(err(&output).contains(deltallm::demo::DESCRIPTION), "{}", err(&output));
        assert!(!out(&output).trim().is_empty());
    }
    let output = ok(run(&["inspect"]));
    for word in ["BitNetForCausalLM", "4.8 M", "packed ternary"] {
        assert!(out(&output).contains(word), "{word}: {}", out(&output));
    }
    let dir = tempfile::tempdir().expect("directory");
    let (ids, logits) = (dir.path().join("ids"), dir.path().join("logits.safetensors"));
    fs::write(&ids, "0 5 6").expect("written");
    ok(run(&["logits", "--ids", path(&ids), "--out", path(&logits), "--device", "cpu"]));
    assert!(logits.is_file());
}

#[test]
fn the_prompt_comes_from_an_argument_a_file_or_standard_input() {
    let model = fixture("llama-64");
    let options = ["--model", path(&model), "--device", "cpu", "-n", "6", "--ignore-eos"];
    let with = |more: &[&str]| deltallm(&[&["generate"], more, &options[..]].concat());
    let text = "Hello there";
    let expected = out(&ok(with(&[text]).output().expect("runs")));

    let file = tempfile::NamedTempFile::new().expect("file");
    fs::write(file.path(), text).expect("write");
    let from_file = with(&["--file", path(file.path())]).output().expect("runs");
    assert_eq!(out(&ok(from_file)), expected);

    for dash in [&["-"][..], &[]] {
        let mut child =
            with(dash).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("starts");
        child.stdin.take().expect("stdin").write_all(text.as_bytes()).expect("write");
        assert_eq!(out(&ok(child.wait_with_output().expect("ends"))), expected);
    }
    let echoed = with(&[text, "--echo"]).output().expect("runs");
    assert_eq!(out(&ok(echoed)), format!("{text}{expected}"));
}

#[test]
fn json_holds_everything_a_script_asks_for() {
    let model = fixture("llama-32");
    let golden = fs::read_to_string(model.join("generation.json")).expect("file");
    let golden: Value = serde_json::from_str(&golden).expect("json");
    let prompt = golden["prompt"].as_str().expect("prompt");
    let args = ["generate", prompt, "--model", path(&model), "--device", "cpu", "--cache", "f32"];
    let more = ["-n", "32", "--ignore-eos", "--json"];
    let output = ok(run(&[&args[..], &more].concat()));
    let json = json(&output);
    assert_eq!(json["prompt_ids"], golden["ids"]);
    assert_eq!(json["ids"], golden["continuation_ids"]);
    assert_eq!(json["text"], golden["continuation"]);
    assert_eq!(json["finish_reason"], "max_tokens");
    assert_eq!(json["device"]["backend"], "cpu");
    for field in ["load_s", "prefill_s", "prefill_tokens_per_s", "decode_s", "decode_tokens_per_s"]
    {
        assert!(json["timings"][field].as_f64().is_some_and(|x| x > 0.0), "{field}: {json}");
    }
    for field in ["weights", "activations"] {
        assert!(json["bytes"][field].as_u64().is_some_and(|x| x > 0), "{field}: {json}");
    }
    // In use twice what f16 would take, for the tokens there are; held for those to come too.
    for part in ["keys", "values"] {
        let bytes = |field: &str| json["bytes"][part][field].as_u64().expect(field);
        assert_eq!(bytes("in_use"), 2 * bytes("dense_f16"), "{part}: {json}");
        assert!(bytes("held") > bytes("in_use"), "{part}: {json}");
    }
}

#[test]
fn options_of_sampling_and_formats_reach_every_device() {
    let model = fixture("bitnet-64");
    let adapter = common::test_adapter();
    for device in ["cpu", &adapter] {
        let run_with = |more: &[&str]| {
            let args = ["generate", "Hello", "--model", path(&model), "--device", device];
            let output =
                ok(run(&[&args[..], &["-n", "12", "--ignore-eos", "--json"], more].concat()));
            json(&output)
        };
        let greedy = run_with(&["--temperature", "0"]);
        // The fixture's generation_config.json recommends to draw.
        assert_ne!(run_with(&[])["ids"], greedy["ids"]);
        for weights in ["q8", "q4"] {
            let made = run_with(&["--weights", weights, "--cache", "f32"]);
            assert_eq!(made["ids"].as_array().map(Vec::len), Some(12));
        }
        assert_eq!(run_with(&["--seed", "5"])["ids"], run_with(&["--seed", "5"])["ids"]);
        assert_ne!(run_with(&["--seed", "5"])["ids"], run_with(&["--seed", "6"])["ids"]);
        assert_eq!(run_with(&["--top-k", "1"])["ids"], greedy["ids"]);
        let text = greedy["text"].as_str().expect("text");
        let stop: String = text.chars().skip(4).take(2).collect();
        let stopped = run_with(&["--temperature", "0", "--stop", &stop]);
        assert_eq!(stopped["finish_reason"], "stop");
        assert_eq!(stopped["text"].as_str(), text.find(&stop).map(|at| &text[..at]));
    }
}

#[test]
fn verbose_reports_times_and_memory() {
    let output = ok(run(&["generate", "Hi", "--device", "cpu", "-n", "3", "--verbose"]));
    for word in ["device", "load", "prefill", "decode", "memory", "cache", "tokens/s"] {
        assert!(err(&output).contains(word), "{word}: {}", err(&output));
    }
    assert!(err(&output).contains(&format!("policy    {}", AttentionPolicy::dense())));
}

#[test]
fn logits_are_written_whole_or_not_at_all() {
    let (model, golden) = (fixture("llama-80"), Golden::read("llama-80"));
    let dir = tempfile::tempdir().expect("directory");
    let (ids, file) = (dir.path().join("ids.txt"), dir.path().join("logits.safetensors"));
    let numbers: Vec<String> = golden.ids("ids_65").iter().map(u32::to_string).collect();
    let (first, rest) = numbers.split_at(20);
    fs::write(&ids, format!("{}\n{},\n", first.join(" "), rest.join(","))).expect("write");

    let args = ["logits", "--model", path(&model), "--ids", path(&ids), "--out", path(&file)];
    let cpu = ["--device", "cpu", "--cache", "f32"];
    ok(run(&[&args[..], &cpu].concat()));
    let bytes = fs::read(&file).expect("written");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let logits = tensors.tensor("logits").expect("logits");
    let vocabulary = golden.floats("logits_65").len() / 65;
    assert_eq!(logits.shape(), [65, vocabulary]);
    let found: Vec<f32> = logits
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let apart = distance(&found, golden.floats("logits_65"), vocabulary);
    assert!(apart.max < 1e-3, "{apart:?}");

    // A link keeps pointing where it points; what is no regular file is left alone.
    #[cfg(unix)]
    {
        let elsewhere = tempfile::tempdir().expect("directory");
        let link = elsewhere.path().join("link");
        std::os::unix::fs::symlink(&file, &link).expect("link");
        let to = |out| ["logits", "--model", path(&model), "--ids", path(&ids), "--out", out];
        ok(run(&[&to(path(&link))[..], &cpu].concat()));
        assert!(link.is_symlink() && fs::read(&file).expect("written") == bytes);
        let output = run(&[&to("/dev/null")[..], &cpu].concat());
        assert!(err(&output).contains("not a regular file"), "{}", err(&output));
    }

    for (text, word) in [("1 2 x", "\"x\""), ("1 99999", "99999"), ("", "no tokens")] {
        fs::write(&ids, text).expect("write");
        let output = run(&[&args[..], &cpu].concat());
        assert!(!output.status.success());
        assert!(err(&output).contains(word), "{}", err(&output));
        assert_eq!(fs::read(&file).expect("still there"), bytes, "the old file is kept");
        assert_eq!(fs::read_dir(dir.path()).expect("directory").count(), 2, "nothing is left over");
    }
}

#[test]
fn inspect_shows_a_model_without_a_device() {
    for name in common::LLAMAS.into_iter().chain(common::BITNETS) {
        let dir = fixture(name);
        let output = ok(run(&["inspect", path(&dir), "--tensors", "--context", "100"]));
        for word in ["architecture", "ForCausalLM", "model.norm.weight", "for 100 tokens", "cache"]
        {
            assert!(out(&output).contains(word), "{name}, {word}: {}", out(&output));
        }
    }
}

/// Options of a policy, and the policy as it is printed.
const POLICIES: [(&[&str], &str); 9] = [
    (&[], "dense"),
    (&["--cache", "f32", "--values", "int8"], "exact=f32 values=int8"),
    (&["--attention", "delta"], "delta"),
    (&["--keys", "delta"], "delta"),
    (&["--attention", "paper", "--theta", "1.5sigma"], "paper theta=1.5sigma"),
    (
        &["--attention", "paper", "--keys", "channel2", "--page", "16"],
        "paper keys=channel2 page=16",
    ),
    (
        &["--keys", "delta", "--reference", "anchored", "--deltas", "int4", "--theta", "0.25"],
        "delta reference=anchored deltas=int4 theta=0.25",
    ),
    (
        &["--keys", "int8", "--sink", "0", "--alpha", "0.5", "--window-shape", "block"],
        "keys=int8 sink=0 alpha=0.5 shape=block",
    ),
    (&["--policy", "delta window=7 values=int4"], "delta window=7 values=int4"),
];

#[test]
fn policy_options_make_the_policy() {
    let model = fixture("llama-32");
    for (options, expected) in POLICIES {
        let args = ["generate", "Hi", "--model", path(&model), "--device", "cpu", "-n", "2"];
        let output = ok(run(&[&args[..], &["--json"], options].concat()));
        let json = json(&output);
        let expected: AttentionPolicy = expected.parse().expect(expected);
        assert_eq!(json["policy"], expected.to_string(), "{options:?}");
    }
}

#[test]
fn policies_out_of_range_say_what_is_allowed() {
    let refused: [(&[&str], &str); 15] = [
        (&["--attention", "delta", "--keys", "int8", "--theta", "3"], "--keys is int8"),
        (&["--keys", "delta", "--theta", "20000sigma"], "theta = 20000sigma"),
        (&["--theta", "1"], "add --attention delta"),
        (&["--keys", "int8", "--reference", "mean"], "--keys is int8"),
        (&["--attention", "dense", "--deltas", "int4"], "--keys delta"),
        (&["--sink", "8"], "needs compressed keys"),
        (&["--values", "int8", "--window", "8"], "needs compressed keys"),
        (&["--attention", "dense", "--keys", "int8"], "--attention dense keeps keys plain"),
        (&["--attention", "paper", "--keys", "plain"], "contradicts"),
        (&["--attention", "delta", "--theta", "-1"], "from 0 to 10000"),
        (&["--attention", "delta", "--alpha", "-0.1"], "from 0 to 1"),
        (&["--attention", "delta", "--sink", "1025"], "from 0 to 1024"),
        (&["--attention", "delta", "--window", "0"], "from 1 to 65536"),
        (&["--attention", "delta", "--page", "48"], "16, 32, 64 or 128"),
        (&["--policy", "delta depth=3"], "no such field"),
    ];
    let model = fixture("llama-32");
    for command in [&["generate", "x"][..], &["inspect", path(&model)]] {
        for (options, allowed) in refused {
            let output = run(&[command, options].concat());
            assert_eq!(output.status.code(), Some(1), "{options:?}");
            assert!(err(&output).contains(allowed), "{options:?}: {}", err(&output));
        }
        // What the parser of options refuses.
        for (options, word) in [
            (&["--theta", "much"][..], "must be a number"),
            (&["--policy", "dense", "--sink", "3"], "--sink"),
            (&["--attention", "sparse"], "paper"),
        ] {
            let output = run(&[command, options].concat());
            assert_eq!(output.status.code(), Some(2), "{options:?}");
            assert!(err(&output).contains(word), "{options:?}: {}", err(&output));
        }
    }
}

#[test]
fn help_states_the_defaults_of_every_policy_option() {
    let help = out(&ok(run(&["generate", "--help"])));
    for word in [
        "[default: dense]",
        "[default: 0.7sigma, 0.6 with --attention paper]",
        "[default: mean, continuous with --attention paper]",
        "[default: int4, f16 with --attention paper]",
        "[default: sliding, block with --attention paper]",
    ] {
        assert!(help.contains(word), "{word}: {help}");
    }
}

#[test]
fn what_the_cache_holds_is_reported() {
    let model = fixture("llama-64");
    let text = "Anna put the red ball in the box. ".repeat(10);
    let args = ["generate", &text, "--model", path(&model), "--device", "cpu", "-n", "3"];
    let policy = ["--attention", "delta", "--page", "16", "--json", "--verbose", "--ignore-eos"];
    let output = ok(run(&[&args[..], &policy].concat()));
    let json = json(&output);
    let cache = &json["cache"];
    let length = json["prompt_ids"].as_array().expect("ids").len() as u64 + 2;
    assert_eq!(cache["length"], length);
    // 2 layers, 2 heads of 64 elements.
    assert_eq!(cache["pages"], length / 16 * 4);
    assert_eq!(cache["key_elements"], length / 16 * 4 * 16 * 64);
    let number = |field: &str| cache[field].as_f64().expect(field);
    let bits = 8.0 * number("bytes") / number("key_elements");
    assert!((number("bits_per_key_element") - bits).abs() < 1e-9);
    assert!((number("zeros") - number("zero_elements") / number("key_elements")).abs() < 1e-9);
    assert!((number("sparsity") - 0.95 * number("zeros")).abs() < 1e-6);
    assert!(cache["theta"]["min"].as_f64() <= cache["theta"]["mean"].as_f64());
    let layers = cache["layers"].as_array().expect("layers");
    let sum = |field: &str| -> u64 {
        let heads = layers.iter().flat_map(|layer| layer["heads"].as_array().expect("heads"));
        heads.map(|head| head[field].as_u64().expect(field)).sum()
    };
    for field in ["pages", "zero_elements", "bytes"] {
        assert_eq!(cache[field], sum(field), "{field}");
    }
    let bytes = |part: &str, field: &str| json["bytes"][part][field].as_u64().expect(field);
    // 4 heads of 64 elements in f16: the sink and a ring that holds this text.
    let originals = 4 * 64 * 2 * length;
    assert_eq!(bytes("keys", "in_use"), cache["bytes"].as_u64().expect("bytes") + originals);
    assert!(bytes("keys", "held") >= bytes("keys", "in_use"), "{json}");
    assert_eq!(bytes("values", "in_use"), bytes("values", "dense_f16"));
    assert_eq!(bytes("values", "dense_f16"), originals);
    for word in ["bits a key element", "sparsity", "theta", "KV head", "dense f16 takes", "held"] {
        assert!(err(&output).contains(word), "{word}: {}", err(&output));
    }
}

#[test]
fn a_session_is_saved_and_goes_on() {
    let model = fixture("llama-64");
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("story.session");
    let on = |device: &str, more: &[&str]| {
        let args = ["generate", "--model", path(&model), "--device", device, "--ignore-eos"];
        run(&[&args[..], &["--temperature", "0"], more].concat())
    };
    let text = "Anna put the red ball in the box. ".repeat(5);
    let policy = ["--attention", "delta", "--page", "16", "--window", "16", "--json"];
    let whole = ok(on("cpu", &[&[&text, "-n", "20"], &policy[..]].concat()));
    let save = [&[&text, "-n", "8", "--save", path(&file)], &policy[..]].concat();
    let first = ok(on("cpu", &save));
    let ids = |output: &Output| json(output)["ids"].as_array().expect("ids").clone();
    for device in ["cpu", "reference"] {
        let then = ok(on(device, &["--load", path(&file), "-n", "12", "--json"]));
        assert_eq!([ids(&first), ids(&then)].concat(), ids(&whole), "{device}");
        assert_eq!(json(&then)["policy"], json(&first)["policy"], "{device}");
        assert_eq!(json(&then)["context"], json(&first)["context"], "{device}");
    }
    // A prompt is appended, and what it made is saved in place of what was loaded.
    let more = ["--load", path(&file), " Tom", "-n", "4", "--save", path(&file), "--json"];
    let before = fs::metadata(&file).expect("file").len();
    assert_eq!(ids(&ok(on("cpu", &more))).len(), 4);
    assert!(fs::metadata(&file).expect("file").len() > before);

    for options in [&["--sink", "3"][..], &["--policy", "dense"], &["--context", "9"], &["--echo"]]
    {
        let output = on("cpu", &[&["--load", path(&file)], options].concat());
        assert_eq!(output.status.code(), Some(2), "{options:?}");
        assert!(err(&output).contains(options[0]), "{options:?}: {}", err(&output));
    }
    let absent = dir.path().join("absent").join("session");
    for (options, word) in [
        (["--load", path(&absent)], "absent"),
        (["--load", path(&model)], "not a regular file"),
        (["--save", path(&absent)], "absent"),
        (["--save", path(&model)], "not a regular file"),
    ] {
        let prompt = if options[0] == "--save" { &["x"][..] } else { &[] };
        let output = on("cpu", &[prompt, &options].concat());
        assert_eq!(output.status.code(), Some(1), "{options:?}");
        assert!(err(&output).contains(word), "{options:?}: {}", err(&output));
    }
    let other = fixture("llama-32");
    let args = ["generate", "--model", path(&other), "--device", "cpu", "--load", path(&file)];
    assert!(err(&run(&args)).contains("head_dim=64"), "another model");
}

#[test]
fn a_session_is_saved_although_nobody_reads_the_text() {
    let model = fixture("llama-64");
    let dir = tempfile::tempdir().expect("directory");
    for more in [&[][..], &["--echo"], &["--json"]] {
        let file = dir.path().join(format!("{}.session", more.len()));
        let args = ["generate", "Anna", "--model", path(&model), "--device", "cpu"];
        let save = ["-n", "20", "--ignore-eos", "--save", path(&file)];
        let mut command = deltallm(&[&args[..], &save, more].concat());
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
        drop(child.stdout.take());
        ok(child.wait_with_output().expect("ends"));
        let load = ["generate", "--model", path(&model), "--device", "cpu", "--load", path(&file)];
        ok(run(&[&load[..], &["-n", "2"]].concat()));
        fs::remove_file(&file).expect("saved");
    }
}

#[test]
fn a_full_session_loads_and_says_that_it_is_full() {
    let model = fixture("llama-64");
    let file = tempfile::NamedTempFile::new().expect("file");
    let args = ["generate", "--model", path(&model), "--device", "cpu", "--ignore-eos", "--json"];
    let on = |more: &[&str]| run(&[&args[..], more].concat());
    let full = ok(on(&["Anna", "--context", "12", "-n", "50", "--save", path(file.path())]));
    assert_eq!(json(&full)["finish_reason"], "context_full");
    for (n, reason) in [("0", "max_tokens"), ("5", "context_full")] {
        let output = ok(on(&["--load", path(file.path()), "-n", n]));
        assert_eq!(json(&output)["finish_reason"], reason);
        assert_eq!(json(&output)["ids"], Value::Array(Vec::new()));
        assert_eq!(err(&output).contains("fixed when it is first saved"), n == "5", "{n}");
    }
    let output = on(&["--load", path(file.path()), "more", "-n", "5"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("fixed when it is first saved"), "{}", err(&output));
}

/// Its tags are well formed and closed.
fn check_svg(picture: &str, name: &str) {
    use svg::node::element::tag::Type;
    use svg::parser::Event;
    let mut open = Vec::new();
    for event in svg::read(picture).expect(name) {
        match event {
            Event::Error(error) => panic!("{name}: {error}"),
            Event::Tag(tag, Type::Start, _) => open.push(tag),
            Event::Tag(tag, Type::End, _) => assert_eq!(open.pop(), Some(tag), "{name}"),
            _ => {}
        }
    }
    assert!(open.is_empty() && picture.contains("<svg"), "{name}: {open:?}");
}

#[test]
fn inspect_draws_what_a_policy_does() {
    let model = fixture("llama-64");
    let dir = tempfile::tempdir().expect("directory");
    let (prompt, to) = (dir.path().join("prompt.txt"), dir.path().join("a").join("b"));
    fs::write(&prompt, "Anna put the red ball in the box. ".repeat(12)).expect("write");
    let args = ["inspect", path(&model), "--prompt", path(&prompt), "--device", "cpu"];
    let with = |more: &[&str]| run(&[&args[..], &["--out", path(&to)], more].concat());

    let output = ok(with(&["--attention", "paper", "--page", "16", "--layer", "1", "--head", "3"]));
    for word in ["policy", "zeros", "sparsity", "key element", "worst head", "  all"] {
        assert!(out(&output).contains(word), "{word}: {}", out(&output));
    }
    let csv = fs::read_to_string(to.join("attention.csv")).expect("written");
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    // 2 layers of 4 query heads.
    assert_eq!(lines.len(), 1 + 2 * 4);
    for line in &lines[1..] {
        assert_eq!(line.len(), lines[0].len(), "{line:?}");
        let number = |name: &str| -> f64 {
            let at = lines[0].iter().position(|field| *field == name).expect(name);
            line[at].parse().unwrap_or_else(|_| panic!("{name}: {line:?}"))
        };
        assert!((0.0..1.0).contains(&number("zeros")), "{line:?}");
        assert!((1.0..18.5).contains(&number("bits_per_key_element")), "{line:?}");
        assert!((0.0..1.0).contains(&number("output_error")), "{line:?}");
        assert_eq!(number("kv_head"), (number("head") / 2.0).floor(), "{line:?}");
        assert!((number("largest_key_error") - 0.6).abs() < 0.01, "{line:?}");
    }
    for (name, words) in [
        ("zeros.svg", ["KV head", "share of zeros"]),
        ("zeros.svg", ["\n0.0%\n", "\n100.0%\n"]),
        ("error.svg", ["\n0.0e0\n", "layer"]),
        ("deltas.svg", ["layer 1, KV head 1", "channel of the key"]),
        ("attention.svg", ["layer 1, query head 3", "window: keys from"]),
        ("error.svg", ["query head", "|o - dense|"]),
    ] {
        let picture = fs::read_to_string(to.join(name)).expect(name);
        assert!(picture.len() < 1_000_000, "{name} has {} bytes", picture.len());
        check_svg(&picture, name);
        for word in words {
            assert!(picture.contains(word), "{name}: {word}");
        }
    }

    // Quantised keys have no deltas to draw; dense attention has no error but rounding.
    let other = dir.path().join("other");
    ok(run(&[&args[..], &["--out", path(&other), "--keys", "int8", "--page", "16"]].concat()));
    assert!(!other.join("deltas.svg").exists() && other.join("error.svg").exists());
    let output = ok(with(&["--cache", "f32"]));
    assert!(err(&output).contains("keys are plain"), "{}", err(&output));
    // What this run does not draw is not left over from the one before.
    assert!(!to.join("zeros.svg").exists() && !to.join("deltas.svg").exists());
    assert_eq!(fs::read_dir(&to).expect("directory").count(), 3);
    for (options, word) in
        [(["--window", "64"], "nothing is decoded"), (["--context", "20"], "in a context of 20")]
    {
        let output = with(&[&["--attention", "delta"][..], &options].concat());
        assert_eq!(output.status.code(), Some(1), "{options:?}");
        assert!(err(&output).contains(word), "{options:?}: {}", err(&output));
    }
    assert_eq!(fs::read_dir(&to).expect("directory").count(), 3, "as it was");

    for (options, word) in [
        (["--layer", "2"], "from 0 to 1"),
        (["--head", "4"], "from 0 to 3"),
        (["--prompt", "absent.txt"], "absent.txt"),
    ] {
        let args = [&args[..2], if options[0] == "--prompt" { &[] } else { &args[2..4] }].concat();
        let output = run(&[&args[..], &options, &["--device", "cpu"]].concat());
        assert_eq!(output.status.code(), Some(1), "{options:?}");
        assert!(err(&output).contains(word), "{options:?}: {}", err(&output));
    }
}

#[test]
fn the_memory_plan_follows_the_policy() {
    let model = fixture("llama-64");
    let cache = |policy: &str| {
        let args = ["inspect", path(&model), "--context", "1000", "--policy", policy];
        let output = ok(run(&args));
        let text = out(&output);
        text.lines().find(|line| line.contains("cache ")).expect("cache").to_owned()
    };
    // 2 layers, 2 heads of 64 elements, f16: 512 kB each.
    assert!(cache("dense").contains("keys 512.0 kB, values 512.0 kB"), "{}", cache("dense"));
    let int4 = cache("values=int4");
    assert!(int4.contains("keys 512.0 kB, values 144.0 kB"), "{int4}");
    assert!(cache("delta").contains("keys at most"), "{}", cache("delta"));
}

#[test]
fn devices_lists_adapters_and_the_choice() {
    let output = ok(run(&["devices"]));
    assert!(out(&output).contains(&common::test_adapter()), "{}", out(&output));
    assert!(out(&output).contains("auto"), "{}", out(&output));
}

#[test]
fn a_tuned_device_stays_tuned() {
    let (adapter, home) = (common::test_adapter(), tempfile::tempdir().expect("a directory"));
    let at_home = |args: &[&str]| {
        let mut command = deltallm(args);
        for name in ["HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"] {
            command.env(name, home.path());
        }
        ok(command.output().expect("the program starts"))
    };
    let files = |name: &str| {
        let all = |dir: &Path| fs::read_dir(dir).map(|found| found.flatten().collect::<Vec<_>>());
        let mut folders = vec![home.path().to_owned()];
        let mut files = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in all(&folder).expect("a folder") {
                let path = entry.path();
                if path.is_dir() { folders.push(path) } else { files.push(path) }
            }
        }
        files.retain(|file| file.ends_with(Path::new("deltallm").join(name)));
        files
    };
    let tune = |formats: &str, more: &[&str]| {
        at_home(&[&["tune", "--device", &adapter, "--weights", formats], more].concat())
    };
    let tried = json(&tune("ternary,q4", &["--dry-run", "--json"]));
    assert!(files("tunings.json").is_empty(), "a dry run remembers nothing");
    for (ways, speed) in [("cuts", "bytes_per_second"), ("tiles", "multiplications_per_second")] {
        let measurements = tried[ways].as_array().expect("measurements");
        let of = |format: &str| measurements.iter().filter(|m| m["format"] == format).count();
        let found = ["ternary", "q4"].map(of);
        assert!(found.into_iter().all(|count| count > 6), "{found:?}");
        assert_eq!(found.into_iter().sum::<usize>(), measurements.len(), "others were measured");
        for packing in ["four", "five"] {
            let packed = measurements.iter().any(|m| m["packing"] == packing);
            let taken = tried["tuning"]["packing"] == packing;
            assert_eq!(packed, ways == "cuts" || taken, "{ways}, {packing}");
        }
        for m in measurements {
            assert!(m["right"] == true && m[speed].as_f64() > Some(0.0), "{m}");
        }
    }
    let output = tune("f32", &[]);
    for word in [&adapter, "f32", "times", "products of 128 tokens"] {
        assert!(out(&output).contains(word), "{word}: {}", out(&output));
    }
    let found = files("tunings.json");
    let [file] = &found[..] else { panic!("{found:?}") };
    assert!(err(&output).contains(path(file)), "{}", err(&output));
    // What is not measured stays as it is remembered.
    let remembered = || {
        let all: Value =
            serde_json::from_str(&fs::read_to_string(file).expect("read")).expect("JSON");
        all.as_object().and_then(|all| all.values().next()).expect("a device").clone()
    };
    let before = remembered();
    tune("q8", &[]);
    for format in ["ternary", "f32", "f16", "bf16", "q4"] {
        assert_eq!(remembered()[format], before[format], "{format}");
    }
    let generate = ["generate", "Anna", "-n", "4", "--device", &adapter, "--temperature", "0"];
    assert!(files("self-tests.json").is_empty(), "nothing was run yet");
    let text = out(&at_home(&generate));
    assert_eq!(files("self-tests.json").len(), 1, "what ran was tested, and that is remembered");
    fs::write(file, "{").expect("written");
    let output = at_home(&generate);
    assert!(err(&output).contains("tunings.json"), "{}", err(&output));
    assert_eq!(out(&output), text);
}

#[test]
fn the_doctor_names_what_is_wrong() {
    let adapter = common::test_adapter();
    let bisect = ["doctor", "--bisect", "--device", &adapter, "--tokens", "2"];
    let output = ok(run(&bisect));
    assert!(out(&output).contains("the devices agree but for rounding"), "{}", out(&output));
    let output = run(&[&bisect[..], &["--sabotage", "gate"]].concat());
    assert!(!output.status.success());
    assert!(
        out(&output).contains("layer 0") && out(&output).contains(", gate"),
        "{}",
        out(&output)
    );
    let output = run(&[&bisect[..], &["--sabotage", "norm", "--json"]].concat());
    assert_eq!(json(&output)["first"]["operation"], "norm");

    let output = run(&["doctor", "--device", &adapter, "--sabotage", "gate"]);
    assert!(!output.status.success());
    for word in [&adapter, "WRONG gate: ", "answers are right"] {
        assert!(out(&output).contains(word), "{word}: {}", out(&output));
    }
    let output = run(&["doctor", "--device", "no such adapter"]);
    assert!(err(&output).contains("no such adapter"), "{}", err(&output));
}

#[test]
fn errors_are_one_line_on_standard_error() {
    let model = fixture("llama-32");
    let ids = model.join("config.json"); // never read: --out is refused first
    let window = ["--attention", "delta", "--window", "64"];
    let logits = ["logits", "--ids", path(&ids), "--out", "unwritten"];
    let cases: [(&[&str], &str); 13] = [
        (&["generate", "x", "--device", "no such adapter"], "the CPU is chosen by `cpu`"),
        (&[&logits[..], &window].concat(), "nothing is decoded"),
        (&["inspect", path(&model), "--device", "cpu"], "needs --prompt"),
        (&["inspect", path(&model), "--threads", "2"], "needs --prompt"),
        (&["generate", "x", "--model", "absent"], "absent"),
        (&["generate", "x", "--device", "no such adapter"], "no such adapter"),
        (&["generate", "x", "--top-p", "3"], "top_p"),
        (&["generate", "x", "--device", "cpu", "--threads", "0"], "threads"),
        (&["inspect", path(&model), "--context", "18446744073709551615"], "context"),
        (&["logits", "--ids", path(&ids), "--out", path(&model)], "llama-32"),
        (&["generate", "x", "--model", path(&model), "--context", "0"], "context"),
        (&["generate", "--file", "absent.txt"], "absent.txt"),
        (&["inspect", "absent"], "absent"),
    ];
    for (args, word) in cases {
        let output = run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let (out, err) = (out(&output), err(&output));
        let error = err.lines().last().unwrap_or_default();
        assert!(error.starts_with("error: ") && error.contains(word), "{args:?}: {err}");
        assert!(out.is_empty(), "{args:?}: {out}");
    }
}

/// Before a table is made that takes gigabytes of host memory.
#[test]
fn a_context_beyond_a_gpu_is_refused_at_once() {
    let model = fixture("llama-64");
    let dir = tempfile::tempdir().expect("directory");
    for file in fs::read_dir(&model).expect("directory").map(|file| file.expect("file").path()) {
        fs::copy(&file, dir.path().join(file.file_name().expect("name"))).expect("copied");
    }
    let config = dir.path().join("config.json");
    let mut json: Value =
        serde_json::from_str(&fs::read_to_string(&config).expect("file")).expect("json");
    json["max_position_embeddings"] = 1_000_000_000.into();
    fs::write(&config, json.to_string()).expect("written");
    let adapter = common::test_adapter();
    let args = ["generate", "Hi", "--model", path(dir.path()), "--device", &adapter];
    let output = run(&[&args[..], &["--context", "1000000000"]].concat());
    assert_eq!(output.status.code(), Some(1));
    let error = err(&output);
    for word in ["a context of 1000000000 tokens (a smaller one takes less)", "maxStorageBuffer"] {
        assert!(error.contains(word), "{word}: {error}");
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_cleanly() {
    let args = ["generate", "x", "--device", "cpu", "-n", "100000", "--ignore-eos"];
    let mut child =
        deltallm(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    // The first byte shows that it is generating.
    let mut first = [0];
    let mut stdout = child.stdout.take().expect("stdout");
    std::io::Read::read_exact(&mut stdout, &mut first).expect("text");
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.expect("kill").success());
    let mut text = first.to_vec();
    std::io::Read::read_to_end(&mut stdout, &mut text).expect("text to its end");
    let text = String::from_utf8(text).expect("UTF-8 to its end");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(130), "{}", err(&output));
    assert!(text.ends_with('\n'));
}
