// An f16 matrix on the device, eight weights of a row at a time, on devices without f16.

struct Eight {
    a: vec4<f32>,
    b: vec4<f32>,
}

@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>;

fn weights8(chunk: u32) -> Eight {
    let w = weights[chunk];
    return Eight(
        vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y)),
        vec4<f32>(unpack2x16float(w.z), unpack2x16float(w.w)),
    );
}
