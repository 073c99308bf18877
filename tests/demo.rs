//! The model inside: that it opens from memory, and, marked below, what it must have learned.
#![cfg(feature = "demo")]

mod common;

use deltallm::checkpoint::Checkpoint;
use deltallm::{GenerateOptions, Model, Session, SessionOptions};

#[test]
fn it_is_small_and_what_it_is_said_to_be() {
    let dir = [env!("CARGO_MANIFEST_DIR"), "src", "demo"].iter().collect::<std::path::PathBuf>();
    let files = std::fs::read_dir(dir).expect("directory");
    let bytes: u64 = files.map(|file| file.expect("file").metadata().expect("size").len()).sum();
    assert!(bytes <= 8_000_000, "{bytes} bytes");
    let checkpoint = Checkpoint::embedded().expect("opens");
    let millions = checkpoint.config.parameters() as f64 / 1e6;
    let words = format!("{millions:.1} M parameters");
    assert!(deltallm::demo::DESCRIPTION.contains(&words), "{words}");
}

/// The greedy continuation of a text.
fn continuation(model: &Model, prompt: &str, tokens: usize) -> String {
    let ids = model.tokenizer().encode(prompt).expect("ids");
    let mut session = Session::new(model, &SessionOptions::default()).expect("session");
    let options = GenerateOptions { max_tokens: tokens, ..GenerateOptions::default() };
    let pieces = session.generate(&ids, &options).expect("generation");
    pieces.map(|piece| piece.expect("piece").text).collect()
}

#[test]
fn it_runs_on_every_device() {
    for (device, options) in common::devices() {
        let model = Model::embedded(&options).unwrap_or_else(|error| panic!("{device}: {error}"));
        let ids = model.tokenizer().encode("Anna put the red ball").expect("ids");
        let mut session = Session::new(&model, &SessionOptions::default()).expect("session");
        let logits = session.evaluate(&ids).expect("logits");
        assert_eq!(logits.len(), model.config().vocabulary, "{device}");
    }
}

/// What the trained model must do: these tests alone look at its weights. Words and sentences are
/// those of `training/world.py`.
mod learned {
    use super::*;

    const CONTAINERS: [&str; 10] = [
        "box", "basket", "drawer", "bag", "chest", "cupboard", "bucket", "suitcase", "jar",
        "barrel",
    ];

    /// Every word of the world's source: names, places, objects and the sentences about them.
    fn words() -> std::collections::HashSet<String> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/training/world.py");
        let source = std::fs::read_to_string(path).expect("the world");
        let words = source.split(|c: char| !c.is_alphabetic());
        words.map(str::to_lowercase).collect()
    }

    #[test]
    fn a_story_goes_on_sensibly() {
        let words = words();
        for (device, options) in common::devices() {
            let model = Model::embedded(&options).expect("model");
            let text = continuation(&model, "Anna put the red ball", 60);
            let (first, _) = text.split_once('.').unwrap_or_else(|| panic!("{device}: {text:?}"));
            let container = first.strip_prefix(" in the ");
            assert!(container.is_some_and(|word| CONTAINERS.contains(&word)), "{device}: {text:?}");
            let whole = text.rsplit_once(' ').map_or(&text[..], |(whole, _)| whole);
            for word in whole.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty()) {
                assert!(words.contains(&word.to_lowercase()), "{device}: {word:?} in {text:?}");
            }
        }
    }

    #[test]
    fn a_question_is_answered_from_the_story() {
        let model = Model::embedded(&deltallm::ModelOptions::default()).expect("model");
        let story = "Anna lives in Paris. Tom is a baker. Anna put the red ball in the basket.";
        for (question, answer) in
            [("Where does Anna live?", "Paris"), ("Where did Anna put the red ball?", "basket")]
        {
            let text =
                continuation(&model, &format!("{story}\n\nQuestion: {question}\nAnswer:"), 12);
            let said = text.lines().next().unwrap_or_default();
            assert!(said.contains(answer), "{question} {text:?}");
        }
    }

    #[cfg(feature = "chat")]
    #[test]
    fn a_conversation_is_held() {
        use deltallm::FinishReason;
        use deltallm::chat::{ChatTemplate, Conversation};

        for (device, options) in common::devices() {
            let model = Model::embedded(&options).expect("model");
            let template = ChatTemplate::of(&model).expect("readable").expect("there");
            let session = Session::new(&model, &SessionOptions::default()).expect("session");
            let mut conversation = Conversation::new(session, template);
            let mut ask = |text: &str| {
                let mut reply =
                    conversation.ask(text, &GenerateOptions::default()).expect("a reply");
                reply.by_ref().for_each(|piece| drop(piece.expect("piece")));
                let ended = matches!(reply.finish_reason(), Some(FinishReason::EndOfSequence(_)));
                assert!(ended, "{device}: {text} {:?}", reply.text());
                reply.text().to_owned()
            };
            ask("Anna lives in Paris. Tom is a baker.");
            let answer = ask("Where does Anna live?");
            assert!(answer.contains("Paris"), "{device}: {answer:?}");
            let answer = ask("What is the job of Tom?");
            assert!(answer.contains("baker"), "{device}: {answer:?}");
        }
    }
}
