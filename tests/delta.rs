//! What holds of compressed keys on every device, over random shapes, policies and texts.
//!
//! | property | what |
//! |---|---|
//! | `dense` | theta 0, or a window of everything, is dense attention |
//! | `within_theta` | what a page stands for is within theta of its keys, or half a level |
//! | `steps` | token by token gives the pages of one prefill |
//! | `hybrid` | attention is the plain one of exact keys and of what pages stand for |
//! | `image` | saving and restoring loses nothing |
//! | `counts` | zeros and bytes are those counted from the words |

mod delta_common;
mod gpu_common;

use delta_common::{Attended, Text, attend, attend_from};
use deltallm::backend::{AttentionShape, Backend};
use deltallm::cpu::{Cpu, Kernels};
use deltallm::delta::plain::{self, hybrid_attention};
use deltallm::delta::{
    AttentionPolicy, DeltaFormat, DeltaKeys, KeyFormat, Page, PageLayout, Phase,
    Reference as DeltaReference, Threshold,
};
use deltallm::gpu::GpuOptions;
use deltallm::reference::Reference;
use deltallm::sampler::Draws;
use half::f16;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseResult, TestRunner};

/// Unit roundoff of `f32`, and of `f16`.
const U: f64 = 1.0 / (1 << 24) as f64;
const U16: f64 = 1.0 / 2048.0;

/// A text and how it is cut into steps.
#[derive(Clone, Debug)]
struct Input {
    /// Query heads a KV head, KV heads, elements of a head.
    shape: (usize, usize, usize),
    policy: String,
    tokens: usize,
    steps: Vec<usize>,
    seed: u64,
    decode: bool,
}

/// Tokens of the largest step.
const ROWS: usize = 40;

impl Input {
    fn text(&self) -> Text {
        let (group, kv_heads, head_dim) = self.shape;
        let shape = AttentionShape { heads: group * kv_heads, kv_heads, head_dim };
        let policy = self.policy.parse().expect("a policy");
        Text { shape, policy, rows: ROWS, qkv: drifting(self.seed, shape, self.tokens) }
    }

    /// The steps, cut off or gone on with at the last token.
    fn steps(&self) -> Vec<usize> {
        let mut rest = self.tokens;
        let sizes = self.steps.iter().copied().chain(std::iter::repeat(ROWS));
        let cut = |size: usize| {
            let size = size.min(rest);
            rest -= size;
            size
        };
        sizes.map(cut).take_while(|&size| size > 0).collect()
    }

    fn phase(&self) -> Phase {
        if self.decode { Phase::Decode } else { Phase::Prefill { length: self.tokens } }
    }
}

/// How much formats vary.
#[derive(Clone, Copy, PartialEq)]
enum Variety {
    Full,
    /// A few: a GPU has kernels for each, and a software one takes longer to compile than to run
    /// them.
    Few,
}

/// Inputs with keys of these formats.
fn inputs(variety: Variety, keys: Vec<String>) -> impl Strategy<Value = Input> + use<> {
    let (dims, values, pages) = match variety {
        Variety::Full => {
            (vec![2, 16, 32, 64, 80, 96, 128], vec!["plain", "int8", "int4"], vec![16, 32, 64])
        }
        Variety::Few => (vec![80], vec!["plain", "int4"], vec![16]),
    };
    let shape = (1..=5usize, 1..=2usize, prop::sample::select(dims));
    let values = prop::sample::select(values);
    let page = prop::sample::select(pages);
    let window =
        (0..40usize, 0..30usize, 1..50usize, prop::sample::select(vec!["block", "sliding"]));
    let text = (1..160usize, prop::collection::vec(1..=ROWS, 0..12), any::<u64>(), any::<bool>());
    (shape, prop::sample::select(keys), values, page, window, text).prop_map(
        |(
            shape,
            keys,
            values,
            page,
            (sink, alpha, window, place),
            (tokens, steps, seed, decode),
        )| {
            let policy = format!(
                "{keys} values={values} page={page} sink={sink} alpha=0.{alpha:02} \
                 window={window} shape={place}"
            );
            Input { shape, policy, tokens, steps, seed, decode }
        },
    )
}

/// Delta keys with these thresholds, of all references, in these formats where they vary.
fn deltas(variety: Variety, thetas: &[&str], formats: &[&str]) -> Vec<String> {
    let mut all = Vec::new();
    for theta in thetas {
        for reference in ["continuous", "anchored", "mean"] {
            for &format in formats {
                let usual = [("continuous", "f16"), ("mean", formats[formats.len() / 2])];
                if variety == Variety::Full || usual.contains(&(reference, format)) {
                    all.push(format!(
                        "keys=delta theta={theta} reference={reference} deltas={format}"
                    ));
                }
            }
        }
    }
    all
}

fn all_formats(variety: Variety) -> Vec<String> {
    let mut all = deltas(variety, &["0", "0.25", "0.5sigma", "50"], &["f16", "int8", "int4"]);
    all.extend(["keys=int8", "keys=channel4", "keys=channel2"].map(String::from));
    if variety == Variety::Few {
        all.pop();
    }
    all
}

/// Keys that drift about an offset a channel, in steps of 1 / 256 and below 8, so that f16 holds
/// them; random queries and values, which f16 holds too.
fn drifting(seed: u64, shape: AttentionShape, tokens: usize) -> Vec<f32> {
    let mut draws = Draws::new(seed);
    let mut unit = move || 2.0 * draws.draw() - 1.0;
    let half = |x: f32| f16::from_f32(x).to_f32();
    let (width, queries) = (shape.kv_width(), shape.width());
    let mut key: Vec<f32> = (0..width).map(|c| [0.0, 2.0, -5.0][c % 3] + unit()).collect();
    let mut out = Vec::new();
    for _ in 0..tokens {
        out.extend((0..queries).map(|_| half(unit())));
        for k in &mut key {
            *k = (*k + 0.3 * unit()).clamp(-7.9, 7.9);
            out.push((*k * 256.0).round() / 256.0 + 0.0);
        }
        out.extend((0..width).map(|_| half(unit())));
    }
    out
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// Head `index` of the rows of `text`, counted over queries, keys and values, `[tokens, D]`.
fn head(text: &Text, index: usize) -> Vec<f64> {
    let rows = text.qkv.chunks_exact(text.shape.qkv_width());
    let head_dim = text.shape.head_dim;
    rows.flat_map(|row| wide(&row[index * head_dim..][..head_dim])).collect()
}

fn layout(text: &Text) -> PageLayout {
    let layout = PageLayout::new(&text.policy, text.shape.head_dim).expect("pages fit");
    layout.expect("compressed keys")
}

/// What the pages of a head stand for, `[full pages * C, D]`.
fn reconstruction(layout: &PageLayout, pages: &[Page]) -> Vec<f64> {
    pages.iter().flat_map(|page| wide(&page.reconstruct(layout))).collect()
}

/// Largest error of attention in f32 by keys of norm `key`, or sums of terms of such norms, over
/// `length` values of at most `value`: the bound of `deltallm::conformance`.
fn tolerance(text: &Text, query: f64, key: f64, value: f64) -> f64 {
    let head_dim = text.shape.head_dim as f64;
    let product = query * key / head_dim.sqrt();
    let score = (head_dim + text.policy.page as f64 + 4.0) * U * product;
    let weights = 2.0 * U * (2.0 * (3.0 + 2.0 * (2.0 * product).min(88.0)) + 4.0);
    (2.0 * score + weights + 4.0 * text.tokens() as f64 * U) * value
}

fn longest(head: &[f64], head_dim: usize) -> f64 {
    head.chunks_exact(head_dim).map(norm).fold(0.0, f64::max)
}

fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |max, v| v.abs().max(max))
}

/// Attention of `found` against plain attention of each head, in which keys that are not exact are
/// as `approximate` says; `apart` is how far a score may lie from that.
fn agrees(
    text: &Text,
    found: &[f32],
    values: impl Fn(usize) -> Vec<f64>,
    approximate: impl Fn(usize) -> Vec<f64>,
    is_exact: impl Fn(usize, usize) -> bool,
    terms: impl Fn(usize) -> f64,
    apart: impl Fn(f64) -> f64,
) -> TestCaseResult {
    let AttentionShape { heads, kv_heads, head_dim } = text.shape;
    for index in 0..heads {
        let kv_head = index / (heads / kv_heads);
        let (queries, keys) = (head(text, index), head(text, heads + kv_head));
        let (values, reconstruction) = (values(kv_head), approximate(kv_head));
        let plain =
            plain::Text { head_dim, keys: &keys, reconstruction: &reconstruction, values: &values };
        let query = longest(&queries, head_dim);
        let key = longest(&keys, head_dim).max(terms(kv_head));
        // Scores that are apart by `e` move each weight by a factor of up to `exp(2 e)`. Parts of
        // a value in 4 bits may be summed apart.
        let value = 4.0 * largest(&values);
        let tolerance =
            tolerance(text, query, key, value) + ((2.0 * apart(query)).exp() - 1.0) * value;
        for (i, query) in queries.chunks_exact(head_dim).enumerate() {
            let want = hybrid_attention(plain, query, i, &is_exact);
            let at = (i * heads + index) * head_dim;
            for (c, want) in want.iter().enumerate() {
                let got = f64::from(found[at + c]);
                prop_assert!(
                    (got - want).abs() <= tolerance,
                    "token {i}, head {index}, channel {c}: {got} instead of {want}, \
                     tolerance {tolerance:.1e}"
                );
            }
        }
    }
    Ok(())
}

/// Values as the image holds them.
fn kept_values(text: &Text, found: &Attended, kv_head: usize) -> Vec<f64> {
    let AttentionPolicy { values, exact, .. } = text.policy;
    let head_dim = text.shape.head_dim;
    let row = text.policy.value_row_bytes(head_dim);
    let rows = found.image.values.chunks_exact(row);
    let mut out = Vec::new();
    for bytes in rows.skip(kv_head * text.tokens()).take(text.tokens()) {
        let mut value = vec![0.0; head_dim];
        deltallm::delta::decode_value(values, exact, bytes, &mut value);
        out.extend(wide(&value));
    }
    out
}

/// Norms of the terms that a key is a sum of, see `conformance`: parts of a key within three times
/// the largest magnitudes of its page's channels, and the steps of a chain.
fn terms(layout: &PageLayout, pages: &[Page]) -> f64 {
    let head_dim = layout.head_dim;
    let of_page = |page: &Page| {
        let keys = wide(&page.reconstruct(layout));
        let column =
            |c: usize| largest(&keys.iter().skip(c).step_by(head_dim).copied().collect::<Vec<_>>());
        let hull: Vec<f64> = (0..head_dim).map(column).collect();
        let steps = keys.windows(2 * head_dim).step_by(head_dim).map(|pair| {
            let (a, b) = pair.split_at(head_dim);
            norm(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>())
        });
        let is_mean = layout.delta().is_none_or(|delta| delta.reference == DeltaReference::Mean);
        3.01 * norm(&hull) + if is_mean { 0.0 } else { steps.sum() }
    };
    pages.iter().map(of_page).fold(0.0, f64::max)
}

fn dense<B: Backend>(backend: &B, input: &Input) -> TestCaseResult {
    let text = input.text();
    let found = attend(backend, &text, &input.steps(), input.phase());
    let head_dim = text.shape.head_dim as f64;
    let values = |kv_head| kept_values(&text, &found, kv_head);
    let key = |kv_head| largest(&head(&text, text.shape.heads + kv_head));
    let widest = (0..text.shape.kv_heads).map(key).fold(0.0, f64::max);
    // With theta 0 a channel differs by the rounding of a difference to f16, which is at most
    // twice the largest key, and by that of a mean. With a window of everything, not at all.
    let channel = if input.policy.contains("theta=0 ") { 2.02 * U16 * widest } else { 0.0 };
    let apart = |query: f64| query * channel * head_dim.sqrt() / head_dim.sqrt();
    let keys = |kv_head| head(&text, text.shape.heads + kv_head);
    let layout = layout(&text);
    let terms = |kv_head: usize| terms(&layout, &found.pages[kv_head]);
    agrees(&text, &found.attention, values, keys, |_, _| true, terms, apart)
}

/// The policy's text with another value of a field that is in it.
fn with_field(policy: &str, name: &str, value: &str) -> String {
    let field = |word: &str| match word.split_once('=') {
        Some((found, _)) if found == name => format!("{name}={value}"),
        _ => word.to_owned(),
    };
    policy.split(' ').map(field).collect::<Vec<_>>().join(" ")
}

fn everything_in_the_window(variety: Variety) -> impl Strategy<Value = Input> {
    inputs(variety, all_formats(variety)).prop_map(|input| {
        let window = input.tokens.to_string();
        let policy = with_field(&with_field(&input.policy, "alpha", "1"), "window", &window);
        Input { policy, ..input }
    })
}

/// The standard deviation of all elements.
fn deviation(keys: &[f64]) -> f64 {
    let mean = keys.iter().sum::<f64>() / keys.len() as f64;
    (keys.iter().map(|k| (k - mean).powi(2)).sum::<f64>() / keys.len() as f64).sqrt()
}

fn within_theta<B: Backend>(backend: &B, input: &Input) -> TestCaseResult {
    let text = input.text();
    let layout = layout(&text);
    let delta = layout.delta().expect("differences");
    let found = attend(backend, &text, &input.steps(), input.phase());
    for (kv_head, pages) in found.pages.iter().enumerate() {
        let keys = head(&text, text.shape.heads + kv_head);
        prop_assert_eq!(pages.len(), input.tokens / layout.tokens);
        for (page, keys) in pages.iter().zip(keys.chunks(layout.tokens * layout.head_dim)) {
            prop_assert_eq!(page.check(&layout), Ok(()));
            let theta = f64::from(page.theta(&layout));
            match delta.threshold {
                Threshold::Absolute(asked) => prop_assert_eq!(theta, f64::from(asked)),
                Threshold::Relative(share) => {
                    let sigma = f64::from(share) * deviation(keys);
                    // f16 keeps 11 digits; squares were summed in f32.
                    let near = (theta - sigma).abs() <= sigma / 2048.0 + 1e-4;
                    prop_assert!(near, "theta {theta} for {sigma}");
                }
            }
            for (i, (found, k)) in page.reconstruct(&layout).iter().zip(keys).enumerate() {
                // Half a level of a kept difference, or its rounding to f16, of at most twice the
                // largest key.
                let half = match delta.deltas {
                    DeltaFormat::F16 => 2.0 * U16 * 8.0,
                    _ => {
                        let word = page.words[layout.scales() + i % layout.head_dim / 2];
                        let bits = (word >> (16 * (i % 2))) as u16;
                        0.501 * f64::from(f16::from_bits(bits).to_f32())
                    }
                };
                let bound = theta.max(half) + 1e-5;
                let error = (f64::from(*found) - k).abs();
                prop_assert!(error <= bound, "element {i}: {found} for {k}, within {bound}");
            }
        }
    }
    Ok(())
}

fn steps<B: Backend>(backend: &B, input: &Input) -> TestCaseResult {
    let text = input.text();
    let found = attend(backend, &text, &input.steps(), input.phase());
    let ones = attend(backend, &text, &vec![1; input.tokens], Phase::Decode);
    let whole = Text { rows: input.tokens, ..text.clone() };
    let whole = attend(backend, &whole, &[input.tokens], Phase::Prefill { length: input.tokens });
    prop_assert_eq!(&found.pages, &ones.pages);
    prop_assert_eq!(&found.pages, &whole.pages);
    prop_assert_eq!(found.image, ones.image);
    Ok(())
}

fn hybrid<B: Backend>(backend: &B, input: &Input) -> TestCaseResult {
    let text = input.text();
    let layout = layout(&text);
    let found = attend(backend, &text, &input.steps(), input.phase());
    let rule = text.policy.rule(input.phase());
    let values = |kv_head| kept_values(&text, &found, kv_head);
    let keys = |kv_head: usize| {
        let mut keys = reconstruction(&layout, &found.pages[kv_head]);
        // Those of the page that is not full are exact in any case.
        keys.resize(input.tokens * layout.head_dim, f64::NAN);
        keys
    };
    let terms = |kv_head: usize| terms(&layout, &found.pages[kv_head]);
    let exact = |query, key| rule.is_exact(query, key);
    agrees(&text, &found.attention, values, keys, exact, terms, |_| 0.0)
}

fn image<B: Backend>(backend: &B, input: &Input) -> TestCaseResult {
    let text = input.text();
    let steps = input.steps();
    let straight = attend(backend, &text, &steps, input.phase());
    let (first, second) = steps.split_at(steps.len() / 2);
    let length = first.iter().sum::<usize>();
    let found = attend_from(backend, &text, None, first, input.phase());
    prop_assert_eq!(found.image.length, length);
    // What is restored and saved again is the same.
    let again = attend_from(backend, &text, Some(&found.image), &[], input.phase());
    prop_assert_eq!(&again.image, &found.image);
    // And what follows is as if nothing had happened, on the reference as well.
    let follows = attend_from(backend, &text, Some(&found.image), second, input.phase());
    prop_assert_eq!(&follows.pages, &straight.pages);
    let reference =
        attend_from(&Reference::new(), &text, Some(&found.image), second, input.phase());
    prop_assert_eq!(&reference.pages, &straight.pages);
    let layout = layout(&text);
    for kv_head in 0..text.shape.kv_heads {
        let AttentionShape { heads, kv_heads, head_dim } = text.shape;
        let key = longest(&head(&text, heads + kv_head), head_dim)
            .max(terms(&layout, &straight.pages[kv_head]));
        let value = 4.0 * largest(&kept_values(&text, &straight, kv_head));
        for index in kv_head * (heads / kv_heads)..(kv_head + 1) * (heads / kv_heads) {
            let query = longest(&head(&text, index), head_dim);
            let tolerance = 2.0 * tolerance(&text, query, key, value);
            for (row, t) in (length..input.tokens).enumerate() {
                for c in index * head_dim..(index + 1) * head_dim {
                    let want = f64::from(straight.attention[t * text.shape.width() + c]);
                    for found in [&follows, &reference] {
                        let got = f64::from(found.attention[row * text.shape.width() + c]);
                        prop_assert!((got - want).abs() <= tolerance, "{got} instead of {want}");
                    }
                }
            }
        }
    }
    Ok(())
}

fn counts<B: Backend>(backend: &B, input: &Input) -> TestCaseResult {
    let text = input.text();
    let layout = layout(&text);
    let found = attend(backend, &text, &input.steps(), input.phase());
    let mut bytes = 0;
    for page in found.pages.iter().flatten() {
        prop_assert_eq!(page.check(&layout), Ok(()));
        prop_assert_eq!(page.bytes(), 4 * page.words.len() as u64);
        prop_assert!(page.words.len() <= layout.max_words());
        bytes += page.bytes();
        let PageLayout { tokens, head_dim, .. } = layout;
        let element = |i: usize| page.is_kept(&layout, i / head_dim, i % head_dim);
        if let KeyFormat::Delta(DeltaKeys { deltas, .. }) = layout.keys {
            let masks = &page.words[layout.masks()..layout.offsets()];
            let kept: u32 = masks.iter().map(|word| word.count_ones()).sum();
            prop_assert_eq!(page.deltas(&layout), kept as usize);
            prop_assert_eq!((0..tokens * head_dim).filter(|&i| element(i)).count(), kept as usize);
            // The paper's cost of an element: a bit of the mask, and what is kept; a page adds its
            // reference, scales, offsets, and three words. Bits are rounded up to words.
            let scales = if deltas == DeltaFormat::F16 { 0 } else { 16 * head_dim };
            let header = 16 * head_dim + scales + 16 * tokens + 96;
            let masks = tokens * head_dim.next_multiple_of(32);
            let bits = header + masks + (kept as usize * deltas.bits()).next_multiple_of(32);
            prop_assert_eq!(8 * page.bytes(), bits as u64);
        }
    }
    prop_assert!(found.key_bytes >= bytes, "{} bytes held of {bytes}", found.key_bytes);
    Ok(())
}

/// Runs all properties, so many cases each.
fn holds<B: Backend>(backend: &B, variety: Variety, cases: u32) {
    let device = backend.device();
    let run =
        |name: &str, strategy: BoxedStrategy<Input>, property: fn(&B, &Input) -> TestCaseResult| {
            let config = Config { cases, failure_persistence: None, ..Config::default() };
            let result = TestRunner::new(config).run(&strategy, |input| property(backend, &input));
            result.unwrap_or_else(|error| {
                panic!("{name} on {} ({}): {error}", device.name, device.driver)
            });
        };
    let exact = deltas(variety, &["0"], &["f16"]);
    let some = deltas(variety, &["0", "0.25", "0.5sigma", "2"], &["f16", "int8", "int4"]);
    run("dense, theta 0", inputs(variety, exact).boxed(), dense);
    run("dense, all in the window", everything_in_the_window(variety).boxed(), dense);
    run("within_theta", inputs(variety, some).boxed(), within_theta);
    run("steps", inputs(variety, all_formats(variety)).boxed(), steps);
    run("hybrid", inputs(variety, all_formats(variety)).boxed(), hybrid);
    run("image", inputs(variety, all_formats(variety)).boxed(), image);
    run("counts", inputs(variety, all_formats(variety)).boxed(), counts);
}

#[test]
fn on_the_reference() {
    holds(&Reference::new(), Variety::Full, 64);
}

#[test]
fn on_the_cpu() {
    for kernels in Kernels::available() {
        holds(
            &Cpu::with_kernels(Some(3), kernels).expect("the kernels are available"),
            Variety::Full,
            48,
        );
    }
}

/// Cases on a GPU.
const GPU_CASES: u32 = 10;

#[test]
fn on_the_gpu_as_the_adapter_offers() {
    holds(&gpu_common::open(gpu_common::any()), Variety::Few, GPU_CASES);
}

#[test]
fn on_the_gpu_on_the_floor() {
    let floor =
        GpuOptions { floor_limits: true, f16: false, subgroups: false, ..gpu_common::any() };
    holds(&gpu_common::open(floor), Variety::Few, GPU_CASES);
}

#[test]
fn on_the_gpu_with_f16_alone() {
    let options = GpuOptions { subgroups: false, ..gpu_common::any() };
    holds(&gpu_common::open(options), Variety::Few, GPU_CASES);
}

#[test]
fn on_the_gpu_with_subgroups_alone() {
    let options = GpuOptions { f16: false, ..gpu_common::any() };
    holds(&gpu_common::open(options), Variety::Few, GPU_CASES);
}

/// Without any device: a score by the running sum of differences is that of the reconstructed key,
/// which is within theta of the key, whatever the difference is from.
#[test]
fn running_sums_are_scores() {
    let strategy = (1..=8usize, 1..60usize, 1..20usize, 0.0..2.0f64, any::<u64>());
    let config = Config { failure_persistence: None, ..Config::default() };
    let property = |(head_dim, tokens, page, theta, seed)| {
        let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim };
        let text = Text {
            shape,
            policy: AttentionPolicy::dense(),
            rows: 1,
            qkv: drifting(seed, shape, tokens),
        };
        let (keys, query) = (head(&text, 1), head(&text, 0)[..head_dim].to_vec());
        let all = [
            plain::delta_keys(&keys, head_dim, theta),
            plain::rounded_delta_keys(&keys, head_dim, theta, |_, d| (16.0 * d).round() / 16.0),
            plain::anchored_delta_keys(&keys, head_dim, page, theta, |_, d| d),
            plain::mean_delta_keys(&keys, head_dim, page, theta, |_, d| d),
        ];
        for found in all {
            let scores = found.scores(&query);
            let rows = found.reconstruction.chunks_exact(head_dim);
            for ((score, found), k) in scores.iter().zip(rows).zip(keys.chunks_exact(head_dim)) {
                let want: f64 = query.iter().zip(found).map(|(q, k)| q * k).sum();
                prop_assert!((score - want).abs() < 1e-11, "{score} instead of {want}");
                let apart = k.iter().zip(found).map(|(k, found)| (k - found).abs());
                prop_assert!(apart.fold(0.0, f64::max) <= theta.max(1.0 / 32.0) + 1e-12);
            }
        }
        Ok(())
    };
    TestRunner::new(config).run(&strategy, property).expect("the property holds");
}
