// Reads queries and writes results four elements at a time, for heads of a multiple of four.
// `start` is where the head starts in `qkv` or `out`; `d4` counts fours of its elements, below DIM4.

@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> out: array<vec4<f32>>;

fn load_query4(start: u32, d4: u32) -> vec4<f32> {
    return qkv[start / 4u + d4];
}

fn load_out4(start: u32, d4: u32) -> vec4<f32> {
    return out[start / 4u + d4];
}

fn store_out4(start: u32, d4: u32, v: vec4<f32>) {
    out[start / 4u + d4] = v;
}
