// A bf16 matrix on the device, eight weights of a row at a time: bf16 is the upper half of an f32.

struct Eight {
    a: vec4<f32>,
    b: vec4<f32>,
}

@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>;

fn weights8(chunk: u32) -> Eight {
    let w = weights[chunk];
    let even = bitcast<vec4<f32>>(w << vec4<u32>(16u));
    let odd = bitcast<vec4<f32>>(w & vec4<u32>(0xffff0000u));
    return Eight(
        vec4<f32>(even.x, odd.x, even.y, odd.y),
        vec4<f32>(even.z, odd.z, even.w, odd.w),
    );
}
