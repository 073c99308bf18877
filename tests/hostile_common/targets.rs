//! What is done with an input: each function takes bytes, and fails where the rule of
//! [`super`] is broken. The fuzzers call nothing else.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use deltallm::chat::{ChatTemplate, Message};
use deltallm::checkpoint::{Bytes, Checkpoint};
use deltallm::delta::{AttentionPolicy, PolicyFile, Thresholds};
use deltallm::eval::{PrepareOptions, Prepared, Task};
use deltallm::gpu::{Findings, Tunings};
use deltallm::model::{WeightFormat, plan_memory};
use deltallm::{
    DeviceChoice, Error, GenerateOptions, Model, ModelOptions, Result, Session, SessionOptions,
};

use super::valid::{self, Files};
use super::{Outcome, refused};

/// What errors name where a model is in memory.
const NAME: &str = "hostile-model";

/// The kinds of input, each a fuzzer of its own.
pub const NAMES: [&str; 14] = [
    "config",
    "generation_config",
    "weights",
    "shards",
    "tokenizer",
    "tokenizer_config",
    "template",
    "policy_file",
    "policy_text",
    "session",
    "tunings",
    "self_tests",
    "task_lines",
    "task_squad",
];

/// Does with an input what is done with one of this kind.
pub fn by_name(name: &str, bytes: &[u8]) -> Outcome {
    let of_model = |file| model(&valid::models()[0], file, bytes);
    match name {
        "config" => of_model("config.json"),
        "generation_config" => of_model("generation_config.json"),
        "weights" => of_model("model.safetensors"),
        "shards" => model(valid::sharded(), "model.safetensors.index.json", bytes),
        "tokenizer" => of_model("tokenizer.json"),
        "tokenizer_config" => of_model("tokenizer_config.json"),
        "template" => template(bytes),
        "policy_file" => policy_file(bytes),
        "policy_text" => policy_text(bytes),
        "session" => session(bytes),
        "tunings" => tunings(bytes),
        "self_tests" => self_tests(bytes),
        "task_lines" => task("jsonl", bytes),
        "task_squad" => task("json", bytes),
        _ => panic!("there is no kind {name:?}"),
    }
}

/// Opens a model that is in memory, on the CPU.
pub fn open(files: &Files) -> Result<Model> {
    let files = files.iter().map(|(name, bytes)| (name.clone(), bytes.clone()));
    let checkpoint = Checkpoint::from_memory(NAME, files)?;
    // What is told of a model before its weights are looked at.
    let config = &checkpoint.config;
    let context = config.context.min(4096);
    let plan = plan_memory(config, 2, WeightFormat::Q4, context, &AttentionPolicy::delta());
    assert!(config.parameters() > 0 && plan.total() > 0);
    Model::open_checkpoint(checkpoint, &cpu(), |_| ControlFlow::Continue(()))
}

/// Opens a model directory on the CPU, and runs it.
pub fn directory(path: &Path) -> Outcome {
    match Model::open(path, &cpu()) {
        Ok(model) => run(&model),
        Err(error) => refused(&error, path.to_str().expect("UTF-8")),
    }
}

fn cpu() -> ModelOptions {
    ModelOptions { device: DeviceChoice::Cpu, threads: Some(1), ..ModelOptions::default() }
}

/// A model of which one file is replaced.
pub fn model(files: &Files, name: &str, bytes: &[u8]) -> Outcome {
    let mut files = files.clone();
    files.insert(name.to_owned(), Bytes::from(bytes.to_vec()));
    match open(&files) {
        Ok(model) => run(&model),
        Err(error) => refused(&error, NAME),
    }
}

/// Runs a model that was opened: a prompt, some tokens, its chat template. That may fail, but only
/// with an error.
fn run(model: &Model) -> Outcome {
    let options = SessionOptions {
        context: Some(model.config().context.min(40)),
        ..SessionOptions::default()
    };
    let step = || -> Result<()> {
        let ids = model.tokenizer().encode("Hi, you!")?;
        let mut session = Session::new(model, &options)?;
        let logits = session.evaluate(&ids)?;
        assert!(logits.iter().all(|x| x.is_finite()), "logits are finite or an error");
        let sampling = model.config().sampling.clone();
        let options = GenerateOptions { max_tokens: 3, sampling, ..GenerateOptions::default() };
        for piece in session.generate(&[], &options)? {
            piece?;
        }
        let ids = session.tokens().to_vec();
        model.tokenizer().decode(&ids).map(drop)
    };
    let stepped = step();
    let template = match ChatTemplate::of(model) {
        Ok(None) => Outcome::Accepted,
        Ok(Some(template)) => rendered(&template, NAME),
        Err(error) => refused(&error, ""),
    };
    match (stepped, template) {
        (Err(error), _) => refused(&error, ""),
        (Ok(()), template) => template,
    }
}

/// A model with this chat template.
pub fn template(source: &[u8]) -> Outcome {
    let source = String::from_utf8_lossy(source);
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    match ChatTemplate::new(&source, tokens) {
        Ok(template) => rendered(&template, "chat_template"),
        Err(error) => refused(&error, "chat_template"),
    }
}

fn rendered(template: &ChatTemplate, file: &str) -> Outcome {
    let messages = [
        Message::system("Be brief. "),
        Message::user(" Who are you?\n"),
        Message::assistant("Nobody."),
        Message::user("{{ messages }}"),
    ];
    match template.render(&messages, true) {
        Ok(_) => Outcome::Accepted,
        Err(error) => refused(&error, file),
    }
}

thread_local! {
    /// One for all inputs: to make and remove thousands takes longer than what is tested.
    static DIR: tempfile::TempDir = valid::directory();
}

/// A file with an input.
struct Written(PathBuf);

impl Written {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let path = DIR.with(|dir| dir.path().join(name));
        fs::write(&path, bytes).expect("written");
        Self(path)
    }

    fn judge<T>(&self, result: Result<T>) -> Outcome {
        match result {
            Ok(_) => Outcome::Accepted,
            Err(error) => refused(&error, self.0.to_str().expect("UTF-8")),
        }
    }
}

/// A policy's file; what is read is written and read again as the same.
pub fn policy_file(bytes: &[u8]) -> Outcome {
    let file = Written::new("policy.json", bytes);
    let read = PolicyFile::read(&file.0);
    if let Ok(policy) = &read {
        policy.write(&file.0).expect("written");
        let again = PolicyFile::read(&file.0).expect("what is written is read");
        assert_eq!(&again, policy);
    }
    file.judge(read)
}

/// A policy's text, and a text of thresholds; what is read is printed and read again as the same.
pub fn policy_text(text: &[u8]) -> Outcome {
    let text = String::from_utf8_lossy(text);
    let thresholds: Result<Thresholds> = text.parse();
    if let Ok(thresholds) = &thresholds {
        assert_eq!(&thresholds.to_string().parse::<Thresholds>().expect("read"), thresholds);
    }
    let policy: Result<AttentionPolicy> = text.parse();
    match (policy, thresholds) {
        (Ok(policy), _) => {
            assert_eq!(policy.to_string().parse::<AttentionPolicy>().expect("read"), policy);
            Outcome::Accepted
        }
        (Err(_), Ok(_)) => Outcome::Accepted,
        (Err(one), Err(other)) => {
            refused(&other, "thresholds");
            refused(&one, "")
        }
    }
}

/// A session's file; one that is loaded goes on, or says why not.
pub fn session(bytes: &[u8]) -> Outcome {
    let file = Written::new("session", bytes);
    let loaded = Session::load(valid::opened(), &file.0);
    if let Ok(mut session) = Session::load(valid::opened(), &file.0) {
        let gone_on = session.evaluate(&[5, 6]).map(drop).and_then(|()| {
            session.truncate(session.tokens().len().saturating_sub(20));
            session.statistics()?;
            session.evaluate(&[7])?;
            session.save(&file.0)
        });
        if let Err(error) = gone_on {
            assert!(!matches!(error, Error::Malformed { .. }), "{error}");
            return refused(&error, "");
        }
    }
    file.judge(loaded)
}

/// A file of tunings.
pub fn tunings(bytes: &[u8]) -> Outcome {
    let file = Written::new("tunings.json", bytes);
    file.judge(Tunings::read(&file.0))
}

/// A file of what self-tests have found.
pub fn self_tests(bytes: &[u8]) -> Outcome {
    let file = Written::new("self-tests.json", bytes);
    file.judge(Findings::read(&file.0))
}

/// A task's file with this extension; its rows become tokens.
pub fn task(extension: &str, bytes: &[u8]) -> Outcome {
    let file = Written::new(&format!("task.{extension}"), bytes);
    let read = Task::read(&file.0, 100);
    // A megabyte of text takes the tokenizer a second.
    if let Some(task) = read.as_ref().ok().filter(|_| bytes.len() < 1 << 18) {
        let options = PrepareOptions { length: 16, stride: 8, answer: 4 };
        for row in &task.rows {
            // Of a row without anything to be scored it says so, by the row's name.
            let _ = Prepared::new(row, valid::opened().tokenizer(), &options);
        }
    }
    file.judge(read)
}
