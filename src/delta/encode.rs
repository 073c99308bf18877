//! Keys to a compressed page: the arithmetic that every device repeats, to the bit.
//!
//! All sums run in `f32` in the order of the tokens, and where a product is added to something it
//! is exact, so that a device that fuses multiplication and addition gives the same bits. A threshold
//! in standard deviations also takes divisions and a root, which WGSL does not promise to the last
//! bit: shaders correct them, and the threshold is rounded to f16, which hides what is left.

use half::f16;

use super::level::nearest_level;
use super::page::{Page, PageLayout};
use super::policy::{ChannelBits, DeltaKeys, KeyFormat, Reference, Threshold};

/// Rounds to f16 and back: to nearest, ties to even.
fn halve(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

/// Encodes `keys` `[C, D]`.
///
/// `previous` is for [`Reference::Continuous`]: the last reconstructed key of the page before,
/// `[D]`; `None` for the first page of a text, whose chain begins with its first key. Other
/// references do not look at it.
///
/// Deltas, for each channel with `k` its key and `r` its reference (Algorithm 1 of the paper):
/// `d = k - r`; it is kept where `|d| > theta` and its rounded value is not zero; a chain's `r`
/// then moves by the rounded value.
///
/// Scales of integer deltas are the largest `|d| / Q` of the channel, `Q` 127 or 7. In a chain `d`
/// depends on the rounding before; it cannot exceed the largest step from key to key plus `theta`
/// or half a scale, so that `(step + theta) / Q` is enough and no level is ever cut.
///
/// # Panics
/// Where `keys` is not `[C, D]`, or `previous` not `[D]`.
pub fn encode_page(layout: &PageLayout, keys: &[f32], previous: Option<&[f32]>) -> Page {
    assert_eq!(keys.len(), layout.tokens * layout.head_dim, "keys of a page");
    let words = match layout.keys {
        KeyFormat::Plain => Vec::new(),
        KeyFormat::Int8 => int8(layout, keys),
        KeyFormat::Channel(bits) => channel(layout, keys, bits),
        KeyFormat::Delta(delta) => deltas(layout, keys, previous, delta),
    };
    Page { words: words.into() }
}

/// Puts `field` `[bits]` at `index` of an array that begins at word `at`.
fn put(words: &mut [u32], at: usize, index: usize, bits: usize, field: u32) {
    let bit = index * bits;
    words[at + bit / 32] |= (field & (u32::MAX >> (32 - bits))) << (bit % 32);
}

fn put_half(words: &mut [u32], at: usize, index: usize, x: f32) {
    put(words, at, index, 16, u32::from(f16::from_f32(x).to_bits()));
}

/// Symmetric: the scale is the token's largest magnitude over 127.
fn int8(layout: &PageLayout, keys: &[f32]) -> Vec<u32> {
    let mut words = vec![0; layout.header_words()];
    for (token, row) in keys.chunks_exact(layout.head_dim).enumerate() {
        let largest = row.iter().fold(0.0f32, |max, k| max.max(k.abs()));
        let scale = halve(largest * (1.0 / 127.0));
        put_half(&mut words, layout.scales(), token, scale);
        let at = layout.levels() + token * layout.level_words();
        for (channel, k) in row.iter().enumerate() {
            let level = nearest_level(*k, scale).clamp(-127.0, 127.0);
            put(&mut words, at, channel, 8, level as i32 as u32);
        }
    }
    words
}

/// Asymmetric: the levels of a channel span the range of its keys in the page.
fn channel(layout: &PageLayout, keys: &[f32], bits: ChannelBits) -> Vec<u32> {
    let mut words = vec![0; layout.header_words()];
    let top = ((1 << bits.bits()) - 1) as f32;
    for channel in 0..layout.head_dim {
        let column = || keys.iter().skip(channel).step_by(layout.head_dim);
        let lowest = column().copied().fold(f32::INFINITY, f32::min);
        let highest = column().copied().fold(f32::NEG_INFINITY, f32::max);
        let minimum = halve(lowest);
        let scale = halve((highest - minimum) * (1.0 / top));
        put_half(&mut words, 0, 2 * channel, scale);
        put_half(&mut words, 0, 2 * channel + 1, minimum);
        for (token, k) in column().enumerate() {
            let level = nearest_level(k - minimum, scale).clamp(0.0, top);
            let at = layout.levels() + token * layout.level_words();
            put(&mut words, at, channel, bits.bits(), level as u32);
        }
    }
    words
}

fn deltas(
    layout: &PageLayout,
    keys: &[f32],
    previous: Option<&[f32]>,
    delta: DeltaKeys,
) -> Vec<u32> {
    let PageLayout { tokens, head_dim, .. } = *layout;
    let theta = match delta.threshold {
        Threshold::Absolute(theta) => theta,
        Threshold::Relative(share) => halve(share * deviation(keys, head_dim)),
    };
    // What each channel adds to its reference at each token, as a field of its format; nothing
    // where it is not kept.
    let mut kept = vec![None; tokens * head_dim];
    let mut words = vec![0; layout.header_words()];
    for channel in 0..head_dim {
        let column = || keys.iter().skip(channel).step_by(head_dim).copied();
        let first = keys[channel];
        let reference = halve(match (delta.reference, previous) {
            (Reference::Mean, _) => column().sum::<f32>() * (1.0 / tokens as f32),
            (Reference::Continuous, Some(previous)) => previous[channel],
            _ => first,
        });
        put_half(&mut words, 0, channel, reference);

        let scale = delta.deltas.levels().map(|top| {
            let top = top as f32;
            halve(match delta.reference {
                Reference::Mean => {
                    let beyond = column().map(|k| (k - reference).abs()).filter(|d| *d > theta);
                    beyond.fold(0.0, f32::max) * (1.0 / top)
                }
                Reference::Continuous | Reference::Anchored => {
                    let before = std::iter::once(reference).chain(column());
                    let steps = column().zip(before).map(|(k, before)| (k - before).abs());
                    // Rounding to f16 must not make it smaller.
                    (steps.fold(0.0, f32::max) + theta) * (1.001 / top)
                }
            })
        });
        if let Some(scale) = scale {
            put_half(&mut words, layout.scales(), channel, scale);
        }

        let mut r = reference;
        for (token, k) in column().enumerate() {
            let d = k - r;
            if d.abs() <= theta || d.is_nan() {
                continue;
            }
            let (field, rounded) = match (scale, delta.deltas.levels()) {
                (Some(scale), Some(top)) => {
                    let top = top as f32;
                    let level = nearest_level(d, scale).clamp(-top, top);
                    (level as i32 as u32, level * scale)
                }
                _ => (u32::from(f16::from_f32(d).to_bits()), halve(d)),
            };
            if rounded == 0.0 {
                continue;
            }
            kept[token * head_dim + channel] = Some(field);
            if delta.reference != Reference::Mean {
                r += rounded;
            }
        }
    }

    let total = kept.iter().flatten().count();
    words.resize(layout.header_words() + layout.delta_words(total), 0);
    let mut next = 0;
    for (token, row) in kept.chunks_exact(head_dim).enumerate() {
        put(&mut words, layout.offsets(), token, 16, next as u32);
        for (channel, field) in row.iter().enumerate() {
            if let Some(field) = field {
                let mask = layout.masks() + token * layout.mask_words();
                put(&mut words, mask, channel, 1, 1);
                put(&mut words, layout.header_words(), next, delta.deltas.bits(), *field);
                next += 1;
            }
        }
    }
    words[layout.total()] = total as u32;
    words[layout.total() + 1] = theta.to_bits();
    words
}

/// The standard deviation of all elements of `keys` `[C, D]`, which are rounded to f16.
///
/// Sums run down each channel, then over the channels. Squares of numbers in f16 are exact in
/// `f32`: nothing depends on whether a device fuses a multiplication with an addition.
fn deviation(keys: &[f32], head_dim: usize) -> f32 {
    let (mut sum, mut squares) = (0.0f32, 0.0f32);
    for channel in 0..head_dim {
        let (mut column_sum, mut column_squares) = (0.0f32, 0.0f32);
        for k in keys.iter().skip(channel).step_by(head_dim).map(|&k| halve(k)) {
            column_sum += k;
            column_squares += k * k;
        }
        sum += column_sum;
        squares += column_squares;
    }
    let count = keys.len() as f32;
    // The mean in two parts of half its digits each, whose products are exact.
    let mean = sum / count;
    let high = f32::from_bits(mean.to_bits() & 0xffff_f000);
    let low = mean - high;
    let variance = squares / count - high * high - 2.0 * high * low - low * low;
    variance.max(0.0).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::policy::AttentionPolicy;
    use crate::sampler::Draws;

    /// Keys `[C, D]` that drift from token to token, with a mean and an outlier for some channels.
    fn drifting(layout: &PageLayout, seed: u64) -> Vec<f32> {
        let mut draws = Draws::new(seed);
        let mut now: Vec<f32> =
            (0..layout.head_dim).map(|c| [0.0, 3.0, -8.0][c % 3] + draws.draw() - 0.5).collect();
        let mut keys = Vec::new();
        for _ in 0..layout.tokens {
            for k in &mut now {
                *k = halve(*k + 0.5 * (draws.draw() - 0.5));
            }
            keys.extend_from_slice(&now);
        }
        keys
    }

    #[test]
    fn every_channel_is_within_theta_or_half_a_level() {
        for head_dim in [2, 32, 80, 128] {
            for page in [16, 64] {
                for theta in ["0", "0.1", "0.4sigma"] {
                    for reference in ["continuous", "anchored", "mean"] {
                        for deltas in ["f16", "int8", "int4"] {
                            let text = format!(
                                "delta theta={theta} reference={reference} deltas={deltas} page={page}"
                            );
                            let policy: AttentionPolicy = text.parse().expect(&text);
                            let layout = PageLayout::new(&policy, head_dim).expect("fits");
                            within(&layout.expect("compressed"), &format!("{text} D={head_dim}"));
                        }
                    }
                }
            }
        }
    }

    fn within(layout: &PageLayout, case: &str) {
        let delta = layout.delta().expect("deltas");
        let mut previous: Option<Vec<f32>> = None;
        for seed in 0..3 {
            let keys = drifting(layout, seed);
            let page = encode_page(layout, &keys, previous.as_deref());
            page.check(layout).expect(case);
            let found = page.reconstruct(layout);
            let theta = page.theta(layout);
            for (i, (k, found)) in keys.iter().zip(&found).enumerate() {
                let channel = i % layout.head_dim;
                let half_level = match delta.deltas.levels() {
                    Some(_) => 0.5 * page_scale(&page, layout, channel),
                    None => k.abs().max(8.0) / 2048.0,
                };
                let bound = 1.001 * theta.max(half_level) + k.abs() / 2048.0;
                assert!((k - found).abs() <= bound, "{case}: element {i}: {found} for {k}");
            }
            previous = Some(found[found.len() - layout.head_dim..].to_vec());
        }
    }

    fn page_scale(page: &Page, layout: &PageLayout, channel: usize) -> f32 {
        let word = page.words[layout.scales() + channel / 2];
        f16::from_bits((word >> (16 * (channel % 2))) as u16).to_f32()
    }

    #[test]
    fn quantised_keys_are_within_half_a_level() {
        for text in ["keys=int8", "keys=channel4", "keys=channel2"] {
            let policy: AttentionPolicy = text.parse().expect(text);
            for head_dim in [2, 80, 128] {
                let layout = PageLayout::new(&policy, head_dim).expect("fits").expect("compressed");
                let keys = drifting(&layout, 1);
                let page = encode_page(&layout, &keys, None);
                page.check(&layout).expect(text);
                let found = page.reconstruct(&layout);
                for (i, (k, found)) in keys.iter().zip(found).enumerate() {
                    let (token, channel) = (i / head_dim, i % head_dim);
                    let row = &keys[token * head_dim..][..head_dim];
                    let largest = row.iter().fold(0.0f32, |max, k| max.max(k.abs()));
                    let column = keys.iter().skip(channel).step_by(head_dim);
                    let lowest = column.clone().copied().fold(f32::INFINITY, f32::min);
                    let highest = column.copied().fold(f32::NEG_INFINITY, f32::max);
                    let half_level = match text {
                        "keys=int8" => largest / 127.0 / 2.0,
                        "keys=channel4" => (highest - lowest) / 15.0 / 2.0,
                        _ => (highest - lowest) / 3.0 / 2.0,
                    };
                    // Scale and minimum are rounded to f16.
                    let bound = half_level + (highest - lowest + largest) / 1024.0;
                    assert!((k - found).abs() <= bound, "{text}: {found} for {k}");
                }
            }
        }
    }

    /// Worked by hand, after Algorithm 1: theta 1, one channel and its neighbour.
    #[test]
    fn a_chain_by_hand() {
        let text = "delta theta=1 reference=continuous deltas=f16 page=16";
        let policy: AttentionPolicy = text.parse().expect(text);
        let layout = PageLayout::new(&policy, 2).expect("fits").expect("compressed");
        let mut keys = vec![0.0; 32];
        for (token, k) in [2.0, 2.5, 3.0, 3.5, 3.5, 1.0].into_iter().enumerate() {
            keys[2 * token] = k;
        }
        let page = encode_page(&layout, &keys, None);
        let found: Vec<f32> = page.reconstruct(&layout).into_iter().step_by(2).collect();
        // 3.0 is exactly theta from 2.0 and is not kept; 3.5 is, and so are 1.0 and its return to 0:
        // 1.0 away and not kept either.
        assert_eq!(found[..8], [2.0, 2.0, 2.0, 3.5, 3.5, 1.0, 1.0, 1.0]);
        assert_eq!(page.deltas(&layout), 2);
    }
}
