// Writes original keys in f16, two elements at a time, one word, so
// that no two invocations write to the same one.
// Index: (row * padded head + element) / 2.

@group(0) @binding(3) var<storage, read_write> keys: array<u32>;

fn store_key2(at: u32, pair: vec2<f32>) {
    keys[at] = pack_pair(pair);
}
