// An 8-bit matrix on the device, eight weights of a row at a time. Rows are padded to 64 columns, so
// that a row has an even number of scales and chunk `c` has scale `c / 4` over the whole matrix.

struct Eight {
    a: vec4<f32>,
    b: vec4<f32>,
}

@group(0) @binding(1) var<storage, read> weights: array<vec2<u32>>;
// Two f16 a word.
@group(0) @binding(4) var<storage, read> scales: array<u32>;

fn weights8(chunk: u32) -> Eight {
    let w = weights[chunk];
    let pair = unpack2x16float(scales[chunk / 8u]);
    let scale = select(pair.x, pair.y, (chunk & 4u) != 0u);
    return Eight(
        vec4<f32>(unpack4xI8(w.x)) * scale,
        vec4<f32>(unpack4xI8(w.y)) * scale,
    );
}
