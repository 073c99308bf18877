//! Known answers: a driver that miscompiles a kernel is noticed before it writes a word.

mod gpu_common;

use deltallm::backend::Backend;
use deltallm::gpu::{Findings, Gpu, GpuOptions, Sabotage, diagnose};
use deltallm::{DeviceChoice, Error, Model, ModelOptions, Session, SessionOptions};
use gpu_common::{any, by_matrix_unit, open};
use std::ops::ControlFlow;

/// Kernels that every model on a GPU runs, and one of its operation's name in errors.
const KERNELS: [(&str, &str); 9] = [
    ("embed", "embed"),
    ("norm", "norm"),
    ("linear_ternary", "linear_ternary"),
    ("linear_ternary_tiled", "linear_ternary"),
    ("linear_float", "linear_float"),
    ("gate", "gate"),
    ("sample_best", "sample"),
    ("sample_top", "sample"),
    ("sample_draw", "sample"),
];

/// The model inside, which is a BitNet, on whatever adapter there is.
fn model(gpu: GpuOptions) -> Result<Model, Error> {
    let name = open(any()).device().name.clone();
    let options =
        ModelOptions { device: DeviceChoice::Named(name), gpu, ..ModelOptions::default() };
    Model::embedded(&options)
}

fn broken(kernel: &str) -> GpuOptions {
    GpuOptions { sabotage: Sabotage(vec![kernel.to_owned()]), ..any() }
}

#[test]
fn a_broken_kernel_is_named_before_a_model_runs() {
    for (kernel, operation) in KERNELS {
        match model(broken(kernel)) {
            Err(Error::WrongResults { operation: found, case, .. }) => {
                assert_eq!(found, operation, "{kernel}: {case}");
            }
            other => panic!("{kernel}: {other:?}"),
        }
    }
}

#[test]
fn broken_attention_is_named_before_a_session_begins() {
    let delta = "delta".parse().expect("a policy");
    let int8 = "dense values=int8".parse().expect("a policy");
    for (kernel, attention, operation) in [
        ("rope_append", Default::default(), "rope_append"),
        ("attention", Default::default(), "attention"),
        ("attention_merge", Default::default(), "attention"),
        ("attention_tiled", Default::default(), "attention"),
        ("rope_append_values", int8, "rope_append"),
        ("encode_keys_delta", delta, "encode_keys"),
        ("attention_expand", delta, "attention"),
    ] {
        let model = model(broken(kernel)).expect("its weights need no attention");
        let options = SessionOptions { attention, ..SessionOptions::default() };
        match Session::new(&model, &options) {
            Err(Error::WrongResults { operation: found, case, .. }) => {
                assert_eq!(found, operation, "{kernel}: {case}");
            }
            other => panic!("{kernel}: {other:?}"),
        }
    }
}

/// What the model inside writes.
fn text(gpu: GpuOptions) -> Vec<u32> {
    let model = model(gpu).expect("it runs");
    let mut session = Session::new(&model, &SessionOptions::default()).expect("a session");
    let prompt = model.tokenizer().encode("Anna put the red ball").expect("tokens");
    let options =
        deltallm::GenerateOptions { max_tokens: 12, ..deltallm::GenerateOptions::default() };
    let pieces = session.generate(&prompt, &options).expect("a generation");
    pieces.filter_map(|piece| piece.expect("a piece").token).collect()
}

/// Where an ability is what the driver gets wrong, the kernel runs without it, and the text is that
/// of a device which never had it.
#[test]
fn a_plainer_kernel_takes_over() {
    let plain = text(GpuOptions { packed_dot: false, ..any() });
    for kernel in ["linear_ternary", "linear_ternary_tiled"] {
        assert_eq!(text(broken(&format!("{kernel}+packed_dot"))), plain, "{kernel}");
    }
    if open(any()).device().features.iter().any(|feature| feature == "subgroups") {
        let plain = text(GpuOptions { subgroups: false, ..any() });
        for kernel in ["norm", "gate", "linear_ternary", "linear_float"] {
            // Sums that are greatest terms: nearly right for some inputs.
            let found = text(broken(&format!("{kernel}+subgroups")));
            assert_eq!(found.len(), plain.len(), "{kernel}");
        }
    }
}

/// A matrix unit is asked what any other kernel is, and left out where it is wrong.
#[test]
#[ignore = "needs a GPU with a matrix unit"]
fn what_a_matrix_unit_gets_wrong_runs_without_it() {
    let options = by_matrix_unit();
    let wrong = |options: &GpuOptions| {
        let diagnosis =
            diagnose(options, &mut |_, _| ControlFlow::Continue(())).expect("a diagnosis");
        assert!(diagnosis.variants[0].matrix_unit.is_some(), "{:?}", diagnosis.variants);
        let answers = diagnosis.answers.iter();
        let wrong = answers.filter(|a| a.verdicts.iter().flatten().any(|v| !v.is_right()));
        // By the unit alone.
        wrong
            .inspect(|a| assert!(a.verdicts[1..].iter().flatten().all(|v| v.is_right()), "{a:?}"))
            .map(|a| a.question.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(wrong(&options), Vec::<String>::new());
    let plain = text(GpuOptions { matrix_unit: false, ..options.clone() });
    assert_eq!(text(options.clone()), plain);
    let broken = Sabotage(vec!["linear_ternary_tiled+matrix_unit".to_owned()]);
    let broken = GpuOptions { sabotage: broken, ..options };
    let found = wrong(&broken);
    let ternary = found.iter().all(|question| question.starts_with("linear_ternary: "));
    assert!(found.len() == 2 && ternary, "each packing is asked: {found:?}");
    assert_eq!(text(broken), plain, "it runs without");
}

#[test]
fn automatic_choice_leaves_a_gpu_that_is_wrong() {
    // A software adapter is never chosen by itself: there the CPU is the answer anyway.
    let gpu = GpuOptions { sabotage: Sabotage(vec!["norm".into()]), ..GpuOptions::default() };
    let options = ModelOptions { gpu, ..ModelOptions::default() };
    let model = Model::embedded(&options).expect("the CPU runs everything");
    assert_eq!(model.device().backend, "cpu");
    assert!(model.fallback().is_some());
}

#[test]
fn what_was_found_is_remembered() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("deltallm").join("self-tests.json");
    let options = GpuOptions { findings: Some(path.clone()), ..any() };
    let session = || {
        let model = model(options.clone()).expect("a model");
        Session::new(&model, &SessionOptions::default()).expect("a session");
    };
    session();
    let first = Findings::read(&path).expect("written");
    let text = std::fs::read_to_string(&path).expect("written");
    for operation in
        ["embed", "norm", "linear_ternary", "gate", "sample", "rope_append", "attention"]
    {
        assert!(text.contains(&format!("\"{operation}: ")), "{operation} in {text}");
    }
    session();
    assert_eq!(Findings::read(&path).expect("still there"), first);
    // What cannot be read is no reason not to run, and is replaced.
    std::fs::write(&path, "{").expect("written");
    session();
}

/// All of it, in every variant; with one kernel broken on purpose exactly its answers are wrong.
#[test]
fn the_doctor_sees_what_is_wrong() {
    let go_on = &mut |_, _| ControlFlow::Continue(());
    let healthy = diagnose(&any(), go_on).expect("a diagnosis");
    let wrong = |diagnosis: &deltallm::gpu::Diagnosis| -> Vec<String> {
        let wrong = |a: &&deltallm::gpu::Answer| a.verdicts.iter().flatten().any(|v| !v.is_right());
        diagnosis.answers.iter().filter(wrong).map(|a| a.question.clone()).collect()
    };
    assert_eq!(wrong(&healthy), Vec::<String>::new());
    assert!(healthy.is_healthy());
    let sick = diagnose(&broken("gate"), go_on).expect("a diagnosis");
    let wrong = wrong(&sick);
    assert!(!wrong.is_empty() && wrong.iter().all(|q| q.starts_with("gate: ")), "{wrong:?}");
    let asked: Vec<_> = sick.answers.iter().filter(|a| a.question.starts_with("gate: ")).collect();
    assert_eq!(asked.len(), wrong.len());
}

#[test]
fn a_gpu_without_self_test_is_asked_nothing() {
    let gpu = GpuOptions { self_test: false, ..broken("gate") };
    model(gpu).expect("nobody looked");
    // And the net is no part of a device that a caller drives by hand.
    let _: Gpu = open(broken("gate"));
}
