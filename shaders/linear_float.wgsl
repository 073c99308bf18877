// out[t, :] = x[t, :] W^T for float W, for a few tokens: every weight is read once a token. A
// workgroup takes four rows of one block of W and one token; its invocations share out the columns.
// Grid: (ceil(rows / 4), T).

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
    let first = group.x * 4u;
    // Rows past the end repeat the last one and are not written.
    let rows = min(vec4<u32>(first) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(params.rows - 1u));
    let start = rows * params.weight_chunks;
    var sums = vec4<f32>();
    for (var i = lane.index; i < params.chunks; i += WORKGROUP) {
        let at = (token * params.chunks + i) * 2u;
        let a = x[at];
        let b = x[at + 1u];
        sums += vec4<f32>(
            dot8(weights8(start.x + i), a, b),
            dot8(weights8(start.y + i), a, b),
            dot8(weights8(start.z + i), a, b),
            dot8(weights8(start.w + i), a, b),
        );
    }
    sums = workgroup_sum_vec4f(sums, lane);
    if (lane.index < 4u && first + lane.index < params.rows) {
        let at = token * params.out_stride + params.first + first + lane.index;
        let value = sums[lane.index];
        if (ACCUMULATE == 1u) {
            out[at] += value;
        } else {
            out[at] = value;
        }
    }
}
