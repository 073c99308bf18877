// An f16 matrix on the device, eight weights of a row at a time, on devices with f16. Sums stay f32.

struct Eight {
    a: vec4<f32>,
    b: vec4<f32>,
}

struct EightF16 {
    a: vec4<f16>,
    b: vec4<f16>,
}

@group(0) @binding(1) var<storage, read> weights: array<EightF16>;

fn weights8(chunk: u32) -> Eight {
    let w = weights[chunk];
    return Eight(vec4<f32>(w.a), vec4<f32>(w.b));
}
