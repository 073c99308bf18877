//! A session over turns: its cache, its limits, its sampling, and the text as it streams.

mod common;

use std::fs;

use common::{BITNETS, Golden, LLAMAS, devices, distance, fixture, logits, open};
use deltallm::backend::CacheFormat;
use deltallm::delta::AttentionPolicy;
use deltallm::{
    Error, FinishReason, GenerateOptions, Model, ModelOptions, Sampling, Session, SessionOptions,
};
use serde_json::Value;

const F32: SessionOptions =
    SessionOptions { context: Some(512), attention: AttentionPolicy::plain(CacheFormat::F32) };

fn session(model: &Model) -> Session {
    Session::new(model, &F32).expect("session")
}

fn greedy(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, ignore_eos: true, ..GenerateOptions::default() }
}

fn ids(session: &mut Session, prompt: &[u32], options: &GenerateOptions) -> Vec<u32> {
    let pieces = session.generate(prompt, options).expect("prompt");
    pieces.filter_map(|piece| piece.expect("piece").token).collect()
}

#[test]
fn decoding_one_by_one_equals_prefilling_at_once() {
    for (device, options) in devices() {
        for name in LLAMAS.into_iter().chain(BITNETS) {
            let (model, golden) = (open(name, &options), Golden::read(name));
            let prompt = golden.ids("ids_65");
            let at_once = logits(&model, prompt, CacheFormat::F32);
            let mut session = session(&model);
            let one_by_one: Vec<f32> =
                prompt.iter().flat_map(|id| session.evaluate(&[*id]).expect("step")).collect();
            let apart = distance(&one_by_one, &at_once, model.config().vocabulary);
            let case = format!("{name} on {device}: {apart:?}");
            if LLAMAS.contains(&name) {
                assert!(apart.max < 1e-3, "{case}");
            } else {
                // Another order of summation may flip an 8-bit rounding, see tests/golden.rs.
                assert!(apart.max_kl < 0.05 && apart.median < 0.05, "{case}");
            }
        }
    }
}

/// Prompts of more than one chunk, and of exactly one.
#[test]
fn chunked_prefill_equals_the_logits_of_every_position() {
    for (device, options) in devices() {
        let (model, golden) = (open("llama-80", &options), Golden::read("llama-80"));
        let vocabulary = model.config().vocabulary;
        for length in [255, 256, 257, 300] {
            let last = session(&model).evaluate(&golden.ids("ids_300")[..length]).expect("prompt");
            let expected = &golden.floats("logits_300")[(length - 1) * vocabulary..][..vocabulary];
            let apart = distance(&last, expected, vocabulary);
            assert!(apart.max < 1e-3, "{length} tokens on {device}: {apart:?}");
        }
    }
}

#[test]
fn a_session_cut_back_equals_a_fresh_one() {
    for (device, options) in devices() {
        for name in ["llama-64", "bitnet-64"] {
            let (model, golden) = (open(name, &options), Golden::read(name));
            let text = golden.ids("ids_65");
            let (start, wrong, right) = (&text[..20], &text[20..45], &text[45..65]);
            let mut cut = session(&model);
            cut.evaluate(start).expect("start");
            cut.evaluate(wrong).expect("wrong turn");
            cut.truncate(start.len());
            assert_eq!(cut.tokens(), start);
            let found = cut.evaluate(right).expect("right turn");

            let mut fresh = session(&model);
            fresh.evaluate(start).expect("start");
            let expected = fresh.evaluate(right).expect("right turn");
            assert_eq!(found, expected, "{name} on {device}");

            cut.clear();
            assert!(matches!(cut.evaluate(&[]), Err(Error::EmptyPrompt)));
        }
    }
}

#[test]
fn a_generation_continues_over_turns() {
    for (device, options) in devices() {
        let (model, golden) = (open("llama-32", &options), Golden::read("llama-32"));
        let prompt = golden.ids("greedy_prompt");
        let whole = ids(&mut session(&model), prompt, &greedy(12));
        let mut session = session(&model);
        let mut parts = ids(&mut session, prompt, &greedy(5));
        parts.extend(ids(&mut session, &[], &greedy(7)));
        assert_eq!(parts, whole, "{device}");
        assert_eq!(session.tokens(), [prompt, &whole].concat(), "{device}");

        // Cut back to what was there before: the same again, without a new prompt.
        session.truncate(prompt.len() + 3);
        assert_eq!(ids(&mut session, &[], &greedy(9)), whole[3..], "{device}");
    }
}

#[test]
fn text_streams_whole_and_equals_transformers() {
    for (device, options) in devices() {
        for name in LLAMAS {
            let model = open(name, &options);
            let text = fs::read_to_string(fixture(name).join("generation.json")).expect("file");
            let golden: Value = serde_json::from_str(&text).expect("json");
            let prompt = golden["prompt"].as_str().expect("prompt");
            let encoded = model.tokenizer().encode(prompt).expect("encoded");
            assert_eq!(Value::from(encoded.clone()), golden["ids"], "{name}");

            let mut session = session(&model);
            let pieces = session.generate(&encoded, &greedy(32)).expect("prompt");
            let pieces: Vec<_> = pieces.map(|piece| piece.expect("piece")).collect();
            let found: Vec<u32> = pieces.iter().filter_map(|piece| piece.token).collect();
            let text: String = pieces.iter().map(|piece| piece.text.as_str()).collect();
            assert_eq!(Value::from(found), golden["continuation_ids"], "{name} on {device}");
            assert_eq!(text, golden["continuation"], "{name} on {device}");
        }
    }
}

#[test]
fn tokenizers_agree_on_awkward_texts() {
    let options = ModelOptions { device: deltallm::DeviceChoice::Cpu, ..Default::default() };
    for name in LLAMAS.into_iter().chain(BITNETS) {
        let model = open(name, &options);
        let text = fs::read_to_string(fixture(name).join("tokens.json")).expect("file");
        let cases: Value = serde_json::from_str(&text).expect("json");
        for case in cases.as_array().expect("a list") {
            let text = case["text"].as_str().expect("text");
            let encoded = model.tokenizer().encode(text).expect("encoded");
            assert_eq!(Value::from(encoded.clone()), case["ids"], "{name}: {text:?}");
            let decoded = model.tokenizer().decode(&encoded).expect("decoded");
            assert_eq!(decoded, case["decoded"], "{name}: {text:?}");
            let plain = model.tokenizer().encode_continuation(text).expect("encoded");
            assert_eq!(Value::from(plain), case["ids_without_special"], "{name}: {text:?}");
        }
    }
}

#[test]
fn a_seed_gives_its_text_and_another_seed_another() {
    for (device, options) in devices() {
        let (model, golden) = (open("llama-64", &options), Golden::read("llama-64"));
        let prompt = golden.ids("greedy_prompt");
        // Candidates chosen on the device, and all of them, on the host.
        for top_k in [40, 0] {
            let draw = |seed| {
                let sampling = Sampling { temperature: 1.5, top_k, seed, ..Default::default() };
                let options = GenerateOptions { sampling, ..greedy(24) };
                ids(&mut session(&model), prompt, &options)
            };
            assert_eq!(draw(1), draw(1), "{device}");
            assert_ne!(draw(1), draw(2), "{device}");
        }
        let cold = Sampling { temperature: 1e-4, seed: 9, ..Sampling::default() };
        let cold = GenerateOptions { sampling: cold, ..greedy(24) };
        let likeliest = ids(&mut session(&model), prompt, &greedy(24));
        assert_eq!(ids(&mut session(&model), prompt, &cold), likeliest, "{device}");
    }
}

#[test]
fn a_repetition_penalty_ends_repetition() {
    for (device, options) in devices() {
        let (model, golden) = (open("llama-32", &options), Golden::read("llama-32"));
        let sampling = Sampling { repetition_penalty: 1e6, ..Sampling::default() };
        let options = GenerateOptions { sampling, ..greedy(24) };
        let mut session = session(&model);
        ids(&mut session, golden.ids("greedy_prompt"), &options);
        let mut all = session.tokens()[golden.ids("greedy_prompt").len()..].to_vec();
        let made = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), made, "{device}: a token came twice");
    }
}

#[test]
fn a_generation_stops_where_it_is_told() {
    let options = ModelOptions { device: deltallm::DeviceChoice::Cpu, ..Default::default() };
    let (model, golden) = (open("llama-32", &options), Golden::read("llama-32"));
    let prompt = golden.ids("greedy_prompt");
    let run = |session: &mut Session, options: &GenerateOptions| {
        let mut generation = session.generate(prompt, options).expect("prompt");
        let text: String = generation.by_ref().map(|piece| piece.expect("piece").text).collect();
        (text, generation.finish_reason().cloned().expect("finished"))
    };
    let (text, finish) = run(&mut session(&model), &greedy(32));
    assert_eq!(finish, FinishReason::MaxTokens);
    assert_eq!(run(&mut session(&model), &greedy(0)), (String::new(), FinishReason::MaxTokens));

    // A stop text from the middle of what comes, which need not begin with a token.
    let at = (text.len() / 2..).find(|&at| text.is_char_boundary(at)).expect("an end");
    let stop = text[at..].chars().take(3).collect::<String>();
    let stopping = GenerateOptions { stop: vec![stop.clone()], ..greedy(32) };
    let (before, finish) = run(&mut session(&model), &stopping);
    assert_eq!(finish, FinishReason::Stop(stop.clone()));
    assert_eq!(before, text[..text.find(&stop).expect("it is in there")]);

    // Each token but the last one needs its place, also where the prompt fills the context.
    let whole = ids(&mut session(&model), prompt, &greedy(32));
    for room in [0, 4] {
        let context = prompt.len() + room;
        let small = SessionOptions {
            context: Some(context),
            attention: AttentionPolicy::plain(CacheFormat::F32),
        };
        let mut small = Session::new(&model, &small).expect("session");
        let (_, finish) = run(&mut small, &greedy(32));
        assert_eq!(finish, FinishReason::ContextFull);
        assert_eq!(small.tokens(), [prompt, &whole[..room + 1]].concat());
        let error = small.generate(&[], &greedy(1)).expect_err("full");
        assert!(matches!(error, Error::ContextFull { .. }), "{error}");
        small.truncate(context);
        assert_eq!(ids(&mut small, &[], &greedy(32)), whole[room..=room]);
    }

    let mut cancelled = session(&model);
    let cancel = cancelled.cancel_handle();
    let mut generation = cancelled.generate(prompt, &greedy(32)).expect("prompt");
    assert!(generation.next().is_some());
    cancel.cancel();
    assert!(generation.by_ref().all(|piece| piece.expect("piece").token.is_none()));
    assert_eq!(generation.finish_reason(), Some(&FinishReason::Cancelled));
}

#[test]
fn a_generation_ends_at_any_end_of_sequence_token() {
    let options = ModelOptions { device: deltallm::DeviceChoice::Cpu, ..Default::default() };
    let golden = Golden::read("llama-64");
    let (prompt, expected) = (golden.ids("greedy_prompt"), golden.ids("greedy_ids"));
    // A token of the continuation, at the place where it comes up first.
    let at = (1..32).find(|&i| !expected[..i].contains(&expected[i])).expect("a new token");
    let dir = tempfile::tempdir().expect("directory");
    for entry in fs::read_dir(fixture("llama-64")).expect("fixture") {
        let path = entry.expect("entry").path();
        fs::copy(&path, dir.path().join(path.file_name().expect("name"))).expect("copy");
    }
    let ends = [0, expected[at]].map(|id| if id == 0 { 300 } else { id });
    let generation = serde_json::json!({ "eos_token_id": ends }).to_string();
    fs::write(dir.path().join("generation_config.json"), generation).expect("write");
    let model = Model::open(dir.path(), &options).expect("opened");

    let mut session = session(&model);
    let ending = GenerateOptions { ignore_eos: false, ..greedy(32) };
    let mut generation = session.generate(prompt, &ending).expect("prompt");
    let pieces: Vec<_> = generation.by_ref().map(|piece| piece.expect("piece")).collect();
    let found: Vec<u32> = pieces.iter().filter_map(|piece| piece.token).collect();
    assert_eq!(found, expected[..=at]);
    assert_eq!(generation.finish_reason(), Some(&FinishReason::EndOfSequence(expected[at])));
    assert_eq!(generation.timings().new_tokens, found.len());
    assert_eq!(session.tokens(), [prompt, &expected[..=at]].concat());

    session.truncate(prompt.len());
    assert_eq!(ids(&mut session, &[], &greedy(32)), expected, "ignore_eos goes on");
}

/// On a machine with a hardware GPU `auto` takes it; on one without, the CPU, and says why.
#[test]
fn auto_takes_a_hardware_gpu_or_else_the_cpu() {
    use deltallm::backend::DeviceKind;
    use deltallm::gpu::{Gpu, GpuOptions};
    let adapters = deltallm::gpu::adapters();
    let hardware = adapters.iter().any(|adapter| adapter.kind != DeviceKind::SoftwareGpu);
    let model = open("bitnet-32", &ModelOptions::default());
    assert_eq!(model.device().kind == DeviceKind::Cpu, !hardware);
    assert_eq!(model.fallback().is_some(), !hardware);
    if !hardware {
        let error = Gpu::open(&GpuOptions::default()).expect_err("only a software adapter");
        assert!(matches!(error, Error::NoAdapter { .. }), "{error}");
        let gpu = ModelOptions { device: deltallm::DeviceChoice::Gpu, ..Default::default() };
        let error = Model::open(fixture("bitnet-32"), &gpu).expect_err("no hardware GPU");
        assert!(error.to_string().contains(&adapters[0].name), "{error}");
    }
}

/// A context that no memory holds is an error, not the end of the process.
#[test]
fn a_context_beyond_all_memory_is_an_error() {
    let dir = tempfile::tempdir().expect("directory");
    let mut vast = deltallm::checkpoint::synthetic::Synthetic::named("tiny").expect("known");
    vast.config.context = 1 << 31;
    vast.write(dir.path()).expect("written");
    for (device, options) in devices() {
        let model = Model::open(dir.path(), &options).expect("opened");
        let all = SessionOptions {
            context: Some(1 << 31),
            attention: AttentionPolicy::plain(CacheFormat::F32),
        };
        let error = Session::new(&model, &all).expect_err("too long");
        let expected = matches!(error, Error::DeviceMemory { .. } | Error::DeviceLimit { .. });
        assert!(expected, "{device}: {error}");
    }
}

#[test]
fn what_cannot_be_run_is_refused_and_changes_nothing() {
    for (_, options) in devices() {
        let model = open("bitnet-32", &options);
        let limit = model.config().context;
        let vocabulary = model.config().vocabulary as u32;
        for context in [0, limit + 1] {
            let options = SessionOptions {
                context: Some(context),
                attention: AttentionPolicy::plain(CacheFormat::F16),
            };
            assert!(matches!(Session::new(&model, &options), Err(Error::Parameter { .. })));
        }
        let small = SessionOptions {
            context: Some(8),
            attention: AttentionPolicy::plain(CacheFormat::F16),
        };
        let mut session = Session::new(&model, &small).expect("session");
        session.evaluate(&[1, 2, 3]).expect("prompt");
        let error = session.evaluate(&[1; 6]).expect_err("too long");
        assert!(matches!(error, Error::ContextFull { needed: 9, limit: 8, .. }), "{error}");
        let error = session.evaluate(&[vocabulary]).expect_err("no such token");
        assert!(matches!(error, Error::TokenOutOfRange { .. }), "{error}");
        let bad = Sampling { top_p: 2.0, ..Sampling::default() };
        let bad = GenerateOptions { sampling: bad, ..greedy(1) };
        assert!(matches!(session.generate(&[1], &bad), Err(Error::Parameter { .. })));
        assert_eq!(session.tokens(), [1, 2, 3]);
        session.evaluate(&[4; 5]).expect("the context to its last token");
    }
}
