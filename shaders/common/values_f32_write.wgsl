// Writes values in f32, two elements at a time.
// Index: (row * padded head + element) / 2.

@group(0) @binding(4) var<storage, read_write> values: array<vec2<f32>>;

fn store_value2(at: u32, pair: vec2<f32>) {
    values[at] = pair;
}
