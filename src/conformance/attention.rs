//! Cases of `rope_append` and `attention` with plain keys; those with compressed ones follow in
//! `compressed`.
//!
//! Nothing reads a cache but attention, so both run together. `rope_append` is judged by the
//! rotated queries and, with an F32 cache, by what attention sees of the keys. `attention` is
//! judged on rotations by quarter turns, which are exact, and on keys and values that an F16
//! cache holds exactly: what differs then is attention alone.

use super::caches::{Case, angles, decoding, prompt_then_decode, quarter_turns, shape};
use super::{Check, Inputs, U, compare, compressed};
use crate::backend::{Backend, CacheFormat};
use crate::delta::AttentionPolicy;
use crate::error::Result;
use crate::reference::Reference;

/// Plain keys that are turned by real angles, of inputs below 2.
pub(super) fn rope_append_of<B: Backend>(backend: &B, case: &Case) -> Result<[Check; 2]> {
    let (got, want) = (case.run(backend)?, case.run(&Reference::new())?);
    // Two products and their sum: each element is within 3 u of |x cos| + |y sin|, which is at most
    // |x| + |y|.
    let name = format!("{}, queries", case.name);
    let tolerance = |_| 3.0 * U * 4.0;
    let queries = compare("rope_append", name, &got.queries, &want.queries, tolerance);
    // Keys have that error, too. In F16 each of them may round the other way, though few will: one
    // unit in the last place, 2^-10.
    let rounding = match case.policy.exact {
        CacheFormat::F32 => 0.0,
        CacheFormat::F16 => 1.0 / 1024.0,
    };
    let bound = case.bound(2.0 * 6.0 * U + rounding, &want.pages)?;
    let name = format!("{}, keys", case.name);
    let keys = compare("rope_append", name, &got.attention, &want.attention, |i| bound[i]);
    Ok([queries, keys])
}

pub(super) fn rope_append<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(6);
    let cases = [
        (shape(1, 1, 2), vec![(3, true)]),
        (shape(2, 1, 32), vec![(5, true), (1, true), (2, true)]),
        (shape(4, 2, 64), vec![(1, true), (17, true)]),
        (shape(4, 1, 80), vec![(33, true), (1, true)]),
        (shape(5, 1, 96), vec![(2, true), (3, true)]),
        (shape(10, 2, 128), vec![(7, true), (1, true)]),
        (shape(2, 2, 256), vec![(4, true), (1, true)]),
        // Far into a context.
        (shape(2, 1, 64), vec![(64, false), (64, false), (64, false), (3, true), (1, true)]),
    ];
    for (shape, steps) in cases {
        for format in [CacheFormat::F32, CacheFormat::F16] {
            let tokens: usize = steps.iter().map(|step| step.0).sum();
            let case = Case {
                name: format!("{shape:?}, {tokens} tokens, {format:?}"),
                shape,
                policy: AttentionPolicy::plain(format),
                thresholds: None,
                table: angles(tokens + 1, shape.head_dim),
                qkv: inputs.floats(tokens * shape.qkv_width(), 2.0),
                steps: decoding(&steps),
            };
            checks.extend(rope_append_of(backend, &case)?);
        }
    }
    checks.extend(compressed::rope_append(backend)?);
    Ok(checks)
}

pub(super) fn attention<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(7);
    let fill = |chunks: usize, last: &[(usize, bool)]| {
        let mut steps = vec![(64, false); chunks];
        steps.extend(last);
        steps
    };
    let cases = [
        (shape(1, 1, 2), vec![(1, true), (3, true)]),
        (shape(2, 2, 32), vec![(17, true), (1, true), (2, true)]),
        (shape(4, 2, 64), vec![(33, true), (1, true)]),
        (shape(4, 1, 80), vec![(5, true), (18, true)]),
        (shape(5, 1, 96), vec![(3, true), (1, true)]),
        (shape(10, 2, 128), vec![(16, true), (15, true), (1, true)]),
        (shape(2, 1, 256), vec![(9, true), (1, true)]),
        // Long enough that a decode step is split over the sequence; a chunk that starts far in.
        (shape(4, 1, 64), fill(11, &[(1, true), (1, true)])),
        (shape(8, 2, 32), fill(8, &[(17, true), (1, true)])),
        (shape(5, 1, 128), fill(5, &[(3, true)])),
    ];
    for (shape, steps) in cases {
        for format in [CacheFormat::F32, CacheFormat::F16] {
            // Ordinary scores; scores of thousands, where a softmax that does not subtract its
            // maximum overflows; and queries of zero, which attend to all positions alike.
            for (kind, scale) in [("ordinary", 1.0), ("extreme", 3000.0), ("zero", 0.0)] {
                let tokens: usize = steps.iter().map(|step| step.0).sum();
                let mut qkv = inputs.halves(tokens * shape.qkv_width(), 1.0);
                for row in qkv.chunks_exact_mut(shape.qkv_width()) {
                    row[..shape.width()].iter_mut().for_each(|q| *q *= scale);
                }
                let case = Case {
                    name: format!("{shape:?}, {tokens} tokens, {format:?}, {kind}"),
                    shape,
                    policy: AttentionPolicy::plain(format),
                    thresholds: None,
                    table: quarter_turns(tokens + 1, shape.head_dim),
                    qkv,
                    steps: decoding(&steps),
                };
                checks.extend(attention_of(backend, case)?);
            }
        }
    }
    checks.extend(weights_sum_to_one(backend)?);
    checks.extend(nothing_broken_is_mended(backend)?);
    checks.extend(chunks_do_not_matter(backend)?);
    checks.extend(compressed::attention(backend)?);
    Ok(checks)
}

/// Attention over plain keys that are turned by quarters, and whether they are.
pub(super) fn attention_of<B: Backend>(backend: &B, case: Case) -> Result<[Check; 2]> {
    let (got, want) = (case.run(backend)?, case.run(&Reference::new())?);
    let name = format!("{}, queries", case.name);
    let queries = compare("rope_append", name, &got.queries, &want.queries, |_| 0.0);
    let bound = case.bound(0.0, &want.pages)?;
    let (got, want) = (&got.attention, &want.attention);
    Ok([queries, compare("attention", case.name, got, want, |i| bound[i])])
}

/// Attention over values of 1 is 1.
fn weights_sum_to_one<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let shape = shape(4, 2, 64);
    let steps = vec![(64, false), (64, false), (5, true), (1, true)];
    let tokens = 134;
    let mut qkv = Inputs::new(8).floats(tokens * shape.qkv_width(), 2.0);
    for row in qkv.chunks_exact_mut(shape.qkv_width()) {
        row[(shape.heads + shape.kv_heads) * shape.head_dim..].fill(1.0);
    }
    let table = angles(tokens + 1, shape.head_dim);
    let (name, policy) = (String::new(), AttentionPolicy::dense());
    let steps = decoding(&steps);
    let got =
        Case { name, shape, policy, thresholds: None, table, qkv, steps }.run(backend)?.attention;
    let want = vec![1.0; 6 * shape.width()];
    let tolerance = |_| 4.0 * tokens as f64 * U;
    Ok(vec![compare("attention", "weights sum to one".into(), &got, &want, tolerance)])
}

/// One element of one value is not finite: no token that sees it may come out as if nothing were.
fn nothing_broken_is_mended<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let shape = shape(4, 2, 64);
    let mut checks = Vec::new();
    for policy in ["dense", "dense values=int8", "dense values=int4", "delta values=int4 page=16"] {
        for broken in [f32::NAN, f32::INFINITY] {
            let steps = prompt_then_decode(&[40], &[1]);
            let policy: AttentionPolicy = policy.parse().expect("a policy of the table");
            let mut case = compressed::case(&mut Inputs::new(17), shape, policy, steps);
            // Of the first KV head, which query heads 0 and 1 read.
            let value = (shape.heads + shape.kv_heads) * shape.head_dim;
            case.qkv[3 * shape.qkv_width() + value + 5] = broken;
            let attention = case.run(backend)?.attention;
            let mut later = attention.chunks_exact(shape.width()).skip(3);
            let pass = later.all(|row| row[..2 * shape.head_dim].iter().any(|x| !x.is_finite()));
            let case = format!("{broken} in a value, {policy}");
            let error = if pass { 0.0 } else { 1.0 };
            checks.push(Check { operation: "attention", case, error, tolerance: 0.0, pass });
        }
    }
    Ok(checks)
}

/// A prompt at once, in chunks, and token by token is the same.
fn chunks_do_not_matter<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let shape = shape(4, 2, 64);
    let tokens = 37;
    let qkv = Inputs::new(9).halves(tokens * shape.qkv_width(), 1.0);
    let case = |steps: Vec<(usize, bool)>| {
        let (name, policy, qkv) = (String::new(), AttentionPolicy::dense(), qkv.clone());
        let (table, steps) = (quarter_turns(tokens + 1, shape.head_dim), decoding(&steps));
        Case { name, shape, policy, thresholds: None, table, qkv, steps }
    };
    let whole = case(vec![(tokens, true)]);
    let want = whole.run(backend)?.attention;
    let bound = whole.bound(0.0, &[])?;
    let mut checks = Vec::new();
    for (name, steps) in [
        ("token by token is as at once", vec![(1, true); tokens]),
        ("in chunks is as at once", vec![(16, true), (20, true), (1, true)]),
    ] {
        let got = case(steps).run(backend)?.attention;
        checks.push(compare("attention", name.into(), &got, &want, |i| 2.0 * bound[i]));
    }
    Ok(checks)
}
