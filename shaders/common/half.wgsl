// The nearest f16, ties to even: drivers are free to round `pack2x16float` either way, so it only
// ever sees numbers that need no rounding.
fn nearest_f16(x: f32) -> f32 {
    if (abs(x) < 6.103515625e-5) {
        // Subnormal in f16: multiples of 2^-24.
        return round(x * 16777216.0) * 5.9604644775390625e-8;
    }
    let bits = bitcast<u32>(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) {
        return x;
    }
    return bitcast<f32>((bits + 0xfffu + ((bits >> 13u) & 1u)) & 0xffffe000u);
}

fn pack_pair(pair: vec2<f32>) -> u32 {
    return pack2x16float(vec2<f32>(nearest_f16(pair.x), nearest_f16(pair.y)));
}
