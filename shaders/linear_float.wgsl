// out[t, :] = x[t, :] W^T for float W, for a few tokens: every weight is read once a token. A
// workgroup takes QUADS times four rows of one block of W and one token; its invocations share out
// the columns. Grid: (ceil(rows / (4 QUADS)), T).

struct Params {
    rows: u32,          // rows of the block
    first: u32,         // column of out of the block's first row
    chunks: u32,        // chunks of eight columns in a padded row of x
    weight_chunks: u32, // likewise of W
    out_stride: u32,    // elements of a padded row of out
    tokens: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

fn dot8(w: Eight, a: vec4<f32>, b: vec4<f32>) -> f32 {
    return dot(w.a, a) + dot(w.b, b);
}

@compute @workgroup_size(WORKGROUP)
fn main(lane: Lane, @builtin(workgroup_id) group: vec3<u32>) {
    let token = group.y;
    let first = group.x * 4u * QUADS;
    var sums: array<vec4<f32>, QUADS>;
    var starts: array<vec4<u32>, QUADS>;
    for (var quad = 0u; quad < QUADS; quad++) {
        // Rows past the end repeat the last one and are not written.
        let rows = vec4<u32>(first + 4u * quad) + vec4<u32>(0u, 1u, 2u, 3u);
        starts[quad] = min(rows, vec4<u32>(params.rows - 1u)) * params.weight_chunks;
        sums[quad] = vec4<f32>();
    }
    for (var i = lane.index; i < params.chunks; i += WORKGROUP) {
        let at = (token * params.chunks + i) * 2u;
        let a = x[at];
        let b = x[at + 1u];
        for (var quad = 0u; quad < QUADS; quad++) {
            let start = starts[quad];
            sums[quad] += vec4<f32>(
                dot8(weights8(start.x + i), a, b),
                dot8(weights8(start.y + i), a, b),
                dot8(weights8(start.z + i), a, b),
                dot8(weights8(start.w + i), a, b),
            );
        }
    }
    for (var quad = 0u; quad < QUADS; quad++) {
        let sum = workgroup_sum_vec4f(sums[quad], lane);
        let row = first + 4u * quad + lane.index;
        if (lane.index < 4u && row < params.rows) {
            let at = token * params.out_stride + params.first + row;
            let value = sum[lane.index];
            if (ACCUMULATE == 1u) {
                out[at] += value;
            } else {
                out[at] = value;
            }
        }
    }
}
