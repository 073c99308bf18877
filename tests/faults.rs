//! Devices that fail: each fault is forced, and is survived or named; the text after it is the text
//! without it.

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use common::{Golden, fixture, test_adapter};
use deltallm::checkpoint::Checkpoint;
use deltallm::gpu::{Fault, Faults, GpuOptions};
use deltallm::sampler::Draws;
use deltallm::{
    Cancel, DeviceChoice, Error, FinishReason, GenerateOptions, LogitsOptions, LogitsRun, Model,
    ModelOptions, Result, Sampling, Session, SessionOptions,
};
use safetensors::SafeTensors;

const POLICIES: [&str; 3] = ["dense", "delta page=16 window=16 sink=4", "paper page=16"];

/// All that a submission can do to its device.
const LOSSES: [Fault; 3] = [Fault::Lost, Fault::LostUnnoticed, Fault::Hangs];

fn options(gpu: GpuOptions) -> ModelOptions {
    ModelOptions { device: DeviceChoice::Named(test_adapter()), gpu, ..ModelOptions::default() }
}

fn open_at(dir: &Path, faults: &Faults) -> Model {
    let gpu = GpuOptions { faults: faults.clone(), self_test: false, ..GpuOptions::default() };
    Model::open(dir, &options(gpu)).expect("opened")
}

/// A fixture on a device that can be given faults.
fn model(name: &str) -> (Model, Faults) {
    let faults = Faults::possible();
    (open_at(&fixture(name), &faults), faults)
}

fn session(model: &Model, policy: &str) -> Session {
    let attention = policy.parse().expect("a policy");
    let options = SessionOptions { context: Some(800), attention, thresholds: None };
    Session::new(model, &options).expect("a session")
}

/// Seeded sampling in which every token of the text has its say.
fn sampled(max_tokens: usize) -> GenerateOptions {
    let sampling = Sampling {
        temperature: 1.1,
        top_k: 30,
        repetition_penalty: 1.3,
        seed: 7,
        ..Sampling::default()
    };
    GenerateOptions { sampling, max_tokens, ignore_eos: true, ..GenerateOptions::default() }
}

fn greedy(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { sampling: Sampling::default(), ..sampled(max_tokens) }
}

/// From all logits, on the host.
fn by_the_host(max_tokens: usize) -> GenerateOptions {
    let sampling = Sampling { top_k: 0, ..sampled(0).sampling };
    GenerateOptions { sampling, ..sampled(max_tokens) }
}

fn generate(session: &mut Session, prompt: &[u32], options: &GenerateOptions) -> Result<Vec<u32>> {
    let pieces = session.generate(prompt, options)?;
    pieces.filter_map(|piece| piece.map(|piece| piece.token).transpose()).collect()
}

/// What `run` gives, and the submissions that it takes.
fn undisturbed<T>(faults: &Faults, run: impl FnOnce() -> T) -> (T, u64) {
    let before = faults.submissions();
    let found = run();
    (found, faults.submissions() - before)
}

/// Some of `0..count`, the first and the last among them.
fn some_of(count: u64, most: u64) -> impl Iterator<Item = u64> {
    let most = most.min(count).max(2);
    (0..most).map(move |i| i * (count - 1) / (most - 1))
}

/// The loss of a device at submissions from the first chunk of a prompt of two to the last token,
/// with and without a step in flight that runs ahead.
#[test]
fn a_text_goes_on_as_if_its_device_had_not_been_lost() {
    let mut turn = 0;
    for name in ["llama-32", "bitnet-64"] {
        let (model, faults) = model(name);
        let prompt = Golden::read(name).ids("ids_300").to_vec();
        for policy in POLICIES {
            for options in [greedy(16), sampled(16), by_the_host(16)] {
                let run = || generate(&mut session(&model, policy), &prompt, &options);
                let (expected, submissions) = undisturbed(&faults, || run().expect("text"));
                assert_eq!(expected.len(), 16);
                for at in some_of(submissions, 3) {
                    let fault = LOSSES[turn % LOSSES.len()];
                    turn += 1;
                    let openings = faults.openings();
                    faults.inject(fault, at, 1);
                    let found = run().expect("text");
                    let case = format!("{name}, {policy}, {fault:?} at {at} of {submissions}");
                    assert_eq!(found, expected, "{case}");
                    assert_eq!(faults.openings(), openings + 1, "{case}");
                }
            }
        }
    }
}

/// Each step of decoding, one of which runs ahead of the text, and each kind of loss.
#[test]
fn a_step_in_flight_is_not_drawn_twice() {
    let (model, faults) = model("llama-32");
    let prompt = Golden::read("llama-32").ids("ids_65").to_vec();
    let run = || generate(&mut session(&model, POLICIES[1]), &prompt, &sampled(6));
    let (expected, submissions) = undisturbed(&faults, || run().expect("text"));
    for fault in LOSSES {
        for at in 0..submissions {
            faults.inject(fault, at, 1);
            assert_eq!(run().expect("text"), expected, "{fault:?} at {at} of {submissions}");
            faults.clear();
        }
    }
}

/// What is in a session's file; its metadata are written in any order.
fn contents(path: &Path) -> (BTreeMap<String, String>, BTreeMap<String, Vec<u8>>) {
    let bytes = std::fs::read(path).expect("a file");
    let (_, metadata) = SafeTensors::read_metadata(&bytes).expect("metadata");
    let file = SafeTensors::deserialize(&bytes).expect("tensors");
    let fields = metadata.metadata().clone().expect("fields").into_iter().collect();
    (fields, file.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())).collect())
}

/// What was asked for in several turns, cut back, continued and loaded, to the bit of its cache.
#[test]
fn the_cache_is_made_again_to_the_bit() {
    let (model, faults) = model("llama-32");
    let ids = Golden::read("llama-32").ids("ids_300").to_vec();
    let directory = tempfile::tempdir().expect("a directory");
    let turns = |session: &mut Session| {
        generate(session, &ids[..290], &sampled(20)).expect("the first turn");
        generate(session, &ids[..100], &sampled(12)).expect("the second turn");
        // Into the chunk of a prompt, and on from there.
        session.truncate(380);
        generate(session, &[], &greedy(9)).expect("the third turn");
        session.evaluate(&ids[3..4]).expect("a token");
        session.evaluate(&ids[10..20]).expect("tokens");
    };
    for policy in POLICIES {
        let bytes = |lose: bool| {
            let (one, two) = (directory.path().join("one"), directory.path().join("two"));
            let mut first = session(&model, policy);
            turns(&mut first);
            if lose {
                faults.inject(Fault::Lost, 0, 1);
            }
            first.save(&one).expect("saved");
            let mut second = Session::load(&model, &one).expect("loaded");
            generate(&mut second, &ids[..5], &sampled(12)).expect("a turn");
            if lose {
                faults.inject(Fault::LostUnnoticed, 0, 1);
            }
            second.save(&two).expect("saved");
            [contents(&one), contents(&two)]
        };
        let expected = bytes(false);
        let openings = faults.openings();
        let found = bytes(true);
        assert_eq!(faults.openings(), openings + 2, "{policy}");
        assert!(found[0] == expected[0], "{policy}: a session over several turns");
        assert!(found[1] == expected[1], "{policy}: a session that was loaded");
    }
}

/// Whatever was done with a text: two sessions are asked for the same, one of which loses its device
/// now and then.
#[test]
fn no_history_is_too_odd_to_be_made_again() {
    let ((calm, _), (shaken, faults)) = (model("llama-32"), model("llama-32"));
    let ids = Golden::read("llama-32").ids("ids_300").to_vec();
    let openings = faults.openings();
    for seed in 0..6 {
        let mut draws = Draws::new(seed);
        let mut below = |most: usize| (draws.draw() * most as f32) as usize;
        let policy = POLICIES[seed as usize % POLICIES.len()];
        let mut sessions = [session(&calm, policy), session(&shaken, policy)];
        for turn in 0..12 {
            if below(3) == 0 {
                faults.inject(LOSSES[below(3)], below(12) as u64, 1);
            }
            let (kind, from, count) = (below(6), below(100), 1 + below(120));
            let tokens = &ids[from..from + count];
            let length = sessions[0].tokens().len();
            let cut = below(length + 1);
            if kind == 3 || length + count > 600 {
                sessions.iter_mut().for_each(|session| session.truncate(cut));
                continue;
            }
            let [expected, found] = sessions.each_mut().map(|session| match kind {
                0 => session.evaluate(&tokens[..1]).map(|logits| format!("{logits:?}")),
                1 | 4 if length > 0 => {
                    let made = generate(session, &[], &sampled(1 + count / 8));
                    made.map(|ids| format!("{ids:?}"))
                }
                2 => {
                    // A step that ran ahead is left behind.
                    let pieces = session.generate(tokens, &sampled(30)).expect("prompt");
                    let made: Vec<_> = pieces.take(4).map(|p| p.expect("piece")).collect();
                    Ok(format!("{made:?}"))
                }
                _ => session.evaluate(tokens).map(|logits| format!("{logits:?}")),
            });
            let case = format!("{policy}, seed {seed}, turn {turn}, kind {kind}");
            assert!(found.expect("a result") == expected.expect("a result"), "{case}");
        }
        faults.clear();
    }
    assert!(faults.openings() > openings + 10, "{} losses", faults.openings() - openings);
}

/// Every other way to run a text.
#[test]
fn logits_probes_and_statistics_survive_as_well() {
    let (model, faults) = model("bitnet-64");
    let ids = Golden::read("bitnet-64").ids("ids_300").to_vec();
    let never = Cancel::default();
    let attention = POLICIES[1].parse().expect("a policy");
    let rows = || {
        let options =
            LogitsOptions { attention, prompt: Some(280), from: 150, ..LogitsOptions::default() };
        let mut run = LogitsRun::new(&model, &ids[..], &options, &never).expect("a run");
        let mut all = Vec::new();
        while let Some(rows) = run.next_rows().expect("rows") {
            all.extend(rows);
        }
        (all, format!("{:?}", run.statistics().expect("statistics")))
    };
    let probe = || {
        let traces = model.probe(&ids, &never, |_| {}).expect("traces");
        traces.into_iter().map(|t| (t.queries, t.keys, t.values)).collect::<Vec<_>>()
    };
    let evaluate = || {
        let mut session = session(&model, POLICIES[2]);
        let first = session.evaluate(&ids[..290]).expect("logits");
        [first, session.evaluate(&ids[290..291]).expect("logits")]
    };
    let (expected_rows, submissions) = undisturbed(&faults, rows);
    for at in some_of(submissions, 4) {
        faults.inject(Fault::LostUnnoticed, at, 1);
        assert!(rows() == expected_rows, "logits, lost at {at} of {submissions}");
    }

    // A run that has failed goes on where it was.
    let options = LogitsOptions { attention, prompt: Some(100), ..LogitsOptions::default() };
    let run = || LogitsRun::new(&model, &ids[..102], &options, &never).expect("a run");
    let mut undisturbed_run = run();
    let mut run = run();
    while let Some(expected) = undisturbed_run.next_rows().expect("rows") {
        faults.inject(Fault::LostUnnoticed, 0, 1);
        faults.inject(Fault::Gone, 0, 3);
        let error = run.next_rows().expect_err("no device");
        assert!(matches!(error, Error::DeviceNotRestored { .. }), "{error}");
        assert_eq!(run.next_rows().expect("rows").as_ref(), Some(&expected));
    }

    let (expected_traces, submissions) = undisturbed(&faults, probe);
    for at in some_of(submissions, 4) {
        faults.inject(Fault::Lost, at, 1);
        assert!(probe() == expected_traces, "probe, lost at {at} of {submissions}");
    }
    let (expected_logits, submissions) = undisturbed(&faults, evaluate);
    for at in some_of(submissions, 3) {
        faults.inject(Fault::Hangs, at, 1);
        assert!(evaluate() == expected_logits, "evaluate, lost at {at} of {submissions}");
    }
}

/// The first session that finds the device lost opens it again; the other one follows.
#[test]
fn sessions_that_share_a_model_share_its_next_device() {
    let (model, faults) = model("llama-32");
    let prompt = Golden::read("llama-32").ids("ids_65").to_vec();
    let (one, other) = (sampled(16), greedy(16));
    let texts = || {
        let (mut dense, mut delta) = (session(&model, POLICIES[0]), session(&model, POLICIES[1]));
        let mut dense = dense.generate(&prompt, &one).expect("prompt");
        let mut delta = delta.generate(&prompt[..40], &other).expect("prompt");
        let mut texts = (Vec::new(), Vec::new());
        loop {
            let next = (dense.next(), delta.next());
            let (Some(one), Some(other)) = next else { break };
            texts.0.push(one.expect("piece"));
            texts.1.push(other.expect("piece"));
        }
        texts
    };
    let (expected, submissions) = undisturbed(&faults, texts);
    for at in some_of(submissions, 5) {
        let openings = faults.openings();
        faults.inject(Fault::LostUnnoticed, at, 1);
        assert_eq!(texts(), expected, "lost at {at} of {submissions}");
        assert_eq!(faults.openings(), openings + 1, "lost at {at} of {submissions}");
    }

    // On threads of their own: either may hear of the loss while the other one suffers from it.
    let run = |policy, options| generate(&mut session(&model, policy), &prompt, options);
    let expected = (run(POLICIES[0], &one).expect("text"), run(POLICIES[1], &one).expect("text"));
    for at in 0..24 {
        faults.inject(Fault::LostUnnoticed, at, 1);
        let found = std::thread::scope(|scope| {
            let dense = scope.spawn(|| run(POLICIES[0], &one).expect("text"));
            let delta = scope.spawn(|| run(POLICIES[1], &one).expect("text"));
            (dense.join().expect("a text"), delta.join().expect("a text"))
        });
        assert_eq!(found, expected, "lost at {at}");
    }
}

/// Nothing of the old device is left when the text goes on on the new one.
#[test]
fn a_lost_device_leaves_no_memory_behind() {
    let (model, faults) = model("llama-32");
    let prompt = Golden::read("llama-32").ids("ids_300").to_vec();
    let mut session = session(&model, POLICIES[1]);
    session.evaluate(&prompt).expect("logits");
    let held = faults.held();
    faults.inject(Fault::LostUnnoticed, 0, 1);
    session.evaluate(&prompt[..1]).expect("logits");
    assert_eq!(faults.held(), held);
    drop((session, model));
    assert_eq!(faults.held(), 0);
}

#[test]
fn a_device_that_is_lost_again_and_again_ends_in_an_error() {
    let (model, faults) = model("llama-32");
    let prompt = Golden::read("llama-32").ids("ids_300").to_vec();
    let expected = generate(&mut session(&model, "dense"), &prompt, &greedy(20)).expect("text");
    for fault in LOSSES {
        let mut session = session(&model, "dense");
        let mut pieces = session.generate(&prompt, &greedy(20)).expect("prompt");
        let begun: Vec<u32> =
            pieces.by_ref().take(5).filter_map(|piece| piece.expect("piece").token).collect();
        let openings = faults.openings();
        faults.inject(fault, 3, u64::MAX);
        let rest: Vec<_> = pieces.collect();
        let error = rest.into_iter().find_map(Result::err).expect("an error");
        let Error::DeviceNotRestored { lost, reason } = &error else { panic!("{error}") };
        assert!(lost.contains(&model.device().name), "{error}");
        assert!(matches!(**reason, Error::DeviceLost { .. } | Error::DeviceTimeout { .. }));
        assert!(faults.openings() - openings <= 6, "{} openings", faults.openings() - openings);

        // Once it is well again, the text goes on.
        faults.clear();
        let made = session.tokens().len() - prompt.len();
        assert_eq!(session.tokens()[prompt.len()..][..begun.len()], begun, "{fault:?}");
        let rest = generate(&mut session, &[], &greedy(20 - made)).expect("the rest");
        assert_eq!(session.tokens()[prompt.len()..], expected, "{fault:?}, {} new", rest.len());
    }
}

#[test]
fn a_device_that_does_not_come_back_is_an_error_with_both_reasons() {
    let (model, faults) = model("llama-32");
    let prompt = Golden::read("llama-32").ids("ids_65").to_vec();
    let mut session = session(&model, "dense");
    let before = session.evaluate(&prompt).expect("logits");
    faults.inject(Fault::Lost, 0, 1);
    faults.inject(Fault::Gone, 0, u64::MAX);
    let error = session.evaluate(&prompt[..1]).expect_err("no device");
    let Error::DeviceNotRestored { lost, reason } = &error else { panic!("{error}") };
    assert!(lost.contains("was lost"), "{error}");
    assert!(matches!(**reason, Error::NoAdapter { .. }), "{error}");
    assert_eq!(session.tokens(), prompt);
    faults.clear();
    session.truncate(prompt.len() - 1);
    let last = &prompt[prompt.len() - 1..];
    let found = session.evaluate(last).expect("logits");
    let mut fresh = self::session(&model, "dense");
    assert_eq!(fresh.evaluate(&prompt).expect("logits"), before);
    fresh.truncate(prompt.len() - 1);
    assert_eq!(found, fresh.evaluate(last).expect("logits"));
}

#[test]
fn weights_that_have_changed_are_not_loaded_again() {
    let copy = tempfile::tempdir().expect("a directory");
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("llama-32").join(file), copy.path().join(file)).expect("copied");
    }
    let faults = Faults::possible();
    let model = open_at(copy.path(), &faults);
    let mut session = session(&model, "dense");
    let expected = generate(&mut session, &[5, 6, 7], &greedy(8)).expect("text");

    // What is gone from its directory can still be read.
    let weights = copy.path().join("model.safetensors");
    let (kept, bytes) = (copy.path().join("kept"), std::fs::read(&weights).expect("weights"));
    std::fs::rename(&weights, &kept).expect("moved");
    faults.inject(Fault::Lost, 0, 1);
    session.clear();
    assert_eq!(generate(&mut session, &[5, 6, 7], &greedy(8)).expect("text"), expected);

    std::fs::write(&kept, &bytes[..bytes.len() - 4]).expect("written");
    faults.inject(Fault::Lost, 0, 1);
    session.clear();
    let error = generate(&mut session, &[5, 6, 7], &greedy(8)).expect_err("other weights");
    let Error::DeviceNotRestored { reason, .. } = &error else { panic!("{error}") };
    assert!(matches!(**reason, Error::Malformed { .. }), "{error}");
    assert!(error.to_string().contains("was changed"), "{error}");
}

/// A user need not wait until a long text is restored.
#[test]
fn restoring_can_be_cancelled() {
    let (model, faults) = model("llama-32");
    let prompt = Golden::read("llama-32").ids("ids_65").to_vec();
    let expected = generate(&mut session(&model, "dense"), &prompt, &greedy(12)).expect("text");
    let mut session = session(&model, "dense");
    let cancel = session.cancel_handle();
    let found = generate(&mut session, &prompt, &greedy(6)).expect("text");
    faults.inject(Fault::Lost, 0, 1);
    cancel.cancel();
    assert!(matches!(
        session.save(tempfile::NamedTempFile::new().expect("a file").path()),
        Err(Error::Cancelled)
    ));
    cancel.reset();
    let rest = generate(&mut session, &[], &greedy(6)).expect("text");
    assert_eq!([found, rest].concat(), expected);
}

#[test]
fn a_submission_that_is_refused_is_an_error_and_no_more() {
    let (model, faults) = model("llama-32");
    let prompt = Golden::read("llama-32").ids("ids_300").to_vec();
    for policy in &POLICIES[..2] {
        let run = |session: &mut Session| generate(session, &prompt, &sampled(16));
        let (expected, submissions) =
            undisturbed(&faults, || run(&mut session(&model, policy)).expect("text"));
        let (mut refused, openings) = (0, faults.openings());
        for at in some_of(submissions, 8) {
            let case = format!("{policy}, refused at {at} of {submissions}");
            let mut session = session(&model, policy);
            faults.inject(Fault::Invalid, at, 1);
            match run(&mut session) {
                // A step that ran ahead, which was made again.
                Ok(found) => assert_eq!(found, expected, "{case}"),
                Err(error) => {
                    assert!(matches!(error, Error::Device { .. }), "{case}: {error}");
                    refused += 1;
                }
            }
            session.clear();
            assert_eq!(run(&mut session).expect("text"), expected, "{case}");
        }
        assert!(refused > 0 && faults.openings() == openings);
    }
}

#[test]
fn without_memory_there_is_an_error_and_no_leak() {
    // For weights.
    let faults = Faults::possible();
    let dir = fixture("llama-32");
    let gpu = GpuOptions { faults: faults.clone(), self_test: false, ..GpuOptions::default() };
    let open = || {
        let checkpoint = Checkpoint::open(&dir).expect("a checkpoint");
        Model::open_checkpoint(checkpoint, &options(gpu.clone()), |_| ControlFlow::Continue(()))
    };
    let before = faults.allocations();
    drop(open().expect("opened"));
    for at in some_of(faults.allocations() - before, 4) {
        faults.inject(Fault::OutOfMemory, at, 1);
        let error = open().expect_err("no memory");
        assert!(matches!(error, Error::DeviceMemory { .. }), "{error}");
        assert_eq!(faults.held(), 0);
    }

    // For a session.
    let model = open().expect("opened");
    let held = faults.held();
    for policy in POLICIES {
        let before = faults.allocations();
        drop(session(&model, policy));
        for at in some_of(faults.allocations() - before, 5) {
            faults.inject(Fault::OutOfMemory, at, 1);
            let attention = policy.parse().expect("a policy");
            let options = SessionOptions { context: Some(800), attention, thresholds: None };
            let error = Session::new(&model, &options).expect_err("no memory");
            let Error::DeviceMemory { needed, held: told, .. } = error else { panic!("{error}") };
            assert!(needed > 0 && told >= held);
            assert_eq!(faults.held(), held, "{policy}, allocation {at}");
        }

        // For a cache that grows.
        let prompt = Golden::read("llama-32").ids("ids_300").to_vec();
        let before = faults.allocations();
        let expected = generate(&mut session(&model, policy), &prompt, &greedy(12));
        let expected = expected.expect("text");
        let after = faults.allocations();
        let made = faults.allocations();
        let mut again = session(&model, policy);
        let for_session = faults.allocations() - made;
        let growing = after - before - for_session;
        assert!(growing > 0);
        for at in some_of(growing, 4) {
            faults.inject(Fault::OutOfMemory, at, 1);
            let error = generate(&mut again, &prompt, &greedy(12)).expect_err("no memory");
            assert!(matches!(error, Error::DeviceMemory { .. }), "{policy}: {error}");
            let found = generate(&mut again, &prompt, &greedy(12)).expect("text");
            assert_eq!(found, expected, "{policy}, allocation {at}");
            drop(std::mem::replace(&mut again, session(&model, policy)));
        }
        drop(again);
        assert_eq!(faults.held(), held, "{policy}");
    }
}

/// The device goes away while the cache of the text is restored, and there is no memory after that.
#[test]
fn a_restored_device_without_memory_says_both() {
    let (model, faults) = model("llama-32");
    let prompt = Golden::read("llama-32").ids("ids_65").to_vec();
    let mut session = session(&model, POLICIES[1]);
    let expected = generate(&mut session, &prompt, &greedy(10)).expect("text");
    session.truncate(prompt.len());
    let (loading, allocations) = (faults.openings(), faults.allocations());
    faults.inject(Fault::Lost, 0, 1);
    faults.inject(Fault::OutOfMemory, 30, 1);
    let error = generate(&mut session, &[], &greedy(10)).expect_err("no memory");
    let Error::DeviceNotRestored { reason, .. } = &error else { panic!("{error}") };
    assert!(matches!(**reason, Error::DeviceMemory { .. }), "{error}");
    assert!(faults.allocations() > allocations && faults.openings() == loading + 1);
    assert_eq!(generate(&mut session, &[], &greedy(10)).expect("text"), expected);
}

/// The real thing: a wait that is over before the work is.
#[test]
fn a_wait_has_its_limit() {
    let gpu = GpuOptions {
        time_limit: std::time::Duration::ZERO,
        self_test: false,
        ..GpuOptions::default()
    };
    let error = Model::open(fixture("llama-32"), &options(gpu.clone()))
        .and_then(|model| {
            let mut session = Session::new(&model, &SessionOptions::default())?;
            session.evaluate(&[7; 256]).map(drop)
        })
        .expect_err("no time");
    let hangs = |error: &Error| matches!(error, Error::DeviceTimeout { seconds: 0.0, .. });
    match &error {
        Error::DeviceNotRestored { reason, .. } => {
            assert!(hangs(reason) || matches!(**reason, Error::DeviceLost { .. }), "{error}");
        }
        error => assert!(hangs(error), "{error}"),
    }
    assert!(error.to_string().contains("hangs"), "{error}");
}

#[test]
fn limits_that_are_too_small_are_named() {
    let limited =
        |bytes| GpuOptions { max_buffer: Some(bytes), self_test: false, ..GpuOptions::default() };
    let error = Model::open(fixture("llama-32"), &options(limited(256))).expect_err("no room");
    let Error::DeviceLimit { needed, limit, .. } = error else { panic!("{error}") };
    assert!(needed > limit && limit == 256);

    // Matrices are cut to fit; the parameters of a step are not.
    let model = Model::open(fixture("llama-32"), &options(limited(64 << 10))).expect("opened");
    let error = Session::new(&model, &SessionOptions::default()).expect_err("no room");
    assert!(matches!(error, Error::DeviceLimit { limit: 0x1_0000, .. }), "{error}");

    // Little room is room enough.
    let model = Model::open(fixture("llama-32"), &options(limited(1 << 20))).expect("opened");
    let golden = Golden::read("llama-32");
    let found = generate(&mut session(&model, "dense"), golden.ids("greedy_prompt"), &greedy(8));
    assert_eq!(found.expect("text"), golden.ids("greedy_ids")[..8]);
}

/// A generation that is cancelled has ended, and says why.
#[test]
fn a_generation_can_be_cancelled_while_it_is_restored() {
    let (model, faults) = model("llama-32");
    let prompt = Golden::read("llama-32").ids("ids_65").to_vec();
    let mut session = session(&model, "dense");
    let cancel = session.cancel_handle();
    let mut pieces = session.generate(&prompt, &greedy(9)).expect("prompt");
    pieces.next().expect("a piece").expect("a piece");
    faults.inject(Fault::Lost, 0, 1);
    cancel.cancel();
    assert!(pieces.by_ref().all(|piece| piece.is_ok()));
    assert_eq!(pieces.finish_reason(), Some(&FinishReason::Cancelled));
}
