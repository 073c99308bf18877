// Reads values in f16, four elements at a time. `row` counts the values of a segment.

// Whether `value_scale` has a minimum other than 0.
const VALUE_MINIMA = false;

@group(0) @binding(3) var<storage, read> values: array<vec2<u32>>;

fn value_levels4(row: u32, d4: u32) -> vec4<f32> {
    let word = values[row * DIM4 + d4];
    return vec4<f32>(unpack2x16float(word.x), unpack2x16float(word.y));
}

// What levels are multiplied by, and what is added.
fn value_scale(row: u32) -> vec2<f32> {
    return vec2<f32>(1.0, 0.0);
}
