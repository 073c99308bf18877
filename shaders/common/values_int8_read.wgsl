// Reads values in 8 bits, four elements at a time; the scales of all rows of a segment stand behind
// them. `row` counts the values of a segment.

// Whether `value_scale` has a minimum other than 0.
const VALUE_MINIMA = false;

@group(0) @binding(3) var<storage, read> values: array<u32>;

fn value_levels4(row: u32, d4: u32) -> vec4<f32> {
    return vec4<f32>(unpack4xI8(values[row * DIM4 + d4]));
}

// What levels are multiplied by, and what is added.
fn value_scale(row: u32) -> vec2<f32> {
    return vec2<f32>(unpack2x16float(values[params.value_scales + row]).x, 0.0);
}
