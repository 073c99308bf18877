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

const F32: SessionOptions = SessionOptions {
    context: Some(512),
    attention: AttentionPolicy::plain(CacheFormat::F32),
    thresholds: None,
};

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

/// A device may be a step ahead of the text; nobody must see it.
#[test]
fn a_generation_that_is_left_early_leaves_nothing_behind() {
    for (device, options) in devices() {
        let (model, golden) = (open("llama-64", &options), Golden::read("llama-64"));
        let prompt = golden.ids("ids_65");
        for policy in ["dense", "delta page=16 window=16 sink=4"] {
            let case = format!("{policy} on {device}");
            // 79 tokens of text: the step ahead is the one that completes a page.
            for taken in [1, 14, 15] {
                let mut left = compressed(&model, policy);
                let mut asked = compressed(&model, policy);
                let pieces = left.generate(prompt, &greedy(40)).expect("prompt");
                assert_eq!(pieces.take(taken).filter(Result::is_ok).count(), taken, "{case}");
                ids(&mut asked, prompt, &greedy(taken));
                assert_eq!(left.tokens(), asked.tokens(), "{case}");
                let counted = |session: &mut Session| {
                    let counted = session.statistics().expect("statistics");
                    format!("{counted:?}")
                };
                assert_eq!(counted(&mut left), counted(&mut asked), "{case}, {taken} taken");
                let on = |session: &mut Session| {
                    let more = ids(session, &[], &greedy(5));
                    let more = [more, ids(session, &[7, 8, 9], &greedy(5))].concat();
                    (more, session.evaluate(&[3]).expect("step"))
                };
                let file = tempfile::NamedTempFile::new().expect("a file");
                left.save(file.path()).expect("saved");
                let mut loaded = Session::load(&model, file.path()).expect("loaded");
                let ((found, logits), (expected, wanted)) = (on(&mut left), on(&mut asked));
                assert_eq!(on(&mut loaded).0, expected, "{case}, {taken} taken, saved");
                assert_eq!(found, expected, "{case}, {taken} taken");
                assert_same(&logits, &wanted, &case);
            }
        }
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
            thresholds: None,
        };
        let mut small = Session::new(&model, &small).expect("session");
        let (_, finish) = run(&mut small, &greedy(32));
        assert_eq!(finish, FinishReason::ContextFull);
        assert_eq!(small.tokens(), [prompt, &whole[..room + 1]].concat());
        let mut generation = small.generate(&[], &greedy(1)).expect("nothing to run");
        assert!(generation.next().is_none());
        assert_eq!(generation.finish_reason(), Some(&FinishReason::ContextFull));
        let error = small.generate(&[1], &greedy(1)).expect_err("full");
        assert!(matches!(error, Error::ContextFull { .. }), "{error}");
        assert_eq!(small.tokens(), [prompt, &whole[..room + 1]].concat());
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
            thresholds: None,
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
                thresholds: None,
            };
            assert!(matches!(Session::new(&model, &options), Err(Error::Parameter { .. })));
        }
        let small = SessionOptions {
            context: Some(8),
            attention: AttentionPolicy::plain(CacheFormat::F16),
            thresholds: None,
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

/// Policies whose caches differ in every part, with pages and windows that short texts fill.
const POLICIES: [&str; 6] = [
    "dense",
    "exact=f32 values=int8",
    "delta page=16 window=16 sink=2",
    "paper theta=0.3 page=16 window=1 exact=f32",
    "delta reference=anchored deltas=int4 theta=1sigma values=int4 page=32 window=20",
    "keys=channel4 values=int8 page=16 window=40 sink=0",
];

fn compressed(model: &Model, policy: &str) -> Session {
    let attention = policy.parse().expect(policy);
    let options = SessionOptions { context: Some(400), attention, thresholds: None };
    Session::new(model, &options).expect(policy)
}

#[test]
fn a_saved_session_continues_on_any_device() {
    let golden = Golden::read("llama-64");
    let prompt = &golden.ids("ids_300")[..90];
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("session");
    let models: Vec<_> = devices()
        .into_iter()
        .map(|(device, options)| (device, open("llama-64", &options)))
        .collect();
    for policy in POLICIES {
        for (index, (from, model)) in models.iter().enumerate() {
            let mut session = compressed(model, policy);
            ids(&mut session, prompt, &greedy(5));
            session.save(&file).expect("saved");
            let (before, policy_before) = (session.tokens().to_vec(), *session.policy());
            let statistics = session.statistics().expect("statistics");
            let expected = ids(&mut session, &[], &greedy(12));
            // On the same device, and on the next: every one is come from and gone to.
            for (to, model) in [&models[index], &models[(index + 1) % models.len()]] {
                let case = format!("{policy}: from {from} to {to}");
                let mut loaded = Session::load(model, &file).expect(&case);
                assert_eq!(loaded.tokens(), before, "{case}");
                assert_eq!((*loaded.policy(), loaded.context()), (policy_before, 400), "{case}");
                assert_eq!(loaded.statistics().expect("statistics"), statistics, "{case}");
                assert_eq!(ids(&mut loaded, &[], &greedy(12)), expected, "{case}");
            }
        }
    }
}

/// Saved anew, a session that was loaded is the same; one that was cut back has lost no text.
#[test]
fn a_session_survives_being_saved_at_any_point() {
    let options = ModelOptions { device: deltallm::DeviceChoice::Cpu, ..Default::default() };
    let (model, golden) = (open("llama-80", &options), Golden::read("llama-80"));
    let text = golden.ids("ids_300");
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("session");
    for policy in POLICIES {
        let mut empty = compressed(&model, policy);
        empty.save(&file).expect("saved");
        let mut session = Session::load(&model, &file).expect("loaded");
        let expected = empty.evaluate(text).expect("prompt");
        assert_eq!(session.evaluate(text).expect("prompt"), expected, "{policy}");
        // Within what is kept of original keys, and far before it.
        for length in [299, 280, 30, 1] {
            session.truncate(length);
            session.save(&file).expect("saved");
            let mut loaded = Session::load(&model, &file).expect("loaded");
            assert_eq!(loaded.tokens(), &text[..length], "{policy}");
            let next = &text[length..(length + 7).min(300)];
            let found = loaded.evaluate(next).expect("step");
            assert_eq!(found, session.evaluate(next).expect("step"), "{policy}: {length}");
            session = loaded;
            session.truncate(length);
        }
    }
}

/// Decoding looks further back than a prompt's window may: keys that were overwritten by what was
/// cut off must not be taken for those of the text.
#[test]
fn a_text_cut_far_back_goes_on_as_if_nothing_had_followed() {
    for (device, options) in devices() {
        let (model, golden) = (open("llama-64", &options), Golden::read("llama-64"));
        let text = golden.ids("ids_300").repeat(2);
        for policy in [
            "delta page=16 window=64 alpha=0 sink=0 theta=1sigma",
            "paper page=16 window=80 alpha=0",
            "keys=channel2 page=16 window=100 alpha=0",
        ] {
            let mut cut = compressed(&model, policy);
            cut.evaluate(&text[..390]).expect("prompt");
            cut.truncate(65);
            let mut fresh = compressed(&model, policy);
            let (first, rest) = ([5, 6], [7, 8, 9]);
            let found = cut.evaluate(&first).expect("prompt");
            let expected = fresh.evaluate(&[&text[..65], &first].concat()).expect("prompt");
            assert_same(&found, &expected, &format!("{policy} on {device}: prompt"));
            for token in rest {
                let found = cut.evaluate(&[token]).expect("step");
                let expected = fresh.evaluate(&[token]).expect("step");
                assert_same(&found, &expected, &format!("{policy} on {device}: decoding"));
            }
        }
    }
}

/// The same keys in the same pages: what is left is the order of sums.
#[track_caller]
fn assert_same(found: &[f32], expected: &[f32], case: &str) {
    let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 1e-3, "{case}: {apart} apart");
}

/// A call that fails leaves what was a prompt a prompt, and what was decoded decoded.
#[test]
fn a_cancelled_prompt_changes_nothing() {
    for (device, options) in devices() {
        let (model, golden) = (open("llama-64", &options), Golden::read("llama-64"));
        let text = golden.ids("ids_300");
        let policy = "delta page=16 window=16 alpha=0.5 theta=1sigma";
        let [mut disturbed, mut quiet] = [0, 1].map(|_| {
            let mut session = compressed(&model, policy);
            session.evaluate(&text[..50]).expect("prompt");
            for token in &text[50..90] {
                session.evaluate(&[*token]).expect("step");
            }
            session
        });
        disturbed.cancel_handle().cancel();
        assert!(matches!(disturbed.evaluate(text), Err(Error::Cancelled)), "{device}");
        disturbed.cancel_handle().reset();
        assert_eq!(disturbed.tokens(), quiet.tokens(), "{device}");
        for token in &text[90..100] {
            let found = disturbed.evaluate(&[*token]).expect("step");
            let expected = quiet.evaluate(&[*token]).expect("step");
            assert_same(&found, &expected, &format!("on {device}"));
        }
    }
}

#[test]
fn damaged_sessions_are_errors() {
    let options = ModelOptions { device: deltallm::DeviceChoice::Cpu, ..Default::default() };
    let (model, golden) = (open("llama-32", &options), Golden::read("llama-32"));
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("session");
    let mut session = compressed(&model, "delta page=16 window=16 sink=2 values=int4");
    session.evaluate(&golden.ids("ids_300")[..100]).expect("prompt");
    session.save(&file).expect("saved");
    let whole = fs::read(&file).expect("written");
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().expect("eight bytes")) as usize;
    let refuse = |bytes: &[u8], what: String| {
        fs::write(&file, bytes).expect("write");
        let error = Session::load(&model, &file).expect_err(&what).to_string();
        assert!(error.contains(file.to_str().expect("UTF-8")), "{what}: {error}");
    };
    let everywhere = || (0..header).chain((header..whole.len()).step_by(307));
    for length in everywhere().step_by(3) {
        refuse(&whole[..length], format!("{length} of {} bytes", whole.len()));
    }
    for at in everywhere() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        refuse(&damaged, format!("bit {} of byte {at}", at % 8));
    }
    refuse(&[&whole[..], &[0]].concat(), "a byte more".into());

    fs::write(&file, &whole).expect("write");
    assert_eq!(Session::load(&model, &file).expect("whole").tokens(), session.tokens());
    let other = Session::load(&open("llama-64", &options), &file).expect_err("another model");
    assert!(matches!(&other, Error::Config { field, .. } if field == "model"), "{other}");
    for path in [dir.path(), &dir.path().join("absent")] {
        let error = Session::load(&model, path).expect_err("no file").to_string();
        assert!(error.contains(path.to_str().expect("UTF-8")), "{error}");
    }
    let error = session.save(dir.path()).expect_err("a directory");
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    assert_eq!(fs::read_dir(dir.path()).expect("directory").count(), 1, "nothing is left over");
}

#[test]
fn statistics_count_what_the_policy_says() {
    for (device, options) in devices() {
        let (model, golden) = (open("llama-80", &options), Golden::read("llama-80"));
        let prompt = &golden.ids("ids_300")[..150];
        let count = |policy: &str| {
            let mut session = compressed(&model, policy);
            session.evaluate(prompt).expect("prompt");
            (session.statistics().expect("statistics"), session.memory())
        };
        let config = model.config();
        let (heads, head_dim) = (config.attention.kv_heads, config.attention.head_dim);
        let dense_bytes = (150 * config.layers * 2 * heads * head_dim * 2) as u64;

        let (dense, memory) = count("dense");
        assert_eq!(dense.total().pages, 0, "{device}");
        assert_eq!((dense.length, dense.dense_bytes), (150, dense_bytes), "{device}");
        assert!(memory.keys + memory.values >= dense_bytes, "{device}: {memory:?}");

        let (found, _) = count("keys=channel4 page=16");
        assert_eq!(found.total().pages as usize, config.layers * heads * (150 / 16), "{device}");
        assert_eq!(found.total().bits_per_element(), Some(4.0 + 32.0 / 16.0), "{device}");

        // Every difference from the first key of a page on is kept, or next to none.
        let (all, _) = count("delta theta=0 deltas=f16 page=16");
        let (none, _) = count("delta theta=10000 deltas=f16 page=16");
        let zeros =
            |found: &deltallm::delta::CacheStatistics| found.total().zero_share().expect("deltas");
        assert!(zeros(&all) < 0.05 && zeros(&none) == 1.0, "{device}: {}", zeros(&all));
        let header = 16.0 / 16.0 + 1.0 + 0.2 + 96.0 / (16.0 * head_dim as f64);
        let bits = none.total().bits_per_element().expect("elements");
        assert!((1.0..=header + 0.3).contains(&bits), "{device}: {bits}");
        assert_eq!(none.total().theta.map(|theta| theta.min), Some(10000.0), "{device}");
    }
}

#[test]
fn a_probe_gives_what_attention_sees() {
    let golden = Golden::read("llama-64");
    let prompt = golden.ids("ids_300");
    let mut first = None;
    for (device, options) in devices() {
        let model = open("llama-64", &options);
        let mut seen = Vec::new();
        let cancel = deltallm::Cancel::default();
        let traces = model.probe(prompt, &cancel, |n| seen.push(n)).expect("probe");
        let config = model.config();
        assert_eq!((traces.len(), seen.last()), (config.layers, Some(&300)), "{device}");
        for trace in &traces {
            assert_eq!(trace.tokens(), 300, "{device}");
            assert_eq!(trace.queries.len(), 300 * config.attention.width(), "{device}");
            assert_eq!(trace.values.len(), 300 * config.attention.kv_width(), "{device}");
        }
        let expected = first.get_or_insert_with(|| traces.clone());
        for (found, expected) in traces.iter().zip(expected.iter()) {
            let parts = [
                (&found.queries, &expected.queries),
                (&found.keys, &expected.keys),
                (&found.values, &expected.values),
            ];
            for (found, expected) in parts {
                let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
                assert!(apart.fold(0.0, f32::max) < 1e-3, "{device}");
            }
        }

        // What a session compresses is what the analysis on the host does.
        let policy = "delta page=16 exact=f32".parse().expect("a policy");
        let mut session = compressed(&model, "delta page=16 exact=f32");
        session.evaluate(prompt).expect("prompt");
        let counted = session.statistics().expect("statistics");
        // Later layers see the approximation itself, the first does not.
        let analysed = traces[0].analyse(&policy).expect("analysed");
        for (head, analysed) in analysed.iter().enumerate() {
            let (a, b) = (analysed.statistics, counted.heads[0][head]);
            assert_eq!(a.elements, b.elements, "{device}");
            let apart = a.zeros.abs_diff(b.zeros);
            assert!(apart <= a.elements / 1000, "{device}: {apart} of {}", a.elements);
        }
        cancel.cancel();
        assert!(matches!(model.probe(prompt, &cancel, |_| ()), Err(Error::Cancelled)));
        let cancel = deltallm::Cancel::default();
        assert!(matches!(model.probe(&[], &cancel, |_| ()), Err(Error::EmptyPrompt)));
        let error = model.probe(&[9999], &cancel, |_| ()).expect_err("no such token");
        assert!(matches!(error, Error::TokenOutOfRange { .. }), "{error}");
    }
}
