// Reads gate and up four elements at a time, for any width: the last four may be fewer.

@group(0) @binding(1) var<storage, read> gate_up: array<f32>;

fn gate4(row: u32, i: u32) -> vec4<f32> {
    return half4(row * params.stride, i);
}

fn up4(row: u32, i: u32) -> vec4<f32> {
    return half4(row * params.stride + params.width, i);
}

fn half4(start: u32, i: u32) -> vec4<f32> {
    var v = vec4<f32>();
    for (var c = 0u; c < min(4u, params.width - 4u * i); c++) {
        v[c] = gate_up[start + 4u * i + c];
    }
    return v;
}
