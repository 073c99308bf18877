//! How numbers become levels, with the same outcome on every device.

/// The whole number nearest to `x / scale`, ties to even; 0 where the scale is 0.
///
/// GPUs divide with errors of an ULP or two, and keys in f16 make exact ties common. The quotient
/// therefore only proposes: a level times a scale in f16 is exact in `f32`, and so is the
/// difference from `x` where they are as near as here; these decide.
pub(super) fn nearest_level(x: f32, scale: f32) -> f32 {
    if scale <= 0.0 {
        return 0.0;
    }
    let guess = (x * (1.0 / scale)).round_ties_even();
    let (rest, half, odd) = (x - guess * scale, 0.5 * scale, guess % 2.0 != 0.0);
    if rest > half || (rest == half && odd) {
        guess + 1.0
    } else if rest < -half || (rest == -half && odd) {
        guess - 1.0
    } else {
        guess
    }
}

#[cfg(test)]
mod tests {
    use super::nearest_level;

    #[test]
    fn ties_go_to_even() {
        for (x, scale, level) in [
            (0.0, 0.0, 0.0),
            (3.0, 0.0, 0.0),
            (0.5, 1.0, 0.0),
            (1.5, 1.0, 2.0),
            (-0.5, 1.0, 0.0),
            (-1.5, 1.0, -2.0),
            (2.5, 1.0, 2.0),
            (0.75, 0.5, 2.0),
            (0.751, 0.5, 2.0),
            (0.749, 0.5, 1.0),
            (-63.5 * 0.1875, 0.1875, -64.0),
        ] {
            assert_eq!(nearest_level(x, scale), level, "{x} / {scale}");
        }
    }
}
