// Reads queries and writes results four elements at a time, for heads of any width: the last four
// may be fewer.
// `start` is where the head starts in `qkv` or `out`; `d4` counts fours of its elements, below DIM4.

@group(0) @binding(1) var<storage, read> qkv: array<f32>;
@group(0) @binding(5) var<storage, read_write> out: array<f32>;

fn load_query4(start: u32, d4: u32) -> vec4<f32> {
    var q = vec4<f32>();
    for (var c = 0u; c < min(4u, HEAD_DIM - 4u * d4); c++) {
        q[c] = qkv[start + 4u * d4 + c];
    }
    return q;
}

fn load_out4(start: u32, d4: u32) -> vec4<f32> {
    var v = vec4<f32>();
    for (var c = 0u; c < min(4u, HEAD_DIM - 4u * d4); c++) {
        v[c] = out[start + 4u * d4 + c];
    }
    return v;
}

fn store_out4(start: u32, d4: u32, v: vec4<f32>) {
    for (var c = 0u; c < min(4u, HEAD_DIM - 4u * d4); c++) {
        out[start + 4u * d4 + c] = v[c];
    }
}
