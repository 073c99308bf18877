// A 4-bit matrix on the device, eight weights of a row at a time: one word, the first column in its
// lowest bits. Rows are padded to 64 columns, so that a row has an even number of scales and chunk
// `c` has scale `c / 4` over the whole matrix; the scales of padding are zero.

struct Eight {
    a: vec4<f32>,
    b: vec4<f32>,
}

@group(0) @binding(1) var<storage, read> weights: array<u32>;
// Two f16 a word.
@group(0) @binding(4) var<storage, read> scales: array<u32>;

fn weights8(chunk: u32) -> Eight {
    let w = vec4<u32>(weights[chunk]);
    let pair = unpack2x16float(scales[chunk / 8u]);
    let scale = select(pair.x, pair.y, (chunk & 4u) != 0u);
    let a = (w >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(15u);
    let b = (w >> vec4<u32>(16u, 20u, 24u, 28u)) & vec4<u32>(15u);
    return Eight((vec4<f32>(a) - 8.0) * scale, (vec4<f32>(b) - 8.0) * scale);
}
