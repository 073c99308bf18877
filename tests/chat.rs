//! Conversations: chat templates as transformers renders them, and turns that reuse a session.
#![cfg(feature = "chat")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use deltallm::chat::{ChatTemplate, Conversation, Message, Role};
use deltallm::{
    DeviceChoice, Error, FinishReason, GenerateOptions, Model, ModelOptions, Session,
    SessionOptions,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// BitNet's own template: a model of these tests need not have been trained for it.
const BITNET: &str = "{% for message in messages %}{{ message['role'] | capitalize + ': ' + \
    message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ \
    'Assistant: ' }}{% endif %}";

fn golden() -> Value {
    let path = common::fixture("chat").join("chat.json");
    serde_json::from_str(&fs::read_to_string(path).expect("file")).expect("json")
}

fn template(golden: &Value, model: &str) -> ChatTemplate {
    let entry = &golden["templates"][model];
    let variables: BTreeMap<String, String> =
        serde_json::from_value(entry["variables"].clone()).expect("variables");
    let variables = variables.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    ChatTemplate::new(entry["template"].as_str().expect("template"), variables).expect(model)
}

fn messages(list: &Value) -> Vec<Message> {
    let message = |entry: &Value| {
        let content = entry["content"].as_str().expect("content");
        match entry["role"].as_str() {
            Some("system") => Message::system(content),
            Some("user") => Message::user(content),
            _ => Message::assistant(content),
        }
    };
    list.as_array().expect("messages").iter().map(message).collect()
}

#[test]
fn known_templates_render_as_in_transformers() {
    let golden = golden();
    let cases = golden["cases"].as_array().expect("cases");
    assert!(cases.len() >= 80);
    for case in cases {
        let template = template(&golden, case["model"].as_str().expect("model"));
        let prompt = case["add_generation_prompt"] == true;
        let rendered = template.render(&messages(&case["messages"]), prompt);
        match case["text"].as_str() {
            Some(expected) => assert_eq!(rendered.expect("text"), expected, "{case}"),
            None => {
                let error = rendered.expect_err("refused").to_string();
                assert!(error.contains(case["error"].as_str().expect("error")), "{error}: {case}");
            }
        }
    }
}

/// Every one is an error, soon.
#[test]
fn a_hostile_template_is_an_error() {
    let hostile = [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'chat_template' %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ strftime_now('%!') }}",
        "{{ messages[0].content.nothing() }}",
        "{{ absent.field }}",
        "{{ open('/etc/passwd') }}",
        "{% include '/etc/passwd' %}",
    ];
    for source in hostile {
        let start = Instant::now();
        let template = ChatTemplate::new(source, []).expect(source);
        let error = template.render(&[Message::user("x")], true).expect_err(source).to_string();
        assert!(error.contains("chat template: "), "{source}: {error}");
        assert!(start.elapsed() < Duration::from_secs(20), "{source}");
    }
    let deep = format!("{{{{ {}1{} }}}}", "(".repeat(9999), ")".repeat(9999));
    for source in ["{% if %}", "{{ 1", "{% for %}", "{% generation", &deep] {
        assert!(ChatTemplate::new(source, []).is_err(), "{source}");
    }
}

#[test]
fn strftime_gives_the_date() {
    let template = ChatTemplate::new("{{ strftime_now('%d %b %Y') }}", []).expect("template");
    let date = template.render(&[], false).expect("date");
    let words: Vec<&str> = date.split(' ').collect();
    assert!(
        matches!(&words[..], [day, month, year] if day.len() == 2 && month.len() == 3
        && year.starts_with("20")),
        "{date}"
    );
}

/// A fixture's model with a template.
struct Copy(TempDir);

impl Copy {
    fn of(name: &str) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let files = fs::read_dir(common::fixture(name)).expect("directory");
        for file in files.map(|file| file.expect("file").path()) {
            fs::copy(&file, dir.path().join(file.file_name().expect("name"))).expect("copied");
        }
        Self(dir)
    }

    fn config(self, change: impl FnOnce(&mut Value)) -> Self {
        let path = self.0.path().join("tokenizer_config.json");
        let text = fs::read_to_string(&path).unwrap_or_else(|_| "{}".into());
        let mut config: Value = serde_json::from_str(&text).expect("json");
        change(&mut config);
        fs::write(&path, config.to_string()).expect("written");
        self
    }

    fn file(self, text: &str) -> Self {
        fs::write(self.0.path().join("chat_template.jinja"), text).expect("written");
        self
    }

    fn open(&self, device: DeviceChoice) -> Model {
        let options = ModelOptions { device, ..ModelOptions::default() };
        Model::open(self.0.path(), &options).expect("model")
    }

    fn template(&self) -> deltallm::Result<Option<ChatTemplate>> {
        ChatTemplate::of(&self.open(DeviceChoice::Cpu))
    }

    fn renders(&self) -> String {
        let template = self.template().expect("readable").expect("there");
        template.render(&[Message::user("Hi")], true).expect("text")
    }
}

#[test]
fn the_template_is_found_where_it_may_be() {
    let llama = || Copy::of("llama-32");
    assert!(llama().config(|c| c["chat_template"] = Value::Null).template().expect("ok").is_none());
    let text = "{{ bos_token }}{{ messages[0].content }}";
    let with_bos = |token: Value| {
        llama().config(|c| {
            c["chat_template"] = text.into();
            c["bos_token"] = token;
        })
    };
    assert_eq!(with_bos("<b>".into()).renders(), "<b>Hi");
    assert_eq!(with_bos(json!({ "content": "<b>", "lstrip": false })).renders(), "<b>Hi");
    assert_eq!(with_bos("<b>".into()).file("{{ bos_token }}file").renders(), "<b>file");
    let list = |default: &str| json!([{ "name": "tool_use", "template": "tool" }, { "name": default, "template": text }]);
    let of_list = |name: &str| llama().config(|c| c["chat_template"] = list(name));
    assert!(of_list("default").renders().ends_with("Hi"));
    for (copy, word) in [
        (of_list("other"), "tool_use"),
        (llama().config(|c| c["chat_template"] = 3.into()), "chat_template"),
        (llama().config(|c| c["chat_template"] = "a\n{% if %}".into()), "line 2"),
        (llama().file("{{"), "chat_template.jinja"),
    ] {
        let error = copy.template().expect_err(word).to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn special_tokens_of_a_conversation_are_tokens_and_none_is_added() {
    let copy = Copy::of("llama-64")
        .config(|c| c["chat_template"] = "{{ bos_token }}{{ messages[0].content }}".into());
    let model = copy.open(DeviceChoice::Cpu);
    let plain = model.tokenizer().encode("Hi there").expect("ids");
    let config = fs::read_to_string(copy.0.path().join("tokenizer_config.json")).expect("file");
    let config: Value = serde_json::from_str(&config).expect("json");
    assert!(config["bos_token"].is_string(), "{config}");
    let template = ChatTemplate::of(&model).expect("ok").expect("a template");
    let ids = template.encode(model.tokenizer(), &[Message::user("Hi there")], true);
    assert_eq!(ids.expect("ids"), plain);
}

fn greedy(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, ..GenerateOptions::default() }
}

fn conversation(model: &Model, context: Option<usize>) -> Conversation {
    let template = ChatTemplate::of(model).expect("ok").expect("a template");
    let options = SessionOptions { context, ..SessionOptions::default() };
    Conversation::new(Session::new(model, &options).expect("session"), template)
}

/// One turn: the reply, its tokens, and the tokens that had to be run.
fn ask(conversation: &mut Conversation, text: &str, max: usize) -> (String, Vec<u32>, usize) {
    let mut reply = conversation.ask(text, &greedy(max)).expect("a reply");
    let ids = reply.by_ref().filter_map(|piece| piece.expect("piece").token).collect();
    (reply.text().to_owned(), ids, reply.timings().prompt_tokens)
}

/// A turn on what the session holds equals the same conversation run from its start.
#[test]
fn a_turn_on_a_warm_session_equals_a_fresh_run() {
    let copy = Copy::of("bitnet-64").config(|c| c["chat_template"] = BITNET.into());
    for device in [DeviceChoice::Reference, DeviceChoice::Cpu] {
        let model = copy.open(device.clone());
        let mut warm = conversation(&model, None);
        warm.begin(Some("Be brief."));
        let mut held = Session::new(&model, &SessionOptions::default()).expect("session");
        for (turn, text) in ["Where is Anna?", "And \u{e9}mile?", "Who?"].into_iter().enumerate() {
            let mut before = warm.messages().to_vec();
            let (reply, ids, run) = ask(&mut warm, text, 6);
            before.push(Message::user(text));
            let template = ChatTemplate::of(&model).expect("ok").expect("a template");
            let prompt = template.encode(model.tokenizer(), &before, true).expect("ids");
            let mut fresh = Session::new(&model, &SessionOptions::default()).expect("session");
            let generation = fresh.generate(&prompt, &greedy(6)).expect("generation");
            let expected: Vec<u32> =
                generation.filter_map(|piece| piece.expect("piece").token).collect();
            assert_eq!(ids, expected, "turn {turn} on {device}");
            assert!(if turn == 0 { run == prompt.len() } else { run < prompt.len() / 2 });

            // To the bit: the logits after this prompt, on what the turns before have left.
            let same = held.tokens().iter().zip(&prompt).take_while(|(a, b)| a == b).count();
            held.truncate(same);
            let on_held = held.evaluate(&prompt[same..]).expect("logits");
            let mut fresh = Session::new(&model, &SessionOptions::default()).expect("session");
            assert_eq!(on_held, fresh.evaluate(&prompt).expect("logits"), "{turn} on {device}");
            held.generate(&[], &greedy(6)).expect("generation").for_each(drop);

            assert_eq!(warm.messages().last(), Some(&Message::assistant(reply)));
        }
        assert_eq!(warm.messages().len(), 7);
        warm.clear();
        assert_eq!(warm.messages(), [Message::system("Be brief.")]);
    }
}

#[test]
fn a_full_context_loses_its_oldest_turns() {
    let copy = Copy::of("llama-32").config(|c| c["chat_template"] = BITNET.into());
    let model = copy.open(DeviceChoice::Cpu);
    let mut long = conversation(&model, Some(200));
    long.begin(Some("Short"));
    let mut dropped = 0;
    for turn in 0..12 {
        let mut reply = long.ask(&format!("Turn {turn}"), &greedy(8)).expect("a reply");
        dropped += reply.dropped();
        assert_eq!(reply.dropped() % 2, 0, "whole turns");
        reply.by_ref().for_each(|piece| drop(piece.expect("piece")));
        drop(reply);
        assert!(long.session().tokens().len() <= 201);
        assert_eq!(long.messages()[0], Message::system("Short"));
        assert_eq!(long.messages()[1].role, Role::User);
        assert_eq!(long.messages().len() + dropped, 1 + 2 * (turn + 1));
    }
    assert!(dropped > 0);

    // What does not fit by itself is refused, and nothing was said.
    let before = long.messages().to_vec();
    let error = long.ask(&"long ".repeat(300), &greedy(8)).expect_err("does not fit");
    assert!(matches!(error, Error::ContextFull { limit: 200, .. }), "{error}");
    assert_eq!(long.messages(), before);
    ask(&mut long, "Again", 4);
}

#[test]
fn a_reply_that_is_stopped_stays_as_far_as_it_came() {
    let copy = Copy::of("llama-32").config(|c| c["chat_template"] = BITNET.into());
    let model = copy.open(DeviceChoice::Cpu);
    let mut stopped = conversation(&model, None);
    // Nothing was said yet: the question is taken back.
    drop(stopped.ask("Hello", &greedy(50)).expect("a reply"));
    assert!(stopped.messages().is_empty());

    let cancel = stopped.session().cancel_handle();
    let options = GenerateOptions { ignore_eos: true, ..greedy(50) };
    let mut reply = stopped.ask("Hello", &options).expect("a reply");
    while reply.text().is_empty() {
        reply.next().expect("more").expect("piece");
    }
    cancel.cancel();
    reply.by_ref().for_each(|piece| drop(piece.expect("piece")));
    assert_eq!(reply.finish_reason(), Some(&FinishReason::Cancelled));
    let text = reply.text().to_owned();
    drop(reply);
    assert_eq!(stopped.messages(), [Message::user("Hello"), Message::assistant(text)]);
    // A longer text says so at once, this one with its first token.
    let mut reply = stopped.ask("More", &options).expect("a reply");
    assert!(reply.next().is_none());
    drop(reply);
    assert!(matches!(stopped.ask(&"More ".repeat(60), &options), Err(Error::Cancelled)));
    assert_eq!(stopped.messages().len(), 2);
    cancel.reset();
    ask(&mut stopped, "More", 3);
    assert_eq!(stopped.messages().len(), 4);
}
