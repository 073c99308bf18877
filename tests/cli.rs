//! The command line, as a newcomer, a script and an impatient user meet it.
#![cfg(feature = "cli")]

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{Golden, distance, fixture};
use safetensors::SafeTensors;
use serde_json::Value;

fn deltallm(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deltallm"));
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

fn ok(output: Output) -> Output {
    assert!(output.status.success(), "{}", err(&output));
    output
}

#[test]
fn without_a_model_a_made_up_one_runs_and_says_so() {
    let output = ok(run(&["generate", "Anna put the red ball", "--device", "cpu", "-n", "8"]));
    assert!(err(&output).contains("random weights"), "{}", err(&output));
    assert!(!out(&output).trim().is_empty());
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
    let json: Value = serde_json::from_str(&out(&output)).expect("one JSON object");
    assert_eq!(json["prompt_ids"], golden["ids"]);
    assert_eq!(json["ids"], golden["continuation_ids"]);
    assert_eq!(json["text"], golden["continuation"]);
    assert_eq!(json["finish_reason"], "max_tokens");
    assert_eq!(json["device"]["backend"], "cpu");
    for field in ["load_s", "prefill_s", "prefill_tokens_per_s", "decode_s", "decode_tokens_per_s"]
    {
        assert!(json["timings"][field].as_f64().is_some_and(|x| x > 0.0), "{field}: {json}");
    }
    for field in ["weights", "cache", "activations"] {
        assert!(json["bytes"][field].as_u64().is_some_and(|x| x > 0), "{field}: {json}");
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
            serde_json::from_str::<Value>(&out(&output)).expect("one JSON object")
        };
        let greedy = run_with(&[]);
        assert_eq!(
            run_with(&["--weights", "q8", "--cache", "f32"])["ids"].as_array().map(Vec::len),
            Some(12)
        );
        assert_eq!(run_with(&["--seed", "5"])["ids"], run_with(&["--seed", "5"])["ids"]);
        assert_ne!(run_with(&["--seed", "5"])["ids"], run_with(&["--seed", "6"])["ids"]);
        assert_eq!(run_with(&["--top-k", "1"])["ids"], greedy["ids"]);
        let text = greedy["text"].as_str().expect("text");
        let stop: String = text.chars().skip(4).take(2).collect();
        let stopped = run_with(&["--stop", &stop]);
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

#[test]
fn devices_lists_adapters_and_the_choice() {
    let output = ok(run(&["devices"]));
    assert!(out(&output).contains(&common::test_adapter()), "{}", out(&output));
    assert!(out(&output).contains("auto"), "{}", out(&output));
}

#[test]
fn errors_are_one_line_on_standard_error() {
    let model = fixture("llama-32");
    let ids = model.join("config.json"); // never read: --out is refused first
    let cases: [(&[&str], &str); 9] = [
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
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut stdout, &mut rest).expect("UTF-8 to its end");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(130), "{}", err(&output));
    assert!(rest.ends_with('\n'));
}
