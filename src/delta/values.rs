//! Values to bytes and back: the arithmetic that every device repeats.
//!
//! A value is never compared with its neighbours: each token and KV head stands alone, and is
//! encoded when it is appended. A row of the cache is one value of a head, `[D]`:
//!
//! | format | bytes |
//! |---|---|
//! | `Plain` | `D` floats in [`AttentionPolicy::exact`](super::AttentionPolicy::exact) |
//! | `Int8` | `D` levels, `i8`; scale, f16. `v ~ level * scale` |
//! | `Int4` | `ceil(D / 2)` bytes of two levels, the lower half first; scale and minimum, f16. `v ~ level * scale + minimum` |
//!
//! Numbers are little-endian. Scales and minima are rounded before levels are chosen, and a level
//! times a scale is exact in `f32`.

use half::f16;

use super::level::nearest_level;
use super::policy::ValueFormat;
use crate::formats::CacheFormat;

/// The largest level of [`ValueFormat::Int8`].
const INT8_TOP: f32 = 127.0;
/// The largest level of [`ValueFormat::Int4`].
const INT4_TOP: f32 = 15.0;

/// Appends the bytes of one value `row` `[D]` to `out`: as many as
/// [`AttentionPolicy::value_row_bytes`](super::AttentionPolicy::value_row_bytes).
///
/// - `Int8`: `scale = f16(max |v| * (1 / 127))`,
///   `level = clamp(round_half_even(v / scale), -127, 127)`.
/// - `Int4`: `minimum = f16(min v)`, `scale = f16((max v - minimum) * (1 / 15))`,
///   `level = clamp(round_half_even((v - minimum) / scale), 0, 15)`.
///
/// Levels are 0 where the scale is. A row that is not finite has NaN as its scale, and so all of it
/// is NaN when it is read: nothing that a model did wrong becomes a number again.
pub fn encode_value(format: ValueFormat, exact: CacheFormat, row: &[f32], out: &mut Vec<u8>) {
    let finite = row.iter().all(|v| v.is_finite());
    let scaled = |scale: f32| if finite { f16::from_f32(scale) } else { f16::NAN };
    match format {
        ValueFormat::Plain => match exact {
            CacheFormat::F32 => out.extend(row.iter().flat_map(|v| v.to_le_bytes())),
            CacheFormat::F16 => {
                out.extend(row.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()));
            }
        },
        ValueFormat::Int8 => {
            let largest = row.iter().fold(0.0f32, |max, v| max.max(v.abs()));
            let scale = scaled(largest * (1.0 / INT8_TOP));
            out.extend(row.iter().map(|&v| {
                let level = nearest_level(v, scale.to_f32()).clamp(-INT8_TOP, INT8_TOP);
                level as i8 as u8
            }));
            out.extend(scale.to_le_bytes());
        }
        ValueFormat::Int4 => {
            let lowest = row.iter().copied().fold(f32::INFINITY, f32::min);
            let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let minimum = f16::from_f32(lowest);
            let scale = scaled((highest - minimum.to_f32()) * (1.0 / INT4_TOP));
            let level = |v: &f32| {
                let level = nearest_level(v - minimum.to_f32(), scale.to_f32());
                level.clamp(0.0, INT4_TOP) as u8
            };
            out.extend(row.chunks(2).map(|pair| {
                let upper = pair.get(1).map_or(0, level);
                level(&pair[0]) | upper << 4
            }));
            out.extend(scale.to_le_bytes());
            out.extend(minimum.to_le_bytes());
        }
    }
}

/// The value `out` `[D]` that `bytes`, one row of the cache, stand for.
///
/// # Panics
/// Where `bytes` is not such a row.
pub fn decode_value(format: ValueFormat, exact: CacheFormat, bytes: &[u8], out: &mut [f32]) {
    let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
    match (format, exact) {
        (ValueFormat::Plain, CacheFormat::F32) => {
            for (v, bytes) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *v = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
        }
        (ValueFormat::Plain, CacheFormat::F16) => {
            for (channel, v) in out.iter_mut().enumerate() {
                *v = half(2 * channel);
            }
        }
        (ValueFormat::Int8, _) => {
            let scale = half(out.len());
            for (v, &level) in out.iter_mut().zip(bytes) {
                *v = f32::from(level as i8) * scale;
            }
        }
        (ValueFormat::Int4, _) => {
            let levels = out.len().div_ceil(2);
            let (scale, minimum) = (half(levels), half(levels + 2));
            for (channel, v) in out.iter_mut().enumerate() {
                let level = bytes[channel / 2] >> (4 * (channel % 2)) & 15;
                *v = f32::from(level) * scale + minimum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::AttentionPolicy;
    use crate::sampler::Draws;

    fn round_trip(format: ValueFormat, row: &[f32]) -> Vec<f32> {
        let mut bytes = Vec::new();
        encode_value(format, CacheFormat::F16, row, &mut bytes);
        let policy = AttentionPolicy { values: format, ..AttentionPolicy::dense() };
        assert_eq!(bytes.len(), policy.value_row_bytes(row.len()));
        let mut found = vec![f32::NAN; row.len()];
        decode_value(format, CacheFormat::F16, &bytes, &mut found);
        found
    }

    #[test]
    fn values_by_hand() {
        let mut bytes = Vec::new();
        // The scale is 1: levels are the values, ties to even.
        encode_value(ValueFormat::Int8, CacheFormat::F16, &[-127.0, 2.5, 3.5], &mut bytes);
        assert_eq!(bytes, [0x81, 2, 4, 0x00, 0x3c]);
        bytes.clear();
        // Minimum 1, scale 2; an odd row leaves the last upper half at 0.
        encode_value(ValueFormat::Int4, CacheFormat::F16, &[31.0, 1.0, 5.0], &mut bytes);
        assert_eq!(bytes, [0x0f, 0x02, 0x00, 0x40, 0x00, 0x3c]);
        assert_eq!(round_trip(ValueFormat::Int4, &[31.0, 1.0, 5.0]), [31.0, 1.0, 5.0]);
        for format in [ValueFormat::Plain, ValueFormat::Int8, ValueFormat::Int4] {
            assert_eq!(round_trip(format, &[0.0; 4]), [0.0; 4]);
            // All alike: Int4 has a scale of 0 and keeps the minimum.
            if format != ValueFormat::Int8 {
                assert_eq!(round_trip(format, &[3.0; 4]), [3.0; 4]);
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for format in [ValueFormat::Int8, ValueFormat::Int4] {
                let found = round_trip(format, &[1.0, broken, 0.0]);
                assert!(found.iter().all(|v| v.is_nan()), "{format:?}, {broken}: {found:?}");
            }
        }
    }

    #[test]
    fn values_are_within_half_a_level() {
        let mut draws = Draws::new(3);
        for head_dim in [1, 2, 33, 80, 128] {
            for scale in [1e-3, 1.0, 1e4] {
                let row: Vec<f32> = (0..head_dim).map(|_| scale * (draws.draw() - 0.3)).collect();
                let largest = row.iter().fold(0.0f32, |max, v| max.max(v.abs()));
                let lowest = row.iter().copied().fold(f32::INFINITY, f32::min);
                let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                for (format, half_level) in [
                    (ValueFormat::Plain, 0.0),
                    (ValueFormat::Int8, largest / INT8_TOP / 2.0),
                    (ValueFormat::Int4, (highest - lowest) / INT4_TOP / 2.0),
                ] {
                    // Scales and minima are rounded to f16, and cut what lies beyond the last level;
                    // tiny ones are subnormal there.
                    let bound = half_level + (largest + highest - lowest) / 1024.0 + 1e-6;
                    for (v, found) in row.iter().zip(round_trip(format, &row)) {
                        assert!((v - found).abs() <= bound, "{format:?}: {found} for {v}");
                    }
                }
            }
        }
    }
}
