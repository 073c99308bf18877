//! Cases of `rope_append`, `encode_keys` and `attention` with compressed keys.
//!
//! Nothing is turned and keys are exact in f16, so that every backend encodes the same keys: pages
//! must then be bit-equal, and what differs in attention is attention alone.

use half::f16;

use super::caches::{
    Case, Output, Player, StepOf, angles, avoid_ties, decoding, drifting, no_turns,
    prompt_then_decode, shape,
};
use super::{Check, Inputs, U, compare, measure};
use crate::backend::{AttentionShape, Backend, CacheFormat};
use crate::delta::{AttentionPolicy, KeyFormat, Page, Phase, encode_page};
use crate::error::Result;
use crate::reference::Reference;

/// Every format of keys, references and deltas, with thresholds of all kinds.
const KEYS: [&str; 14] = [
    "keys=int8",
    "keys=channel4",
    "keys=channel2",
    "keys=delta theta=0.25 reference=continuous deltas=f16",
    "keys=delta theta=0.5sigma reference=continuous deltas=int8",
    "keys=delta theta=0 reference=continuous deltas=int4",
    "keys=delta theta=0 reference=anchored deltas=f16",
    "keys=delta theta=0.25 reference=anchored deltas=int8",
    "keys=delta theta=0.25sigma reference=anchored deltas=int4",
    "keys=delta theta=1sigma reference=mean deltas=f16",
    "keys=delta theta=0 reference=mean deltas=int8",
    "keys=delta theta=0.5 reference=mean deltas=int4",
    // Nothing is kept.
    "keys=delta theta=10000 reference=mean deltas=int8",
    "keys=delta theta=10000 reference=continuous deltas=f16",
];

const HEAD_DIMS: [usize; 7] = [2, 32, 64, 80, 96, 128, 256];

/// Tokens that a cache can hold which is cut, saved or restored; with steps of up to 32 tokens all
/// have fewer slots than that.
const CONTEXT: usize = 160;

/// A case over drifting keys; `policy` is read as a user's.
fn read(inputs: &mut Inputs, shape: AttentionShape, policy: &str, steps: Vec<StepOf>) -> Case {
    case(inputs, shape, policy.parse().expect("a policy of the table"), steps)
}

/// A case over drifting keys.
pub(super) fn case(
    inputs: &mut Inputs,
    shape: AttentionShape,
    policy: AttentionPolicy,
    steps: Vec<StepOf>,
) -> Case {
    let tokens: usize = steps.iter().map(|step| step.rows).sum();
    let mut case = Case {
        name: format!("{shape:?}, {tokens} tokens, {policy}"),
        shape,
        policy,
        thresholds: None,
        table: no_turns(CONTEXT.max(tokens + 1), shape.head_dim),
        qkv: drifting(inputs, shape, tokens),
        steps,
    };
    avoid_ties(&mut case);
    case
}

/// The case with a threshold of its own for each KV head, where keys are deltas; that of the second
/// is 0.
fn thresholds_differ(mut case: Case) -> Case {
    if let KeyFormat::Delta(delta) = case.policy.keys {
        let of_head = |head: usize| match head {
            1 => 0.0,
            head => delta.threshold.number() * (0.6 + 0.7 * head as f32),
        };
        let thresholds: Vec<f32> = (0..case.shape.kv_heads).map(of_head).collect();
        case.name = format!("{}, thresholds {thresholds:?}", case.name);
        case.thresholds = Some(thresholds.into());
    }
    case
}

/// Sizes of steps, over and over, until there are `tokens`.
fn odd_steps(sizes: &[usize], tokens: usize) -> Vec<usize> {
    let (mut steps, mut rest) = (Vec::new(), tokens);
    for &size in sizes.iter().cycle() {
        if rest == 0 {
            break;
        }
        steps.push(size.min(rest));
        rest -= size.min(rest);
    }
    steps
}

/// Pages that must be equal, word for word; the name says where the first one differs.
fn same_pages(case: &str, got: &[Vec<Page>], want: &[Vec<Page>]) -> Check {
    let mut name = format!("{case}, pages");
    let counts = |all: &[Vec<Page>]| all.iter().map(Vec::len).collect::<Vec<_>>();
    if counts(got) != counts(want) {
        name = format!("{name}: {:?} of each head, not {:?}", counts(got), counts(want));
        return measure("encode_keys", name, got.len(), want.len() + 1, |_| (0.0, 0.0));
    }
    let mut differing = 0;
    for (head, (got, want)) in got.iter().zip(want).enumerate() {
        for (page, (got, want)) in got.iter().zip(want).enumerate() {
            if got != want {
                if differing == 0 {
                    let word = got.words.iter().zip(&want.words).position(|(a, b)| a != b);
                    let lengths = (got.words.len(), want.words.len());
                    let word = word.unwrap_or(lengths.0.min(lengths.1));
                    let (found, expected) = (got.words.get(word), want.words.get(word));
                    name = format!(
                        "{name}: head {head}, page {page}, word {word} of {lengths:?}: \
                         {found:x?} instead of {expected:x?}"
                    );
                }
                differing += 1;
            }
        }
    }
    measure("encode_keys", name, 1, 1, |_| (f64::from(differing), 0.0))
}

/// The pages of a case's keys, by the arithmetic that every device repeats.
fn encoded(case: &Case) -> Vec<Vec<Page>> {
    let layout = case.layout().expect("compressed keys");
    let head = |kv_head: usize| {
        let layout = layout.with_theta(case.thresholds.as_ref().map(|thetas| thetas[kv_head]));
        let keys = case.keys(kv_head);
        let mut previous: Option<Vec<f32>> = None;
        let page = |keys: &[f32]| {
            let page = encode_page(&layout, keys, previous.as_deref());
            let found = page.reconstruct(&layout);
            previous = Some(found[found.len() - layout.head_dim..].to_vec());
            page
        };
        keys.chunks_exact(layout.tokens * layout.head_dim).map(page).collect()
    };
    (0..case.shape.kv_heads).map(head).collect()
}

/// Pages against the host's, word for word.
pub(super) fn pages_of<B: Backend>(backend: &B, case: &Case) -> Result<Check> {
    Ok(same_pages(&case.name, &case.run(backend)?.pages, &encoded(case)))
}

/// Each format with two sizes of pages, over all sizes of heads.
pub(super) fn encode_keys<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(11);
    for (i, keys) in KEYS.iter().enumerate() {
        for j in [i % 4, (i + 1 + i / 4 % 3) % 4] {
            let page = [16, 32, 64, 128][j];
            let head_dim = HEAD_DIMS[(i + 2 * j) % HEAD_DIMS.len()];
            let exact = ["f16", "f32"][(i + j) % 2];
            let policy = format!("{keys} page={page} exact={exact} sink={} window=1", 3 * j);
            let steps = odd_steps(&[1, 17, 5, 130, 4, 2, 64], 3 * page + 5);
            let steps: Vec<_> = steps.into_iter().map(|rows| (rows, false)).collect();
            let shape = shape(2, 1 + (i + j) % 2, head_dim);
            let case = read(&mut inputs, shape, &policy, decoding(&steps));
            checks.push(pages_of(backend, &case)?);
        }
    }
    // Each KV head with its own threshold, in both units.
    for (i, (shape, keys)) in [
        (shape(4, 2, 80), "theta=0.4 reference=continuous deltas=int4"),
        (shape(3, 3, 2), "theta=0.5sigma reference=continuous deltas=f16"),
        (shape(10, 5, 64), "theta=0.25 reference=anchored deltas=f16"),
        (shape(7, 7, 34), "theta=0.7sigma reference=anchored deltas=int8"),
        (shape(3, 3, 128), "theta=0.3 reference=mean deltas=int8"),
        (shape(6, 3, 96), "theta=0.8sigma reference=mean deltas=int4"),
    ]
    .into_iter()
    .enumerate()
    {
        let page = [16, 32, 64][i % 3];
        let policy = format!("keys=delta {keys} page={page} sink={i} window=1");
        let steps = odd_steps(&[1, 17, 5, 130, 4, 2, 64], 3 * page + 5);
        let steps: Vec<_> = steps.into_iter().map(|rows| (rows, false)).collect();
        let case = thresholds_differ(read(&mut inputs, shape, &policy, decoding(&steps)));
        checks.push(pages_of(backend, &case)?);
    }
    Ok(checks)
}

/// Original keys and values as a cache holds them, read by saving it. The ring of recent keys
/// wraps.
pub(super) fn rope_append<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(12);
    let cases = [
        (shape(1, 1, 2), "keys=int8 values=int8 sink=3 window=1 page=16 exact=f32"),
        (shape(4, 2, 64), "paper values=int4 sink=0 window=20 page=16"),
        (shape(5, 1, 80), "delta values=plain sink=64 window=1 page=32"),
        (shape(2, 2, 128), "keys=channel4 values=int4 sink=100 window=1 page=16 exact=f32"),
    ];
    for (shape, policy) in cases {
        let steps = odd_steps(&[17, 1, 5, 2, 4, 16, 1], 230);
        let steps: Vec<_> = steps.into_iter().map(|rows| (rows, false)).collect();
        let mut case = read(&mut inputs, shape, policy, decoding(&steps));
        case.table = angles(case.tokens() + 1, shape.head_dim);
        checks.extend(rope_append_of(backend, &case)?);
    }
    Ok(checks)
}

/// What a cache holds of a case whose keys are turned by real angles.
pub(super) fn rope_append_of<B: Backend>(backend: &B, case: &Case) -> Result<[Check; 2]> {
    let (got, want) = (saved(case, backend)?, saved(case, &Reference::new())?);
    // Two products and their sum are within 3 u of |x| + |y|, which is below 16 each. What is then
    // rounded to f16 may be rounded the other way.
    let tolerance = |i: usize| {
        let rounding = match case.policy.exact {
            CacheFormat::F32 => 0.0,
            CacheFormat::F16 => f64::from(want.keys[i]).abs() / 1024.0 + 2f64.powi(-24),
        };
        3.0 * U * 32.0 + rounding
    };
    let name = format!("{}, original keys", case.name);
    let keys = compare("rope_append", name, &got.keys, &want.keys, tolerance);
    let name = format!("{}, bytes of values", case.name);
    let (got, want) = (got.values, want.values);
    let differs = |i: usize| (f64::from(got[i].abs_diff(want[i])), 0.0);
    let values = measure("rope_append", name, got.len(), want.len(), differs);
    Ok([keys, values])
}

/// What an image says of original keys and values.
struct Saved {
    /// `[G, N, D]`.
    keys: Vec<f32>,
    values: Vec<u8>,
}

fn saved<B: Backend>(case: &Case, backend: &B) -> Result<Saved> {
    let mut player = Player::new(backend, case, case.tokens() + 1, case.rows())?;
    player.play(case, &case.steps)?;
    let image = player.save()?;
    let keys = match case.policy.exact {
        CacheFormat::F32 => {
            let words = image.exact.chunks_exact(4);
            words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        CacheFormat::F16 => {
            let halves = image.exact.chunks_exact(2);
            halves.map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
    };
    Ok(Saved { keys, values: image.values })
}

/// Cases of hybrid attention, few in formats beyond those of the first loop: a software GPU takes
/// longer to compile kernels than to run them. Shape, policy, chunks of the prompt, and steps of decoding.
fn cases(inputs: &mut Inputs) -> Vec<Case> {
    let small = "window=1 page=16";
    let mut cases = Vec::new();
    // Every format of keys, each in a prompt and in decoding: formats of values, both shapes of
    // windows, sinks and groups take turns. The ring of recent keys holds 16 to 64 keys.
    for (i, keys) in KEYS.iter().enumerate() {
        let values = ["plain", "int8", "int4"][i % 3];
        let (window, alpha) = (["block", "sliding"][i % 2], ["0.05", "0.2"][i / 2 % 2]);
        let sink = [0, 3, 64, 100][(i + i / 4) % 4];
        let exact = ["f16", "f32"][i / 3 % 2];
        let (heads, kv_heads) = [(2, 2), (4, 1), (5, 1), (8, 2)][i % 4];
        let head_dim = HEAD_DIMS[i % HEAD_DIMS.len()];
        let policy = format!(
            "{keys} values={values} sink={sink} alpha={alpha} shape={window} exact={exact} {small}"
        );
        let steps = prompt_then_decode(&odd_steps(&[5, 17, 2, 16, 1], 130), &[1, 4, 1, 2, 1]);
        cases.push(read(inputs, shape(heads, kv_heads, head_dim), &policy, steps));
    }
    // Large chunks and pages; a decode window of several pages; a long text.
    let delta = "keys=delta theta=0.25 reference=mean deltas=int8";
    let chain = "keys=delta theta=0.25 reference=continuous deltas=f16";
    for (heads, kv_heads, head_dim, policy, prompt, decode) in [
        (4, 1, 64, format!("{delta} sink=4 alpha=0.1 window=100 page=64"), vec![130, 130, 64], 5),
        (
            5,
            1,
            128,
            format!("{chain} sink=0 alpha=0.3 shape=block window=64 page=32"),
            vec![130, 64],
            3,
        ),
        (
            4,
            4,
            32,
            "keys=channel4 sink=3 window=17 page=128 values=int8".into(),
            vec![64, 130, 100],
            3,
        ),
        (
            4,
            1,
            80,
            format!("{delta} sink=3 alpha=0.02 values=int8 exact=f32 {small}"),
            vec![17; 35],
            40,
        ),
        (2, 1, 80, format!("{chain} sink=64 alpha=1 exact=f32 {small}"), vec![64, 17], 20),
        (2, 1, 2, format!("keys=int8 sink=0 alpha=0 {small}"), vec![33], 60),
    ] {
        let steps = prompt_then_decode(&prompt, &vec![1; decode]);
        cases.push(read(inputs, shape(heads, kv_heads, head_dim), &policy, steps));
    }
    // Queries of zero attend to all positions alike; scores of thousands.
    for (kind, scale) in [("zero", 0.0), ("extreme", 3000.0)] {
        let steps = prompt_then_decode(&[17, 30], &[1, 1]);
        let policy = format!("{delta} values=int8 exact=f32 sink=3 {small}");
        let mut case = read(inputs, shape(4, 2, 80), &policy, steps);
        let width = case.shape.width();
        for row in case.qkv.chunks_exact_mut(case.shape.qkv_width()) {
            row[..width].iter_mut().for_each(|q| *q *= scale);
        }
        case.name = format!("{}, {kind}", case.name);
        cases.push(case);
    }
    cases
}

/// Pages, which must be equal, and attention.
pub(super) fn attention_of<B: Backend>(backend: &B, case: Case) -> Result<[Check; 2]> {
    let (got, want) = (case.run(backend)?, case.run(&Reference::new())?);
    let pages = same_pages(&case.name, &got.pages, &want.pages);
    let bound = case.bound(0.0, &want.pages)?;
    let (got, want) = (&got.attention, &want.attention);
    Ok([pages, compare("attention", case.name, got, want, |i| bound[i])])
}

pub(super) fn attention<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    for case in cases(&mut Inputs::new(13)) {
        checks.extend(attention_of(backend, case)?);
    }
    checks.extend(chunks_do_not_matter(backend)?);
    checks.extend(truncated(backend)?);
    checks.extend(restored(backend)?);
    Ok(checks)
}

/// Policies whose caches are cut, saved and restored, with their head sizes. Windows and slots are
/// small, so that the ring wraps.
const CONTINUED: [(usize, &str); 4] = [
    (
        80,
        "keys=delta theta=0.25 reference=continuous deltas=f16 exact=f32 sink=3 window=17 page=16",
    ),
    (
        80,
        "keys=delta theta=0.5sigma reference=mean deltas=int8 values=int8 sink=20 window=1 page=32",
    ),
    (64, "keys=channel2 values=int4 sink=0 window=1 page=16 shape=block"),
    (2, "keys=int8 sink=64 window=40 page=16"),
];

/// A prompt at once, in chunks, and token by token is the same.
fn chunks_do_not_matter<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(14);
    let tokens = 75;
    for (head_dim, policy) in CONTINUED {
        let steps = prompt_then_decode(&[tokens], &[]);
        let whole = read(&mut inputs, shape(4, 2, head_dim), policy, steps);
        let whole = thresholds_differ(whole);
        let want = whole.run(backend)?;
        let bound = whole.bound(0.0, &want.pages)?;
        for (name, chunks) in
            [("token by token is as at once", vec![1; tokens]), ("in chunks", vec![16, 33, 25, 1])]
        {
            let steps = prompt_then_decode(&chunks, &[]);
            let name = format!("{}, {name}", whole.name);
            let got = Case { steps, ..whole.clone() }.run(backend)?;
            checks.push(same_pages(&name, &got.pages, &want.pages));
            let (got, want) = (&got.attention, &want.attention);
            checks.push(compare("attention", name, got, want, |i| 2.0 * bound[i]));
        }
    }
    Ok(checks)
}

/// Having gone further and been cut back is as never having gone there.
fn truncated<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(15);
    for (head_dim, policy) in CONTINUED {
        // From inside a page; to its beginning and to the end of one; into the sink; to nothing.
        for (beyond, length) in [(133, 121), (128, 112), (97, 96), (20, 2), (150, 0)] {
            let before = odd_steps(&[17, 16, 5], length);
            let steps = prompt_then_decode(&before, &[4, 17, 1, 1]);
            let straight = read(&mut inputs, shape(4, 2, head_dim), policy, steps);
            let straight = thresholds_differ(straight);
            // The same text up to `length`, and then another.
            let width = straight.shape.qkv_width();
            let mut detour = straight.clone();
            detour.qkv.truncate(length * width);
            detour.qkv.extend(drifting(&mut inputs, straight.shape, beyond - length));
            let there = odd_steps(&[17, 16, 5], beyond);
            let there: Vec<_> = there.into_iter().map(|rows| (rows, false)).collect();

            let want = straight.run(&Reference::new())?;
            let rule = straight.policy.rule(Phase::Decode);
            let mut player = Player::new(backend, &straight, CONTEXT, 32)?;
            player.play(&detour, &decoding(&there))?;
            player.truncate(length)?;
            assert!(player.exact_from() <= rule.start(length), "slots of the table's case");
            player.play(&straight, &straight.steps[before.len()..])?;
            let got = player.done()?;

            let name = format!("{}, cut from {beyond} to {length}", straight.name);
            checks.push(same_pages(&name, &got.pages, &want.pages));
            let bound = straight.bound(0.0, &want.pages)?;
            let skipped = length * straight.shape.width();
            let (got, want) = (&got.attention, &want.attention[skipped..]);
            checks.push(compare("attention", name, got, want, |i| bound[skipped + i]));
        }
    }
    Ok(checks)
}

/// What was saved goes on as if nothing had happened: on the same backend, and to and from the
/// reference.
fn restored<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(16);
    let reference = Reference::new();
    for (i, (head_dim, policy)) in CONTINUED.into_iter().enumerate() {
        for length in [[2, 70, 117][i % 3], 112] {
            let before = odd_steps(&[17, 16, 5, 1], length);
            let steps = prompt_then_decode(&before, &[1, 17, 2, 1]);
            let case = read(&mut inputs, shape(4, 2, head_dim), policy, steps);
            let case = thresholds_differ(case);
            let want = case.run(&reference)?;
            let bound = case.bound(0.0, &want.pages)?;
            let (first, second) = case.steps.split_at(before.len());
            let skipped = length * case.shape.width();
            let mut add = |way: &str, got: Output| {
                let name = format!("{}, {way} at {length}", case.name);
                checks.push(same_pages(&name, &got.pages, &want.pages));
                let (got, want) = (&got.attention, &want.attention[skipped..]);
                checks.push(compare("attention", name, got, want, |i| bound[skipped + i]));
            };
            add("restored", handed_over(&case, first, second, backend, backend)?);
            add(
                "restored on the reference",
                handed_over(&case, first, second, backend, &reference)?,
            );
            add(
                "restored from the reference",
                handed_over(&case, first, second, &reference, backend)?,
            );
        }
    }
    Ok(checks)
}

/// Runs `first` on one backend and `second` on another; gives what the second one gives.
fn handed_over<A: Backend, B: Backend>(
    case: &Case,
    first: &[StepOf],
    second: &[StepOf],
    from: &A,
    to: &B,
) -> Result<Output> {
    let mut player = Player::new(from, case, CONTEXT, 32)?;
    player.play(case, first)?;
    let image = player.save()?;
    let mut player = Player::new(to, case, CONTEXT, 32)?;
    player.restore(&image)?;
    player.play(case, second)?;
    player.done()
}
