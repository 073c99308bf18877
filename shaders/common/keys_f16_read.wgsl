// Reads original keys in f16, four elements at a time. Index: row * DIM4 + element / 4.

@group(0) @binding(2) var<storage, read> keys: array<vec2<u32>>;

fn key4(at: u32) -> vec4<f32> {
    let word = keys[at];
    return vec4<f32>(unpack2x16float(word.x), unpack2x16float(word.y));
}
