//! The method against an independent implementation in PyTorch, `tests/fixtures/delta/make.py`:
//! first `delta::plain`, which has the paper's own rules, then the reference backend, which has
//! pages.

mod delta_common;

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use delta_common::{Text, attend};
use deltallm::backend::AttentionShape;
use deltallm::delta::plain::{self, Differences};
use deltallm::delta::{AttentionPolicy, PageLayout, Phase};
use deltallm::reference::Reference;
use safetensors::SafeTensors;

/// Tokens, elements of a head, and tokens of a page of the variants, as in make.py.
const L: usize = 160;
const D: usize = 16;
const PAGE: usize = 32;

/// What is stored is rounded to f32: half a unit of 2^-23, of numbers below 16.
const STORED: f64 = 16.0 / (1 << 24) as f64;

/// All tensors of the file, as f64.
struct Golden(HashMap<String, Vec<f64>>);

impl Golden {
    fn read() -> Self {
        let path: PathBuf =
            [env!("CARGO_MANIFEST_DIR"), "tests/fixtures/delta/delta.safetensors"].iter().collect();
        let bytes = fs::read(path).expect("the fixture");
        let file = SafeTensors::deserialize(&bytes).expect("tensors");
        let floats = |data: &[u8]| {
            let words = data.chunks_exact(4).map(|b| <[u8; 4]>::try_from(b).expect("four bytes"));
            words.map(|b| f64::from(f32::from_le_bytes(b))).collect()
        };
        Self(file.tensors().into_iter().map(|(name, view)| (name, floats(view.data()))).collect())
    }

    fn get(&self, name: &str) -> &[f64] {
        self.0.get(name).unwrap_or_else(|| panic!("no {name} in the fixture"))
    }

    /// Plain attention of every query, `[L, D]`.
    fn attention(
        &self,
        reconstruction: &[f64],
        is_exact: impl Fn(usize, usize) -> bool,
    ) -> Vec<f64> {
        let (keys, values) = (self.get("keys"), self.get("values"));
        let text = plain::Text { head_dim: D, keys, reconstruction, values };
        let queries = self.get("queries").chunks_exact(D).enumerate();
        queries.flat_map(|(i, q)| plain::hybrid_attention(text, q, i, &is_exact)).collect()
    }
}

#[track_caller]
fn assert_near(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got - want).abs();
        assert!(error <= tolerance, "{name}: row {}, {}: {got}, not {want}", i / D, i % D);
    }
}

fn unrounded(_channel: usize, d: f64) -> f64 {
    d
}

/// The plain variants of a theta by their names in the file.
fn variant(golden: &Golden, name: &str, theta: f64) -> Differences {
    let keys = golden.get("keys");
    match name {
        "anchored" => plain::anchored_delta_keys(keys, D, PAGE, theta, unrounded),
        "mean" => plain::mean_delta_keys(keys, D, PAGE, theta, unrounded),
        _ => plain::delta_keys(keys, D, theta),
    }
}

#[test]
fn plain_differences_are_those_of_pytorch() {
    let golden = Golden::read();
    for (name, theta) in [("0", 0.0), ("0.25", 0.25), ("0.6", 0.6), ("2", 2.0)] {
        let found = variant(&golden, "chain", theta);
        let sparsity = [found.zeros(), found.sparsity(0.05)];
        assert_near(name, &sparsity, golden.get(&format!("sparsity.{name}")), STORED);
        if theta > 0.0 {
            assert_near(name, &found.delta, golden.get(&format!("delta.{name}")), STORED);
            let want = golden.get(&format!("reconstruction.{name}"));
            assert_near(name, &found.reconstruction, want, STORED);
        } else {
            assert_eq!(found.reconstruction, golden.get("keys"));
        }
        // Closed loop without rounding is the same.
        let again = plain::rounded_delta_keys(golden.get("keys"), D, theta, unrounded);
        assert_near(name, &again.reconstruction, &found.reconstruction, 1e-12);
    }
    for name in ["anchored", "mean"] {
        let found = variant(&golden, name, 0.6);
        let want = golden.get(&format!("reconstruction.{name}.0.6"));
        assert_near(name, &found.reconstruction, want, STORED);
    }
}

#[test]
fn plain_attention_is_that_of_pytorch() {
    let golden = Golden::read();
    for (theta, value) in [("0.6", 0.6), ("2", 2.0)] {
        let keys = variant(&golden, "chain", value).reconstruction;
        for (alpha, sink) in [(0.05, 0), (0.05, 4), (0.2, 4)] {
            let name = format!("block.{theta}.{alpha}.{sink}");
            let got = golden.attention(&keys, plain::prefill_rule(L, alpha, sink));
            assert_near(&name, &got, golden.get(&name), 2.0 * STORED);
        }
    }
    let keys = variant(&golden, "chain", 0.6).reconstruction;
    let got = golden.attention(&keys, plain::sliding_rule(L, 0.2, 4));
    assert_near("sliding", &got, golden.get("sliding.0.6.0.2.4"), 2.0 * STORED);
    let got = golden.attention(&keys, plain::decode_rule(40, 4));
    assert_near("decode", &got, golden.get("decode.0.6.40.4"), 2.0 * STORED);
    for name in ["anchored", "mean"] {
        let keys = variant(&golden, name, 0.6).reconstruction;
        let got = golden.attention(&keys, plain::prefill_rule(L, 0.2, 4));
        assert_near(name, &got, golden.get(&format!("block.{name}.0.2.4")), 2.0 * STORED);
    }
    let got = golden.attention(golden.get("keys"), |_, _| false);
    assert_near("dense", &got, golden.get("dense"), 2.0 * STORED);
}

/// The file's queries, keys and values as one head's.
fn text(golden: &Golden, policy: &str) -> Text {
    let rows = |name| golden.get(name).chunks_exact(D);
    let (queries, keys, values) = (rows("queries"), rows("keys"), rows("values"));
    let token = queries.zip(keys).zip(values).flat_map(|((q, k), v)| [q, k, v].concat());
    Text {
        shape: AttentionShape { heads: 1, kv_heads: 1, head_dim: D },
        policy: policy.parse().expect("a policy"),
        rows: L,
        qkv: token.map(|x| x as f32).collect(),
    }
}

/// Attention of the reference backend, `[L, D]`, and what its pages stand for.
fn on_reference(golden: &Golden, policy: &str, steps: &[usize], phase: Phase) -> [Vec<f64>; 2] {
    let text = text(golden, policy);
    let found = attend(&Reference::new(), &text, steps, phase);
    let layout = PageLayout::new(&text.policy, D).expect("fits").expect("compressed");
    let keys = found.pages[0].iter().flat_map(|page| page.reconstruct(&layout));
    let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect();
    [wide(found.attention), wide(keys.collect())]
}

const PREFILL: Phase = Phase::Prefill { length: L };

/// Where the rules coincide. A query sees its own page exactly, which the paper does not have: the
/// block or window must therefore hold the page. In decoding, the window begins with a page.
#[test]
fn pages_are_the_paper_where_the_rules_coincide() {
    let golden = Golden::read();
    for (theta, alpha, page) in [("0.6", "0.2", 16), ("0.6", "0.2", 32), ("2", "0.2", 32)] {
        let policy = format!("paper theta={theta} sink=4 alpha={alpha} page={page}");
        for steps in [vec![L], vec![50, 70, 1, 39]] {
            let [got, keys] = on_reference(&golden, &policy, &steps, PREFILL);
            // Such keys and their differences are exact in f16.
            assert_eq!(keys, golden.get(&format!("reconstruction.{theta}")), "{policy}");
            let want = golden.get(&format!("block.{theta}.{alpha}.4"));
            assert_near(&policy, &got, want, 2.0 * STORED);
        }
    }
    let policy = "paper sink=4 alpha=0.2 shape=sliding page=16";
    let [got, _] = on_reference(&golden, policy, &[L], PREFILL);
    assert_near(policy, &got, golden.get("sliding.0.6.0.2.4"), 2.0 * STORED);

    let policy = "paper sink=4 window=40 page=16";
    let [got, _] = on_reference(&golden, policy, &[1; L], Phase::Decode);
    let want = golden.get("decode.0.6.40.4");
    let row = |all: &[f64], query: usize| all[query * D..][..D].to_vec();
    for query in (0..L).filter(|query| query + 1 <= 40 || (query + 1 - 40) % 16 == 0) {
        assert_near(policy, &row(&got, query), &row(want, query), 2.0 * STORED);
    }

    let policy = "paper reference=anchored sink=4 alpha=0.2 page=32";
    let [got, keys] = on_reference(&golden, policy, &[L], PREFILL);
    assert_eq!(keys, golden.get("reconstruction.anchored.0.6"));
    assert_near(policy, &got, golden.get("block.anchored.0.2.4"), 2.0 * STORED);
}

/// A page's mean is rounded to f16, by up to 2^-11 of it: keys differ by that, and where a
/// difference lies that near to theta, one may be kept and the other not.
#[test]
fn means_are_those_of_pytorch_but_for_their_rounding() {
    let golden = Golden::read();
    let policy = "paper reference=mean sink=4 alpha=0.2 page=32";
    let [_, keys] = on_reference(&golden, policy, &[L], PREFILL);
    let want = golden.get("reconstruction.mean.0.6");
    let exact = variant(&golden, "mean", 0.0);
    for (i, (got, want)) in keys.iter().zip(want).enumerate() {
        let (k, d) = (golden.get("keys")[i], exact.delta[i]);
        let rounding = ((k - d).abs() + d.abs()) / 2048.0;
        if (d.abs() - 0.6).abs() > rounding {
            assert!((got - want).abs() <= rounding, "element {i}: {got}, not {want}");
        }
    }
}

/// Theta 0 in the paper's own format is dense attention, in every phase.
#[test]
fn theta_zero_is_dense() {
    let golden = Golden::read();
    for (phase, steps) in [(PREFILL, vec![L]), (Phase::Decode, vec![1; L])] {
        let policy = "paper theta=0 sink=0 window=1 alpha=0 page=16";
        let [got, _] = on_reference(&golden, policy, &steps, phase);
        assert_near(policy, &got, golden.get("dense"), 2.0 * STORED);
    }
    let dense = text(&golden, "dense");
    assert_eq!(dense.policy, AttentionPolicy::dense());
    let got = attend(&Reference::new(), &dense, &[L], PREFILL).attention;
    let got: Vec<f64> = got.into_iter().map(f64::from).collect();
    assert_near("dense", &got, golden.get("dense"), 2.0 * STORED);
}
