// A float matrix on the device, eight weights of a row at a time.

struct Eight {
    a: vec4<f32>,
    b: vec4<f32>,
}

@group(0) @binding(1) var<storage, read> weights: array<Eight>;

fn weights8(chunk: u32) -> Eight {
    return weights[chunk];
}
