//! Cases of `sample`.

use super::linear::{FLOATS, float_matrix};
use super::{Check, Inputs, U, step};
use crate::backend::{Backend, Input, Operations, Step, TensorFormat};
use crate::delta::Phase;
use crate::error::{Error, Result};
use crate::reference::Reference;
use crate::sampler::{SampleStep, TokenSet};

/// The token chosen from the last of `rows` rows, the others of which would choose another.
fn choose<B: Backend>(
    backend: &B,
    logits: &[f32],
    rows: usize,
    settings: &SampleStep<'_>,
) -> Result<u32> {
    let vocabulary = logits.len();
    let mut tensor = backend.tensor(rows + 1, vocabulary, TensorFormat::F32)?;
    let mut values: Vec<f32> = logits.iter().map(|l| -l).collect::<Vec<f32>>().repeat(rows - 1);
    values.extend(logits);
    backend.write(&mut tensor, &values)?;
    let mut stream = step(backend, rows, vocabulary)?;
    stream.sample(&tensor, settings)?;
    stream.submit()?;
    stream.token()
}

/// Compares the token with the reference's.
///
/// Greedy choices must agree. A drawn one may be any that the reference takes when the draw,
/// `top_p` and `min_p` move by the rounding error of the sums: `n` weights below 1, each within
/// `2 (3 + 2 |x|) u w <= 8 u` of the exact one, and `n u` for adding them up.
fn check<B: Backend>(
    backend: &B,
    case: String,
    logits: &[f32],
    rows: usize,
    settings: &SampleStep<'_>,
) -> Result<Check> {
    let got = choose(backend, logits, rows, settings)?;
    let kept = if settings.top_k == 0 { logits.len() } else { settings.top_k.min(logits.len()) };
    let slack = ((8 + 2 * kept) as f64 * U * 2.0) as f32;
    let moves: &[f32] = if settings.is_greedy() { &[0.0] } else { &[0.0, -1.0, 1.0] };
    let mut pass = false;
    for draw in moves {
        for top_p in moves {
            for min_p in moves {
                let moved = SampleStep {
                    draw: settings.draw + draw * slack,
                    top_p: settings.top_p + top_p * slack,
                    min_p: settings.min_p * (1.0 + min_p * slack),
                    ..*settings
                };
                pass = pass || choose(&Reference::new(), logits, 1, &moved)? == got;
            }
        }
    }
    let error = if pass { 0.0 } else { 1.0 };
    let case = if pass { case } else { format!("{case}: token {got}") };
    Ok(Check { operation: "sample", case, error, tolerance: 0.0, pass })
}

/// The likeliest token, of any text.
fn greedy(none: &TokenSet) -> SampleStep<'_> {
    SampleStep {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seen: none,
        draw: 0.5,
    }
}

/// One choice of each kind, from as many tokens as take two rounds; and NaN among them.
pub(super) fn answers<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut seen = TokenSet::new(1100);
    (0..1100).step_by(3).for_each(|token| seen.insert(token));
    let greedy = SampleStep { repetition_penalty: 1.3, ..greedy(&seen) };
    let drawn = SampleStep { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, ..greedy };
    let mut logits = Inputs::new(109).floats(1100, 10.0);
    let mut checks = Vec::new();
    for (kind, settings) in [("greedy", &greedy), ("drawn", &drawn)] {
        checks.push(check(backend, format!("{kind} of 1100"), &logits, 2, settings)?);
    }
    logits[1033] = f32::NAN;
    checks.push(not_finite(backend, "NaN at 1033 of 1100, greedy".into(), &logits, &greedy)?);
    Ok(checks)
}

pub(super) fn sample<B: Backend>(backend: &B) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut inputs = Inputs::new(10);
    let none = TokenSet::default();
    let greedy = greedy(&none);

    // Ordinary logits, drawn in many ways. Filters alone and together.
    for vocabulary in [1, 7, 33, 1000, 32_003] {
        let logits = inputs.floats(vocabulary, 10.0);
        let name = format!("greedy of {vocabulary}");
        checks.push(check(backend, name, &logits, 2, &greedy)?);
        for (top_k, top_p, min_p) in [
            (1, 1.0, 0.0),
            (2, 1.0, 0.0),
            (40, 1.0, 0.0),
            (40, 0.95, 0.05),
            (256, 0.5, 0.0),
            (256, 1.0, 1.0),
            (256, 1.0, 0.2),
            (0, 1.0, 0.0),
            (0, 0.9, 0.0),
            (40_000, 0.99, 0.01),
        ] {
            let kept = if top_k == 0 { usize::MAX } else { top_k };
            if kept > backend.max_top_k() {
                continue;
            }
            for temperature in [0.05, 0.8, 100.0] {
                for draw in [0.0, inputs.0.draw(), 1.0 - U as f32] {
                    let settings = SampleStep { temperature, top_k, top_p, min_p, draw, ..greedy };
                    let name = format!(
                        "{vocabulary} tokens, temperature {temperature}, top_k {top_k}, \
                         top_p {top_p}, min_p {min_p}, draw {draw}"
                    );
                    checks.push(check(backend, name, &logits, 1, &settings)?);
                }
            }
        }
    }

    checks.extend(ties(backend, &greedy)?);
    checks.extend(penalties(backend, &mut inputs, &greedy)?);
    checks.extend(extremes(backend, &mut inputs, &greedy)?);
    checks.extend(ahead(backend, &greedy)?);
    Ok(checks)
}

/// Equal logits go by id, rising; zero equals minus zero.
fn ties<B: Backend>(backend: &B, greedy: &SampleStep<'_>) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let mut tied = vec![-1.0f32; 1030];
    for id in [1029, 517, 64, 63, 700, 31] {
        tied[id] = 2.0;
    }
    checks.push(check(backend, "greedy among six equals".into(), &tied, 1, greedy)?);
    let mut zeros = vec![-1.0f32; 70];
    zeros[69] = 0.0;
    zeros[40] = -0.0;
    checks.push(check(backend, "greedy, zero and minus zero".into(), &zeros, 1, greedy)?);
    for (name, logits) in [("all equal", vec![0.5f32; 1030]), ("six equals", tied)] {
        for top_k in [2, 3, 40] {
            for i in 0..top_k.min(4) {
                let draw = (i as f32 + 0.5) / top_k as f32;
                let settings = SampleStep { temperature: 1.0, top_k, draw, ..*greedy };
                let name = format!("{name}, top_k {top_k}, draw {draw}");
                checks.push(check(backend, name, &logits, 1, &settings)?);
            }
        }
    }
    Ok(checks)
}

fn penalties<B: Backend>(
    backend: &B,
    inputs: &mut Inputs,
    greedy: &SampleStep<'_>,
) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    for vocabulary in [5, 33, 1000] {
        let mut seen = TokenSet::new(vocabulary);
        for token in (0..vocabulary as u32).step_by(3) {
            seen.insert(token);
        }
        for sign in [1.0, -1.0] {
            // All positive, or all negative.
            let logits: Vec<f32> =
                inputs.floats(vocabulary, 5.0).iter().map(|l| sign * l.abs()).collect();
            for repetition_penalty in [1.5, 0.5] {
                for temperature in [0.0, 0.7] {
                    let settings = SampleStep {
                        temperature,
                        top_k: 40,
                        repetition_penalty,
                        seen: &seen,
                        draw: inputs.0.draw(),
                        ..*greedy
                    };
                    let name = format!(
                        "{vocabulary} tokens of sign {sign}, penalty {repetition_penalty}, \
                         temperature {temperature}"
                    );
                    checks.push(check(backend, name, &logits, 1, &settings)?);
                }
            }
        }
    }
    Ok(checks)
}

/// Logits of any size, and NaN, which must be an error.
fn extremes<B: Backend>(
    backend: &B,
    inputs: &mut Inputs,
    greedy: &SampleStep<'_>,
) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let drawn = SampleStep { temperature: 0.8, top_k: 40, top_p: 0.95, ..*greedy };
    for (name, scale) in [("huge", 1e30), ("tiny", 1e-30), ("zero", 0.0)] {
        let logits = inputs.floats(300, scale);
        for (kind, settings) in [("greedy", greedy), ("drawn", &drawn)] {
            checks.push(check(backend, format!("{name} logits, {kind}"), &logits, 1, settings)?);
        }
    }
    let mut lonely = vec![-1e30f32; 300];
    lonely[299] = 1e30;
    checks.push(check(backend, "one of 1e30 among -1e30".into(), &lonely, 1, &drawn)?);
    for (vocabulary, place) in [(1, 0), (33, 0), (33, 32), (1000, 517)] {
        for (kind, settings) in [("greedy", greedy), ("drawn", &drawn)] {
            let mut logits = inputs.floats(vocabulary, 3.0);
            logits[place] = f32::NAN;
            let case = format!("NaN at {place} of {vocabulary}, {kind}");
            checks.push(not_finite(backend, case, &logits, settings)?);
        }
    }
    Ok(checks)
}

/// Nothing must be chosen from these.
fn not_finite<B: Backend>(
    backend: &B,
    case: String,
    logits: &[f32],
    settings: &SampleStep<'_>,
) -> Result<Check> {
    let pass = matches!(choose(backend, logits, 1, settings), Err(Error::NotFinite { .. }));
    let error = if pass { 0.0 } else { 1.0 };
    Ok(Check { operation: "sample", case, error, tolerance: 0.0, pass })
}

/// A text of a tiny model, each step on the token that the one before it sampled: with the host
/// between the steps, on which every token is given, and without, one step ahead of it.
fn text<B: Backend>(backend: &B, given: bool, settings: &SampleStep<'_>) -> Result<Vec<u32>> {
    let (vocabulary, hidden, steps) = (300, 32, 24);
    let mut inputs = Inputs::new(11);
    let table = float_matrix(&mut inputs, vocabulary, hidden, FLOATS[0]);
    let head = float_matrix(&mut inputs, vocabulary, hidden, FLOATS[0]);
    let (table, head) = (backend.linear(&[table])?, backend.linear(&[head])?);
    let mut x = backend.tensor(1, hidden, TensorFormat::F32)?;
    let mut logits = backend.tensor(1, vocabulary, TensorFormat::F32)?;
    let mut stream = step(backend, 1, vocabulary)?;
    let mut seen = TokenSet::new(vocabulary);
    seen.insert(7);
    let mut tokens = vec![7];
    for at in 0..steps {
        let last = tokens[tokens.len() - 1..].to_vec();
        let input = if given || at == 0 { Input::Tokens(&last) } else { Input::Sampled };
        stream.begin(&Step { input, position: 0, phase: Phase::Decode })?;
        stream.embed(&table, &mut x)?;
        stream.linear(&x, &head, &mut logits)?;
        stream.sample(&logits, &SampleStep { seen: &seen, draw: inputs.0.draw(), ..*settings })?;
        stream.submit()?;
        if given || at > 0 {
            tokens.push(stream.token()?);
            seen.insert(tokens[tokens.len() - 1]);
        }
    }
    if !given {
        tokens.push(stream.token()?);
    }
    Ok(tokens)
}

fn ahead<B: Backend>(backend: &B, greedy: &SampleStep<'_>) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    let drawn = SampleStep { temperature: 0.8, top_k: 40, top_p: 0.95, ..*greedy };
    for (kind, settings) in [("greedy", greedy), ("drawn", &drawn)] {
        for repetition_penalty in [1.0, 1.6] {
            let settings = SampleStep { repetition_penalty, ..*settings };
            let want = text(&Reference::new(), true, &settings)?;
            for given in [true, false] {
                let pass = text(backend, given, &settings)? == want;
                let how = if given { "given" } else { "sampled" };
                let case = format!("a text on {how} tokens, {kind}, penalty {repetition_penalty}");
                let error = if pass { 0.0 } else { 1.0 };
                checks.push(Check { operation: "sample", case, error, tolerance: 0.0, pass });
            }
        }
    }
    Ok(checks)
}
