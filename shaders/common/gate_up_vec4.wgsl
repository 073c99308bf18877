// Reads gate and up four elements at a time, for widths of a multiple of four.

@group(0) @binding(1) var<storage, read> gate_up: array<vec4<f32>>;

fn gate4(row: u32, i: u32) -> vec4<f32> {
    return gate_up[row * (params.stride / 4u) + i];
}

fn up4(row: u32, i: u32) -> vec4<f32> {
    return gate_up[row * (params.stride / 4u) + params.width / 4u + i];
}
