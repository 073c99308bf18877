// Writes original keys in f32, two elements at a time.
// Index: (row * padded head + element) / 2.

@group(0) @binding(3) var<storage, read_write> keys: array<vec2<f32>>;

fn store_key2(at: u32, pair: vec2<f32>) {
    keys[at] = pair;
}
