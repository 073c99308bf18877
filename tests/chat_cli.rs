//! `deltallm chat`, as a script meets it.
#![cfg(feature = "cli")]

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const TEMPLATE: &str = "{% for message in messages %}{{ message['role'] | capitalize + ': ' + \
    message['content'] | trim + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' \
    }}{% endif %}";

/// A fixture's model with a chat template.
fn model() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("directory");
    let files = fs::read_dir(common::fixture("llama-32")).expect("directory");
    for file in files.map(|file| file.expect("file").path()) {
        fs::copy(&file, dir.path().join(file.file_name().expect("name"))).expect("copied");
    }
    fs::write(dir.path().join("chat_template.jinja"), TEMPLATE).expect("written");
    dir
}

fn chat(model: &Path, more: &[&str], lines: &[u8]) -> Output {
    let model = model.to_str().expect("UTF-8");
    let mut child = Command::new(env!("CARGO_BIN_EXE_deltallm"))
        // What is found out about adapters is nothing to leave in a user's home.
        .env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"))
        .args(["chat", "--model", model, "--device", "cpu"])
        .args(more)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    // A program that refuses its arguments does not read.
    let _ = child.stdin.take().expect("stdin").write_all(lines);
    child.wait_with_output().expect("ends")
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

fn out(output: &Output) -> String {
    assert!(output.status.success(), "{}", err(output));
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn objects(output: &Output) -> Vec<Value> {
    out(output).lines().map(|line| serde_json::from_str(line).expect("json")).collect()
}

#[test]
fn each_line_is_a_turn_and_only_replies_are_printed() {
    let model = model();
    let options = ["-n", "6", "--system", "Be brief."];
    // Empty lines say nothing; the ends of Windows do not count; commands are for terminals.
    let output = chat(model.path(), &options, b"Hello\n\n   \nWho is it?\r\n/clear\nlast");
    let json = chat(model.path(), &[&options[..], &["--json"]].concat(), b"Hello\nWho is it?\n");
    let turns = objects(&json);
    assert_eq!(turns.len(), 2);
    let replies: Vec<&str> =
        turns.iter().map(|turn| turn["reply"].as_str().expect("text")).collect();
    let printed = out(&output);
    assert!(printed.starts_with(replies[0]), "{printed:?} {replies:?}");
    assert!(printed.contains(replies[1]), "{printed:?} {replies:?}");
    assert!(!err(&output).contains("This is"), "{}", err(&output));

    assert_eq!(turns[0]["user"], "Hello");
    assert_eq!(turns[0]["timings"]["reused_tokens"], 0);
    let count = |name: &str| turns[1]["timings"][name].as_u64().expect("count");
    assert!(count("reused_tokens") > count("prompt_tokens"), "{}", turns[1]);
    assert_eq!(turns[1]["dropped_messages"], 0);
    assert_eq!(turns[1]["device"]["backend"], "cpu");
}

#[test]
fn a_full_context_is_said() {
    let model = model();
    let lines = "Tell me more of it, please.\n".repeat(8);
    let output = chat(model.path(), &["-n", "8", "--context", "150", "--json"], lines.as_bytes());
    let dropped = |turn: &Value| turn["dropped_messages"].as_u64().expect("count");
    assert!(objects(&output).iter().any(|turn| dropped(turn) > 0));
    assert!(err(&output).contains("oldest messages are forgotten"), "{}", err(&output));
    let output = chat(model.path(), &["--context", "150"], "long ".repeat(200).as_bytes());
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("a context of 150"), "{}", err(&output));
}

#[test]
fn what_cannot_be_talked_with_says_why() {
    let model = model();
    fs::remove_file(model.path().join("chat_template.jinja")).expect("removed");
    let output = chat(model.path(), &[], b"Hello\n");
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("deltallm generate"), "{}", err(&output));

    fs::write(model.path().join("chat_template.jinja"), "{{ raise_exception('not so') }}")
        .expect("written");
    let output = chat(model.path(), &[], b"Hello\n");
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("not so"), "{}", err(&output));

    let output = chat(model.path(), &[], b"\xff\n");
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("standard input"), "{}", err(&output));
}
