//! Evaluation against Hugging Face transformers on the model inside (tests/fixtures/eval/make.py),
//! against definitions by hand, and as a command that can be stopped and goes on.
#![cfg(all(feature = "cli", feature = "demo"))]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use deltallm::backend::CacheFormat;
use deltallm::delta::AttentionPolicy;
use deltallm::eval::{
    Candidate, Content, Outcome, PasskeyOptions, PrepareOptions, Prepared, Score, Scorer, Stage,
    Summary, Task, TaskKind, squad,
};
use deltallm::{Cancel, DeviceChoice, Model, ModelOptions};
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", "eval", name].iter().collect()
}

fn expected() -> Value {
    let text = fs::read_to_string(fixture("expected.json")).expect("fixture");
    serde_json::from_str(&text).expect("JSON")
}

/// Characters of the choices of a row, without the space before them.
fn letters(row: usize) -> Vec<usize> {
    let text = fs::read_to_string(fixture("choice.jsonl")).expect("fixture");
    let row: Value = serde_json::from_str(text.lines().nth(row).expect("row")).expect("JSON");
    let choices = row["choices"].as_array().expect("list").iter();
    choices.map(|choice| choice.as_str().expect("text").trim().len()).collect()
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().expect("list").iter().map(|x| x.as_f64().expect("number")).collect()
}

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let options = ModelOptions { device: DeviceChoice::Cpu, ..ModelOptions::default() };
        Model::embedded(&options).expect("the model inside")
    })
}

fn candidates(policies: &[&str]) -> Vec<Candidate> {
    let dense = AttentionPolicy::plain(CacheFormat::F32);
    let others = policies.iter().map(|text| (*text, text.parse().expect("policy")));
    [("dense", dense)]
        .into_iter()
        .chain(others)
        .map(|(name, attention)| Candidate { name: name.to_owned(), attention, thresholds: None })
        .collect()
}

fn options() -> PrepareOptions {
    let expected = expected();
    let number = |name: &str| expected[name].as_u64().expect("number") as usize;
    PrepareOptions {
        length: number("window"),
        stride: number("stride"),
        answer: number("answer_tokens"),
    }
}

/// Scores of the dense candidate, by row.
fn scores(model: &Model, file: &str, stage: Stage) -> Vec<Score> {
    let (task, candidates) =
        (Task::read(fixture(file), usize::MAX).expect("task"), candidates(&[]));
    let scorer = Scorer { model, candidates: &candidates, stage, cancel: Cancel::default() };
    let score = |row| {
        let prepared = Prepared::new(row, model.tokenizer(), &options()).expect("tokens");
        scorer.score(&prepared).expect("score").remove(0).score
    };
    task.rows.iter().map(score).collect()
}

#[test]
fn perplexity_is_that_of_transformers() {
    let expected = expected();
    let path = [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", "llama-64"].iter();
    let options = ModelOptions { device: DeviceChoice::Cpu, ..ModelOptions::default() };
    let llama = Model::open(path.collect::<PathBuf>(), &options).expect("model");
    // A BitNet rounds activations to 8 bits: sums in another order now and then come out one level
    // apart, which moves the nats of a window by some hundredths. A Llama has nothing to round.
    for (name, model, tolerance) in [("llama", &llama, 2e-5), ("text", model(), 5e-3)] {
        for stage in [Stage::Prefill, Stage::Decode] {
            for (row, score) in scores(model, "text.jsonl", stage).iter().enumerate() {
                let Score::Text { windows, bytes } = score else { panic!("{score:?}") };
                assert!(*bytes > 500);
                let right = expected[name][row].as_array().expect("list");
                assert_eq!(windows.len(), right.len());
                for (found, right) in windows.iter().zip(right) {
                    let (nats, tokens) = (floats(right)[0], floats(right)[1]);
                    assert_eq!(found.1 as f64, tokens);
                    let far = (found.0 / nats - 1.0).abs();
                    assert!(far < tolerance, "{name} {row}: {}, transformers {nats}", found.0);
                }
            }
        }
    }
}

#[test]
fn choices_have_the_likelihoods_of_transformers() {
    let expected = expected();
    for stage in [Stage::Prefill, Stage::Decode] {
        for (row, score) in scores(model(), "choice.jsonl", stage).iter().enumerate() {
            let Score::Choice { log_likelihoods, lengths, .. } = score else { panic!("{score:?}") };
            let right = floats(&expected["choice"][row]);
            assert_eq!(*lengths, letters(row));
            for (found, right) in log_likelihoods.iter().zip(right) {
                // A few tokens only: one rounding is a larger share.
                assert!((found - right).abs() < 0.05, "row {row}: {found}, transformers {right}");
            }
        }
    }
}

#[test]
fn answers_are_those_of_transformers() {
    let expected = expected();
    for stage in [Stage::Prefill, Stage::Decode] {
        for (row, score) in scores(model(), "question.jsonl", stage).iter().enumerate() {
            let Score::Question { answer, exact, f1, .. } = score else { panic!("{score:?}") };
            let right = &expected["question"][row];
            assert_eq!(answer, right["answer"].as_str().expect("text"), "row {row}");
            assert_eq!(*exact, right["exact"].as_f64().expect("number"));
            assert!((f1 - right["f1"].as_f64().expect("number")).abs() < 1e-12);
        }
        for (row, score) in scores(model(), "passkey.jsonl", stage).iter().enumerate() {
            let Score::Passkey { answer, .. } = score else { panic!("{score:?}") };
            assert_eq!(answer, expected["passkey"][row].as_str().expect("text"), "row {row}");
        }
    }
}

#[test]
fn exact_match_and_f1_follow_the_definition() {
    for case in expected()["squad"].as_array().expect("list") {
        let right = case["right"].as_array().expect("list").iter();
        let right: Vec<String> = right.map(|r| r.as_str().expect("text").to_owned()).collect();
        let found = squad::score(case["answer"].as_str().expect("text"), &right);
        assert_eq!(found.exact, case["exact"].as_f64().expect("number"), "{case}");
        assert!((found.f1 - case["f1"].as_f64().expect("number")).abs() < 1e-12, "{case}");
    }
}

#[test]
fn a_policy_that_loses_nothing_has_no_divergence_and_a_coarse_one_has() {
    let task = Task::read(fixture("text.jsonl"), 1).expect("task");
    let candidates = candidates(&[
        "dense exact=f32",
        "delta theta=0 deltas=f16 exact=f32",
        "delta theta=2sigma sink=0 alpha=0 page=16",
    ]);
    let options = PrepareOptions { length: 512, stride: 256, answer: 1 };
    let row = Prepared::new(&task.rows[0], model().tokenizer(), &options).expect("tokens");
    let scorer = Scorer {
        model: model(),
        candidates: &candidates,
        stage: Stage::Prefill,
        cancel: Cancel::default(),
    };
    let found = scorer.score(&row).expect("score");
    assert!(found[..2].iter().all(|one| one.kl.iter().all(|part| part.0 == 0.0)));
    assert_eq!(found[1].score, found[0].score);
    let outcomes: Vec<Vec<&Outcome>> = found.iter().map(|one| vec![one]).collect();
    let of =
        |index: usize| Summary::new(TaskKind::Text, &outcomes[index], &outcomes[0]).expect("some");
    let mean = |index: usize| of(index).kl.expect("taken").value;
    assert!(mean(2) < 0.02 && mean(3) > 10.0 * mean(2), "{} {}", mean(2), mean(3));
    let (fine, coarse) = (found[2].keys, found[3].keys);
    assert!(coarse.zeros > Some(coarse.elements * 9 / 10) && coarse.bits < fine.bits);
    assert_eq!(found[1].keys.elements, 0);
}

#[test]
fn known_data_sets_are_read() {
    let dir = tempfile::tempdir().expect("directory");
    let choice = |line: &str| {
        let path = dir.path().join("task.jsonl");
        fs::write(&path, format!("\n{line}\n")).expect("file");
        let mut task = Task::read(&path, 10).expect(line);
        assert_eq!(task.rows.len(), 1);
        match task.rows.remove(0).content {
            Content::Choice { pairs, label } => (pairs, label),
            other => panic!("{line}: {other:?}"),
        }
    };
    let pair = |a: &str, b: &str| (std::sync::Arc::<str>::from(a), b.to_owned());
    let (pairs, label) = choice(
        r#"{"sentence": "Tom gave Ann the ball and _ was glad .", "option1": "Tom", "option2": "Ann", "answer": "2"}"#,
    );
    let expected = [
        pair("Tom gave Ann the ball and Tom", " was glad ."),
        pair("Tom gave Ann the ball and Ann", " was glad ."),
    ];
    assert_eq!((pairs, label), (expected.to_vec(), 1));

    let (pairs, label) = choice(
        r#"{"id": "x", "question": "What melts?", "choices": {"text": ["ice", "stone"], "label": ["1", "2"]}, "answerKey": "1"}"#,
    );
    assert_eq!(label, 0);
    assert_eq!(pairs[1], pair("Question: What melts?\nAnswer:", " stone"));

    let (pairs, label) =
        choice(r#"{"goal": "Open a door", "sol1": "Push it", "sol2": "Eat it", "label": 0}"#);
    assert_eq!(label, 0);
    assert_eq!(pairs[0], pair("Question: Open a door\nAnswer:", " Push it"));

    let (pairs, label) = choice(
        r#"{"ind": 4, "activity_label": "Sailing", "ctx_a": "A man [sub] sails.", "ctx_b": "the Boat", "ctx": "", "endings": ["sinks. [title] End", "flies."], "label": "1"}"#,
    );
    assert_eq!(label, 1);
    assert_eq!(pairs[0], pair("Sailing: A man sails. The boat", " sinks.. End"));

    // As lm-evaluation-harness logs: in lists, and in objects with numbered names.
    let doc =
        r#""doc_id": 0, "doc": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}, "target": "1""#;
    for arguments in [
        r#"[["few shots\n\nQuestion: g\nAnswer:", " a"], ["few shots\n\nQuestion: g\nAnswer:", " b"]]"#,
        r#"{"gen_args_0": {"arg_0": "few shots\n\nQuestion: g\nAnswer:", "arg_1": " a"}, "gen_args_1": {"arg_0": "few shots\n\nQuestion: g\nAnswer:", "arg_1": " b"}}"#,
    ] {
        let (pairs, label) = choice(&format!(r#"{{{doc}, "arguments": {arguments}}}"#));
        assert_eq!(label, 1);
        assert_eq!(pairs[0], pair("few shots\n\nQuestion: g\nAnswer:", " a"));
    }
    // With mutual information, which asks for every choice once more; numbers that are choices.
    let (pairs, label) = choice(
        r#"{"doc": {}, "target": "1", "arguments": [["Q", " a"], ["Q", " b"], ["", " a"], ["", " b"]]}"#,
    );
    assert_eq!((pairs.len(), label), (2, 1));
    let path = dir.path().join("doubtful.jsonl");
    let row = r#"{"doc": {}, "target": "1", "arguments": [["Q", " 3"], ["Q", " 2"], ["Q", " 1"]]}"#;
    fs::write(&path, row).expect("file");
    let error = Task::read(&path, 10).expect_err("two meanings").to_string();
    assert!(error.contains("choice 2") && error.contains("choice 1"), "{error}");
    let (_, label) = choice(
        r#"{"doc": {"x": 1}, "target": " no", "arguments": [["Is it?", " yes"], ["Is it?", " no"]]}"#,
    );
    assert_eq!(label, 1);
}

#[test]
fn questions_are_read_from_rows_logs_and_squads_own_files() {
    let dir = tempfile::tempdir().expect("directory");
    let read = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).expect("file");
        Task::read(&path, 10).expect(text).rows
    };
    let row = r#"{"id": "q", "title": "T", "context": "C", "question": "Q?", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}"#;
    let expected = Content::Question {
        prompt: "Title: T\n\nBackground: C\n\nQuestion: Q?\n\nAnswer:".into(),
        answers: vec!["a".into(), "b".into()],
        no_answer: "unanswerable".into(),
    };
    assert_eq!(read("rows.jsonl", row)[0].content, expected);
    let squad = r#"{"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": "C", "qas": [
        {"question": "Q?", "id": "q", "answers": [{"text": "a", "answer_start": 0}, {"text": "b", "answer_start": 1}], "is_impossible": false},
        {"question": "R?", "id": "r", "answers": [], "is_impossible": true}]}]}]}"#;
    let rows = read("dev.json", squad);
    assert_eq!((rows.len(), rows[0].id.as_str()), (2, "q"));
    assert_eq!(rows[0].content, expected);
    let log = format!(
        r#"{{"doc": {row}, "target": "", "arguments": [["whole prompt", {{"until": ["\n"]}}], ["whole prompt", " unanswerable"]]}}"#
    );
    let Content::Question { prompt, answers, .. } = &read("log.jsonl", &log)[0].content else {
        panic!("{log}")
    };
    assert_eq!((prompt.as_str(), answers.len()), ("whole prompt", 2));
}

#[test]
fn what_is_wrong_with_a_file_is_said_with_line_and_field() {
    let dir = tempfile::tempdir().expect("directory");
    let good = r#"{"context": "a", "choices": [" b", " c"], "label": 0}"#;
    for (line, what) in [
        ("{", "line 2: is not valid JSON"),
        ("[]", "line 2: is not a JSON object"),
        (r#"{"context": "a", "choices": [" b", " c"]}"#, "\"label\" is missing"),
        (r#"{"context": "a", "choices": [" b", " c"], "label": 2}"#, "expected 0 to 1"),
        (r#"{"context": "a", "choices": [" b"], "label": 0}"#, "has 1 texts"),
        (r#"{"context": "a", "choices": [" b", " "], "label": 0}"#, "choice 1 is empty"),
        (r#"{"context": 5, "choices": [" b", " c"], "label": 0}"#, "is a number, expected a text"),
        (r#"{"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}"#, "no _"),
        (r#"{"unknown": 1}"#, "which no known task has"),
        (r#"{"text": "t"}"#, "row 2 is of kind text"),
        (r#"{"doc": {}, "arguments": 3}"#, "\"arguments\" is not a list"),
    ] {
        let path = dir.path().join("bad.jsonl");
        fs::write(&path, format!("{good}\n{line}\n")).expect("file");
        let error = Task::read(&path, 10).expect_err(line).to_string();
        assert!(error.contains("bad.jsonl") && error.contains(what), "{line}: {error}");
    }
    for (name, bytes, what) in [
        ("empty.jsonl", &b"\n"[..], "has no rows"),
        ("empty.txt", b"", "row 1: the text is empty"),
        ("latin.txt", b"caf\xe9", "is not UTF-8: byte 3"),
        ("other.json", b"{}", "SQuAD's format"),
    ] {
        let path = dir.path().join(name);
        fs::write(&path, bytes).expect("file");
        let error = Task::read(&path, 10).expect_err(name).to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn passkeys_stand_where_they_were_asked_for() {
    let options =
        PasskeyOptions { lengths: vec![200, 400], depths: vec![0.0, 0.5, 1.0], count: 2, seed: 1 };
    let task = options.task(model().tokenizer(), 1024).expect("task");
    assert_eq!((task.rows.len(), task.kind), (12, TaskKind::Passkey));
    for row in &task.rows {
        let Content::Passkey { prompt, answer, depth, length } = &row.content else { panic!() };
        let (depth, length) = (depth.expect("depth"), length.expect("length"));
        let tokens = model().tokenizer().encode(prompt).expect("tokens").len();
        assert!(tokens <= length && tokens > length - 40, "{tokens} of {length}");
        let text = prompt.split("\n\n").nth(1).expect("the text between instruction and question");
        let place = text.find(answer.as_str()).expect("key") as f64 / text.len() as f64;
        // The key stands a few words into its sentences, of which there are few.
        assert!((place - depth).abs() < if length == 400 { 0.15 } else { 0.25 }, "{place} {depth}");
    }
    for length in [0, 10, 1025, usize::MAX] {
        let options = PasskeyOptions { lengths: vec![length], ..options.clone() };
        let error = options.task(model().tokenizer(), 1024).expect_err("refused").to_string();
        assert!(error.contains(&length.to_string()), "{error}");
    }
}

// ---------------------------------------------------------------------------- the command

fn run(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deltallm"));
    // What is found out about adapters is nothing to leave in a user's home.
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    command.args(["eval", "--device", "cpu"]).args(args).stdin(Stdio::null());
    command.output().expect("the program starts")
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

#[test]
fn a_run_writes_tables_files_and_pictures_and_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().expect("directory");
    let (out, files) = (dir.path().join("out"), ["choice.jsonl", "question.jsonl"].map(fixture));
    let with = |more: &[&str]| {
        let sweep = ["--sweep", "theta=0.5sigma,1.5sigma", "--compare", "keys=int8"];
        let files = [path(&files[0]), path(&files[1]), "--limit", "3", "--out", path(&out)];
        run(&[&files[..], &sweep, more].concat())
    };
    let first = with(&[]);
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let table = String::from_utf8(first.stdout).expect("UTF-8");
    for text in ["choice: choice, 3 rows, prefill", "delta theta=1.5sigma", "acc_norm", "int8"] {
        assert!(table.contains(text), "{text} in {table}");
    }
    let results: Value =
        serde_json::from_str(&fs::read_to_string(out.join("results.json")).expect("results"))
            .expect("JSON");
    assert_eq!(results["results"][1]["policies"].as_array().map(Vec::len), Some(4));
    let policy = &results["results"][0]["policies"][1];
    assert!(
        policy["sparsity"].as_f64().expect("sparsity") < policy["zeros"].as_f64().expect("zeros")
    );
    let csv = fs::read_to_string(out.join("results.csv")).expect("CSV");
    let columns = |line: &str| line.split(',').count();
    assert!(csv.lines().count() > 8 && csv.lines().all(|line| columns(line) == 16), "{csv}");
    for name in ["choice-prefill-bits.svg", "question-prefill-sparsity.svg"] {
        let picture = fs::read_to_string(out.join(name)).expect(name);
        assert!(picture.starts_with("<svg") && picture.contains("delta"), "{picture}");
    }

    // Cut off in the middle of a line, and even of a character, as where the power went: what is
    // whole is kept, with the times that it took then, and the rest is done again.
    let samples = out.join("samples.jsonl");
    let whole = fs::read_to_string(&samples).expect("samples");
    let cut = whole.len() - whole.len() / 3;
    fs::write(&samples, [&whole.as_bytes()[..cut], "é".as_bytes()[..1].as_ref()].concat())
        .expect("cut");
    let kept = whole[..cut].rfind('\n').expect("lines") + 1;
    let again = with(&[]);
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    let without_times = |text: &str| -> String {
        let cells = |line: &str| {
            line.rsplit_once("| ")
                .map_or(line, |l| l.0.rsplit_once('|').map_or("", |l| l.0))
                .to_owned()
        };
        text.lines().map(cells).collect()
    };
    let second = String::from_utf8(again.stdout).expect("UTF-8");
    assert_eq!(without_times(&second), without_times(&table));
    let lines = |text: &str| text.lines().count();
    let resumed = fs::read_to_string(&samples).expect("samples");
    assert_eq!(lines(&resumed), lines(&whole));
    assert_eq!(resumed[..kept], whole[..kept]);
    assert_ne!(resumed[kept..], whole[kept..], "times differ where rows were run again");

    // Other settings do not mix with it.
    let other = with(&["--stage", "decode", "--answer-tokens", "3"]);
    assert!(!other.status.success());
    let error = String::from_utf8(other.stderr).expect("UTF-8");
    assert!(error.contains("samples.jsonl") && error.contains("--fresh"), "{error}");
    assert!(with(&["--stage", "decode", "--fresh", "--answer-tokens", "3"]).status.success());
}

#[test]
fn rows_that_are_too_long_are_refused_or_left_out() {
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("long.jsonl");
    let long = "Anna lives in Bergen. ".repeat(400);
    let rows = format!(
        "{{\"context\": \"{long}\", \"answer\": \"1\"}}\n{{\"context\": \"One is\", \"answer\": \"1\"}}\n"
    );
    fs::write(&file, rows).expect("file");
    let refused = run(&[path(&file)]);
    let error = String::from_utf8(refused.stderr).expect("UTF-8");
    assert!(
        !refused.status.success() && error.contains("0 of long") && error.contains("1024"),
        "{error}"
    );
    let left_out = run(&[path(&file), "--skip-long"]);
    assert!(left_out.status.success());
    let table = String::from_utf8(left_out.stdout).expect("UTF-8");
    assert!(table.contains("1 rows, 1 too long and left out"), "{table}");
}
