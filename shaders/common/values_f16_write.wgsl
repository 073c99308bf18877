// Writes values in f16, two elements at a time, one word, so
// that no two invocations write to the same one.
// Index: (row * padded head + element) / 2.

@group(0) @binding(4) var<storage, read_write> values: array<u32>;

fn store_value2(at: u32, pair: vec2<f32>) {
    values[at] = pack_pair(pair);
}
