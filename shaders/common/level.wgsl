// The whole number nearest to x / scale, ties to even; 0 where the scale is 0. The quotient only
// proposes, since it has an error; what decides is exact: see src/delta/level.rs.
fn nearest_level(x: f32, scale: f32) -> f32 {
    if (scale <= 0.0) {
        return 0.0;
    }
    let guess = round(x / scale);
    let rest = x - guess * scale;
    let half = 0.5 * scale;
    let odd = (i32(guess) & 1) == 1;
    if (rest > half || (rest == half && odd)) {
        return guess + 1.0;
    }
    if (rest < -half || (rest == -half && odd)) {
        return guess - 1.0;
    }
    return guess;
}
