// out[t, :] = x[t, :] W^T for ternary W and int8 x, for a few tokens: every weight is read once a
// token. A workgroup takes two packed rows, eight outputs, of one token; its invocations share out
// the columns. Grid: (ceil(packed rows / 2), T).

struct Params {
    packed_rows: u32,
    count16: u32,    // columns of a padded row of weights and of x, in sixteens
    out_stride: u32, // elements of a padded row of out
}

@group(0) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WORKGROUP)
fn main(lane: Lane, @builtin(workgroup_id) group: vec3<u32>) {
    let token = group.y;
    let row0 = group.x * 2u;
    let row1 = min(row0 + 1u, params.packed_rows - 1u);
    var sums0 = vec4<i32>();
    var sums1 = vec4<i32>();
    for (var i = lane.index; i < params.count16; i += WORKGROUP) {
        let a = x[token * params.count16 + i];
        sums0 += dot_fields(weights[row0 * params.count16 + i], a);
        sums1 += dot_fields(weights[row1 * params.count16 + i], a);
    }
    sums0 = workgroup_sum_vec4i(sums0, lane);
    sums1 = workgroup_sum_vec4i(sums1, lane);
    if (lane.index == 0u) {
        store_fields(row0, token, sums0);
    }
    if (lane.index == 1u && row1 != row0) {
        store_fields(row1, token, sums1);
    }
}
