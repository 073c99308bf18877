//! The operation that a driver gets wrong, found by running a model on two devices at once.

mod gpu_common;

use std::ops::ControlFlow;

use deltallm::Tokenizer;
use deltallm::bisect::{BisectOptions, Bisection, bisect};
use deltallm::checkpoint::Checkpoint;
use deltallm::delta::AttentionPolicy;
use deltallm::gpu::{GpuOptions, Sabotage};
use deltallm::model::WeightFormat;
use gpu_common::any;

fn run(sabotage: &[&str], attention: AttentionPolicy) -> Bisection {
    let checkpoint = Checkpoint::embedded().expect("the model inside");
    let text =
        "Anna lives in Oslo. She has a grey cat named Milo. Tom put the red ball in the box. \
                It rained for an hour, and then the sky was clear again."
            .repeat(3);
    let prompt = Tokenizer::open(&checkpoint).expect("a tokenizer").encode(&text).expect("tokens");
    let sabotage = Sabotage(sabotage.iter().map(|&name| name.to_owned()).collect());
    let options = BisectOptions {
        gpu: GpuOptions { sabotage, ..any() },
        weights: WeightFormat::Stored,
        threads: None,
        attention,
        thresholds: None,
        decode: 4,
    };
    bisect(&checkpoint, &prompt, &options, |_| ControlFlow::Continue(())).expect("both run")
}

#[test]
fn a_healthy_gpu_differs_by_rounding() {
    for policy in [
        "dense",
        "dense exact=f32",
        "delta page=16 window=16",
        "paper page=16 window=16 values=int8",
    ] {
        let found = run(&[], policy.parse().expect("a policy"));
        assert_eq!(found.first(), None, "{policy}");
        // Embedding, 11 operations a layer (two of them of the cache), norm and head; of a prompt and
        // four tokens.
        assert_eq!(found.comparisons.len(), 5 * (1 + 11 * found.layers + 2), "{policy}");
    }
}

#[test]
fn the_first_wrong_operation_is_named() {
    for (kernel, operation) in [
        ("embed", "embed model.embed_tokens"),
        ("norm", "norm"),
        ("linear_ternary_tiled", "linear model.layers.0.self_attn.q_proj"),
        ("attention_tiled", "attention"),
        ("gate", "gate"),
        ("rope_append", "rope_append, queries"),
    ] {
        let found = run(&[kernel], AttentionPolicy::dense());
        let first = found.first().unwrap_or_else(|| panic!("{kernel} was not noticed"));
        assert!(first.operation.starts_with(operation), "{kernel}: {}", first.operation);
        assert_eq!((first.layer, first.position), (0, 0), "{kernel}");
        assert!(first.finite);
    }
    // One that runs for one token only: the prompt was right.
    let found = run(&["linear_ternary"], AttentionPolicy::dense());
    let first = found.first().expect("it is noticed");
    assert!(first.position > 0 && first.tokens == 1, "{first:?}");
    // Behind the layers.
    let found = run(&["linear_float"], AttentionPolicy::dense());
    let first = found.first().expect("it is noticed");
    assert_eq!(first.layer, found.layers);
    assert!(first.operation.starts_with("linear lm_head"), "{}", first.operation);
}
