//! Thresholds for each layer and KV head: sessions that carry them, `calibrate`, and its file.
#![cfg(feature = "cli")]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{devices, fixture};
use deltallm::backend::CacheFormat;
use deltallm::checkpoint::synthetic::Synthetic;
use deltallm::delta::{AttentionPolicy, PolicyFile, Thresholds};
use deltallm::eval::{Budget, CalibrationText, calibrate, divergence};
use deltallm::{
    Cancel, DeviceChoice, Error, LogitsOptions, Model, ModelOptions, Session, SessionOptions,
};
use serde_json::Value;

/// A model with random weights in a directory of its own: 4 layers of 2 KV heads.
fn tiny() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    Synthetic::named("tiny").expect("a model").write(dir.path()).expect("written");
    dir
}

fn on_cpu(dir: &Path) -> Model {
    let options = ModelOptions { device: DeviceChoice::Cpu, ..ModelOptions::default() };
    Model::open(dir, &options).expect("opens")
}

fn ids(count: u32) -> Vec<u32> {
    (0..count).map(|i| 3 + i * 37 % 200 + i / 7 % 3).collect()
}

/// Differing ones for a model.
fn thresholds(model: &Model) -> Thresholds {
    let (layers, heads) = (model.config().layers, model.config().attention.kv_heads);
    let row = |layer| (0..heads).map(|head| 0.125 * (1 + layer + 3 * head) as f32).collect();
    Thresholds::new((0..layers).map(row).collect()).expect("in range")
}

#[test]
fn sessions_keep_each_heads_threshold_and_files_do() {
    let dir = tiny();
    let path = dir.path().join("session");
    let first = dir.path().join("first session");
    for (name, options) in devices() {
        let model = Model::open(dir.path(), &options).expect("opens");
        let thresholds = thresholds(&model);
        let policy = "delta theta=0.5 page=16 window=16".parse().expect("a policy");
        let options = SessionOptions {
            context: Some(256),
            attention: policy,
            thresholds: Some(thresholds.clone()),
        };
        let mut session = Session::new(&model, &options).expect("session");
        session.evaluate(&ids(100)).expect("prompt");
        let check = |session: &mut Session, pages| {
            let statistics = session.statistics().expect("statistics");
            for (heads, expected) in statistics.heads.iter().zip(thresholds.iter()) {
                for (head, theta) in heads.iter().zip(expected) {
                    let range = head.theta.expect("delta pages");
                    assert_eq!((range.min, range.max), (*theta, *theta), "{name}");
                    assert_eq!(head.pages, pages, "{name}");
                }
            }
        };
        check(&mut session, 6);

        session.save(&path).expect("saved");
        if !first.exists() {
            session.save(&first).expect("saved");
        }
        let expected = session.evaluate(&ids(30)).expect("continued");
        let mut session = Session::load(&model, &path).expect("loaded");
        assert_eq!(session.thresholds(), Some(&thresholds));
        assert_eq!(session.evaluate(&ids(30)).expect("continued"), expected, "{name}");
        check(&mut session, 8);
        // Another device's.
        let mut session = Session::load(&model, &first).expect("loaded");
        session.evaluate(&ids(30)).expect("continued");
        check(&mut session, 8);
    }
}

#[test]
fn thresholds_of_another_shape_name_both() {
    let dir = tiny();
    let model = on_cpu(dir.path());
    let refused = |policy: &str, thresholds: &str, words: &[&str]| {
        let options = SessionOptions {
            attention: policy.parse().expect("a policy"),
            thresholds: Some(thresholds.parse().expect("thresholds")),
            ..SessionOptions::default()
        };
        let error = Session::new(&model, &options).expect_err(thresholds).to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    let shape = model.config();
    let own = format!("{} layers of {} KV heads", shape.layers, shape.attention.kv_heads);
    refused("delta", "1 2 3;4 5 6", &["2 layers of 3 KV heads", &own]);
    refused("keys=int8", &thresholds(&model).to_string(), &["int8"]);
}

#[test]
fn budgets_are_kept_on_the_fitting_text() {
    let dir = tiny();
    let tiny = on_cpu(dir.path());
    // Without 8-bit activations, whose jumps cost more than such budgets.
    let llama = on_cpu(&fixture("llama-64"));
    let text = CalibrationText::new(&[2], &ids(600), 128, 4).expect("segments");
    let cancel = Cancel::default();
    for (policy, budget) in [
        ("delta page=16 alpha=0.05", Budget::Sparsity(0.5)),
        ("paper page=16", Budget::Sparsity(0.62)),
        ("delta page=32 theta=1 reference=anchored deltas=int8", Budget::Sparsity(0.3)),
        ("delta page=16 reference=continuous", Budget::Sparsity(0.0)),
        ("delta page=16 deltas=f16", Budget::Kl(1e-4)),
        ("delta page=16 deltas=f16 theta=0.5", Budget::Perplexity(0.001)),
    ] {
        let policy: AttentionPolicy = policy.parse().expect("a policy");
        let model = if matches!(budget, Budget::Sparsity(_)) { &tiny } else { &llama };
        let mut steps = 0;
        let found = calibrate(model, &text, &policy, budget, &cancel, |at| {
            assert!(at.done <= at.total);
            steps += 1;
        });
        let found = found.unwrap_or_else(|error| panic!("{policy}, {budget}: {error}"));
        assert!(steps > model.config().layers);
        let dense = LogitsOptions {
            attention: AttentionPolicy::plain(CacheFormat::F32),
            ..LogitsOptions::default()
        };
        let other = LogitsOptions {
            attention: found.policy,
            thresholds: Some(found.thresholds.clone()),
            ..LogitsOptions::default()
        };
        let mut all = Vec::new();
        for ids in &text.fitting {
            all.push(divergence(model, ids, &dense, &other, &cancel).expect("runs"));
        }
        let mut sum = all.remove(0);
        all.iter().for_each(|more| sum += more);
        assert_eq!(sum.statistics.total(), found.fitting.statistics.total());
        let sparsity = sum.statistics.total().sparsity(&policy).expect("deltas");
        match budget {
            Budget::Sparsity(least) => {
                assert!(sparsity >= least, "{policy}: {sparsity}");
                assert!(least == 0.0 || sparsity < least + 0.05, "{policy}: {sparsity}");
            }
            Budget::Kl(most) => assert!(sum.mean_kl().expect("tokens") <= most, "{sum:?}"),
            Budget::Perplexity(most) => {
                assert!(sum.perplexity_increase().expect("tokens") <= most, "{sum:?}");
            }
        }
        // The one threshold has about as many zeros.
        let [global, calibrated] =
            found.compared.clone().map(|d| d.statistics.total().zero_share().expect("deltas"));
        assert!((global - calibrated).abs() < 0.05, "{policy}: {global} {calibrated}");
        assert_eq!(found.compared[0].tokens, 127 * text.held_out.len());
    }
    cancel.cancel();
    let stopped =
        calibrate(&tiny, &text, &AttentionPolicy::delta(), Budget::Kl(1.0), &cancel, |_| {});
    assert!(matches!(stopped, Err(Error::Cancelled)));
}

fn run(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deltallm"));
    // What is found out about adapters is nothing to leave in a user's home.
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    command.args(args).stdin(Stdio::null()).output().expect("the program starts")
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

fn ok(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn refused(args: &[&str], words: &[&str]) {
    let output = run(args);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{args:?}");
    assert!(words.iter().all(|word| error.contains(word)), "{args:?}: {words:?} in {error}");
}

/// A text of so many words.
fn words(count: usize) -> String {
    let words = ["the", "old", "miller", "went", "down", "to", "a", "river", "with", "bread"];
    (0..count).map(|i| words[i * i % 7 + i % 4]).collect::<Vec<_>>().join(" ")
}

#[test]
fn what_calibrate_writes_every_command_takes() {
    let dir = tiny();
    let (model, file) = (path(dir.path()), dir.path().join("policy.json"));
    let text = dir.path().join("text.txt");
    fs::write(&text, words(400)).expect("written");
    let device = ["--device", "cpu", "--model", model];
    let options = ["--length", "128", "--page", "16", "--segments", "4", "--text", path(&text)];
    let args = [&["calibrate", "--out", path(&file)], &device[..], &options].concat();
    let table = ok(run(&[&args[..], &["--sparsity", "0.4"]].concat()));
    assert!(table.contains("calibrated") && table.contains("held out"), "{table}");
    let found = PolicyFile::read(&file).expect("a policy file");
    let record = found.calibration.clone().expect("a record");
    assert_eq!((record.length, record.measured.len()), (128, 3));
    assert_eq!(record.budget, "sparsity 0.4");
    assert!(record.measured[0].sparsity >= 0.4);
    let json = ok(run(&[&args[..], &["--sparsity", "0.4", "--json"]].concat()));
    let json: Value = serde_json::from_str(&json).expect("one JSON object");
    assert_eq!(json["policy"], found.policy.to_string());
    assert_eq!(json["measured"].as_array().map(Vec::len), Some(3));
    assert_eq!(PolicyFile::read(&file).expect("a policy file"), found);

    // Which commands take it, and that its thresholds count.
    let with = ["--policy-file", path(&file)];
    let prompt = words(120);
    let generate = [&["generate", &prompt, "-n", "3", "--json"], &device[..], &with].concat();
    let json: Value = serde_json::from_str(&ok(run(&generate))).expect("one JSON object");
    let thresholds = json["thresholds"].as_array().expect("thresholds").len();
    assert_eq!(thresholds, record.layers);
    assert_eq!(json["policy"], found.policy.to_string());
    let (numbers, out) = (dir.path().join("ids"), dir.path().join("logits"));
    let text_ids: Vec<String> = ids(90).iter().map(u32::to_string).collect();
    fs::write(&numbers, text_ids.join(" ")).expect("written");
    let logits = [&["logits", "--ids", path(&numbers), "--out", path(&out)], &device[..]].concat();
    ok(run(&[&logits[..], &with].concat()));
    let of_heads = fs::read(&out).expect("logits");
    ok(run(&[&logits[..], &["--policy", &found.policy.to_string()]].concat()));
    assert_ne!(of_heads, fs::read(&out).expect("logits"));
    ok(run(&[&["inspect", model], &with[..]].concat()));
    let (prompt, pictures) = (path(&text), dir.path().join("pictures"));
    let inspect = ["inspect", model, "--device", "cpu", "--out", path(&pictures)];
    ok(run(&[&inspect[..], &["--prompt", prompt], &with[..]].concat()));
    let csv = fs::read_to_string(pictures.join("attention.csv")).expect("a table");
    assert!(csv.lines().count() > record.layers);

    // It stands alone, and is the last word.
    refused(&[&generate[..], &["--theta", "1"]].concat(), &["--policy-file", "--theta"]);
    refused(&[&generate[..], &["--policy", "dense"]].concat(), &["--policy-file", "--policy"]);
    refused(
        &[&["calibrate", "--kl", "1", "--text", prompt, "--out", path(&out)], &device[..], &with]
            .concat(),
        &["policy-file", "thresholds already"],
    );

    // Of another model; of none; damaged.
    let mut other = found.clone();
    other.thresholds = Some("1 2 3;4 5 6".parse().expect("thresholds"));
    other.write(&file).expect("written");
    let shapes = ["2 layers of 3 KV heads", "the model has"];
    refused(&generate, &shapes);
    refused(&[&["inspect", model], &with[..]].concat(), &shapes);
    refused(&[&inspect[..], &["--prompt", prompt], &with[..]].concat(), &shapes);
    refused(&[&logits[..], &with].concat(), &shapes);
    fs::write(&file, found.to_text().replace("\"version\": 1", "\"version\": 9")).expect("written");
    refused(&generate, &["policy.json", "version", "9"]);
    fs::write(&file, "not JSON").expect("written");
    refused(&generate, &["policy.json", "JSON"]);
    fs::remove_file(&file).expect("removed");
    refused(&generate, &["policy.json"]);
}

#[test]
fn what_calibrate_cannot_do_it_says() {
    let dir = tiny();
    let (model, file) = (path(dir.path()), dir.path().join("policy.json"));
    let text = dir.path().join("text.txt");
    fs::write(&text, words(150)).expect("written");
    let all = ["calibrate", "--device", "cpu", "--model", model, "--text", path(&text), "--out"];
    let all = [&all[..], &[path(&file)]].concat();
    let refused = |more: &[&str], words: &[&str]| refused(&[&all[..], more].concat(), words);
    refused(&[], &["--sparsity", "--kl", "--perplexity"]);
    refused(&["--sparsity", "0.5", "--kl", "1"], &["cannot be used with"]);
    refused(&["--sparsity", "1.5"], &["sparsity", "from 0 to 1"]);
    refused(&["--sparsity", "0.97", "--page", "16"], &["cannot be reached", "can"]);
    refused(&["--kl", "0"], &["kl", "above 0"]);
    refused(&["--kl", "1e-15", "--page", "16"], &["cannot be kept", "KL", "sparsity"]);
    refused(&["--perplexity", "half"], &["per cent"]);
    refused(&["--kl", "1", "--attention", "dense"], &["plain", "delta keys"]);
    refused(&["--kl", "1", "--keys", "int8"], &["int8", "delta keys"]);
    refused(&["--kl", "1", "--page", "128", "--length", "64"], &["length", "128"]);
    refused(&["--kl", "1", "--length", "100000"], &["length", "the text has"]);
    assert!(!file.exists());
    let one = run(&[&all[..], &["--sparsity", "0.3", "--page", "16", "--segments", "1"]].concat());
    assert!(String::from_utf8_lossy(&one.stderr).contains("one segment"), "{one:?}");
    ok(one);
    let record = PolicyFile::read(&file).expect("a policy file").calibration.expect("a record");
    assert_eq!((record.fitting_segments, record.held_out_segments), (1, 0));
    assert_eq!(record.measured.len(), 2);
}
