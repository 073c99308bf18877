// Reads cached keys and values in f16, four elements at a time.
// Index: (kv head * context + position) * DIM4 + element / 4.

@group(0) @binding(2) var<storage, read> keys: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read> values: array<vec2<u32>>;

fn key4(at: u32) -> vec4<f32> {
    let word = keys[at];
    return vec4<f32>(unpack2x16float(word.x), unpack2x16float(word.y));
}

fn value4(at: u32) -> vec4<f32> {
    let word = values[at];
    return vec4<f32>(unpack2x16float(word.x), unpack2x16float(word.y));
}
