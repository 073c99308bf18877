//! The choice of a token; the rule is that of [`SampleStep`].

use crate::sampler::SampleStep;

/// Logits that are looked at together; a word of [`crate::sampler::TokenSet`].
const GROUP: usize = 32;

/// The token, or nothing where a logit is NaN or the best is infinite. `candidates` is kept between
/// calls for its memory.
pub(super) fn sample(
    logits: &[f32],
    step: &SampleStep<'_>,
    candidates: &mut Vec<u64>,
) -> Option<u32> {
    let top_k = match (step.is_greedy(), step.top_k) {
        (true, _) => 1,
        (false, 0) => logits.len(),
        (false, top_k) => top_k.min(logits.len()),
    };
    largest(logits, step, top_k, candidates)?;
    candidates.sort_unstable();
    let first = logit(*candidates.first()?);
    if !first.is_finite() {
        return None;
    }
    if step.is_greedy() {
        return candidates.first().map(|&key| token(key));
    }
    let weight = |&key: &u64| ((logit(key) - first) / step.temperature).exp();
    let mut weights: Vec<f32> = candidates.iter().map(weight).collect();
    let total: f32 = weights.iter().sum();
    // Falling weights: a prefix, and the first weight is 1.
    let probable = weights.partition_point(|&w| w >= step.min_p).max(1);
    weights.truncate(probable);
    if let Some(last) = prefix_sum(&weights, |sum| sum >= step.top_p * total) {
        weights.truncate(last + 1);
    }
    let left: f32 = weights.iter().sum();
    let chosen = prefix_sum(&weights, |sum| sum > step.draw * left).unwrap_or(weights.len() - 1);
    candidates.get(chosen).map(|&key| token(key))
}

/// The first index whose prefix sum, itself included, fulfils `condition`.
fn prefix_sum(weights: &[f32], condition: impl Fn(f32) -> bool) -> Option<usize> {
    let mut sum = 0.0f32;
    weights.iter().position(|w| {
        sum += w;
        condition(sum)
    })
}

/// Collects the keys of the `count` best candidates, in no order; nothing where a logit is NaN.
///
/// Few logits pass a threshold that rises: it is the worst of the best so far, found anew each time
/// that many have come together.
fn largest(logits: &[f32], step: &SampleStep<'_>, count: usize, keys: &mut Vec<u64>) -> Option<()> {
    let full = 2 * count + 1024;
    let mut threshold = f32::NEG_INFINITY;
    let mut settled = false;
    keys.clear();
    for (group, logits) in logits.chunks(GROUP).enumerate() {
        if logits.iter().fold(false, |nan, l| nan | l.is_nan()) {
            return None;
        }
        let seen = match step.repetition_penalty {
            1.0 => 0,
            _ => step.seen.words().get(group).copied().unwrap_or(0),
        };
        // Without a penalty no logit grows.
        if settled && seen == 0 && !logits.iter().fold(false, |any, &l| any | (l > threshold)) {
            continue;
        }
        for (i, &logit) in logits.iter().enumerate() {
            let logit = match (seen >> i & 1, logit > 0.0) {
                (0, _) => logit,
                (_, true) => logit / step.repetition_penalty,
                (_, false) => logit * step.repetition_penalty,
            };
            // Of equal logits the earlier stays.
            if !settled || logit > threshold {
                keys.push(key(logit, (group * GROUP + i) as u32));
            }
        }
        if keys.len() >= full {
            let (_, &mut worst, _) = keys.select_nth_unstable(count - 1);
            keys.truncate(count);
            threshold = self::logit(worst);
            settled = true;
        }
    }
    if keys.len() > count {
        keys.select_nth_unstable(count - 1);
        keys.truncate(count);
    }
    Some(())
}

/// A number that rises as candidates get worse: by logit, falling, then by id, rising.
fn key(logit: f32, token: u32) -> u64 {
    // Adding zero makes minus zero zero, which it equals.
    let bits = (logit + 0.0).to_bits();
    // Rises with the logit.
    let order = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!order) << 32 | u64::from(token)
}

fn logit(key: u64) -> f32 {
    let order = !((key >> 32) as u32);
    f32::from_bits(if order >> 31 == 1 { order & !(1 << 31) } else { !order })
}

fn token(key: u64) -> u32 {
    key as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_logits_and_give_them_back() {
        let falling = [f32::INFINITY, 1e30, 1.0, 1e-30, 0.0, -1e-30, -2.0, f32::NEG_INFINITY];
        for pair in falling.windows(2) {
            assert!(key(pair[0], 9) < key(pair[1], 3), "{pair:?}");
            assert_eq!(logit(key(pair[0], 9)), pair[0]);
        }
        assert!(key(1.0, 3) < key(1.0, 4));
        assert_eq!(key(0.0, 3), key(-0.0, 3));
        assert_eq!(token(key(1.0, 77)), 77);
    }
}
