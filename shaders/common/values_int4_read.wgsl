// Reads values in 4 bits, four elements at a time; scale and minimum of all rows of a segment stand
// behind them. `row` counts the values of a segment.

// Whether `value_scale` has a minimum other than 0.
const VALUE_MINIMA = true;

@group(0) @binding(3) var<storage, read> values: array<u32>;

fn value_levels4(row: u32, d4: u32) -> vec4<f32> {
    let word = values[row * ((DIM4 + 1u) / 2u) + d4 / 2u] >> (16u * (d4 % 2u));
    return vec4<f32>((vec4<u32>(word) >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(15u));
}

// What levels are multiplied by, and what is added.
fn value_scale(row: u32) -> vec2<f32> {
    return unpack2x16float(values[params.value_scales + row]);
}
