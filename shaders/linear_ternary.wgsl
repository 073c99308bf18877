// out[t, :] = x[t, :] W^T for ternary W and int8 x, for a few tokens: every weight is read once a
// token. A workgroup takes ROWS packed rows, FIELDS times as many outputs, of one token; its
// invocations share out the columns. Grid: (ceil(packed rows / ROWS), T).

struct Params {
    packed_rows: u32,
    count16: u32,    // columns of a padded row of weights and of x, in sixteens
    out_stride: u32, // elements of a padded row of out
}

@group(0) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WORKGROUP)
fn main(lane: Lane, @builtin(workgroup_id) group: vec3<u32>) {
    let token = group.y;
    let first = group.x * ROWS;
    var sums: array<Sums, ROWS>;
    var starts: array<u32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        // Rows past the end repeat the last one and are not written.
        starts[r] = min(first + r, params.packed_rows - 1u) * params.count16;
        sums[r] = Sums();
    }
    for (var i = lane.index; i < params.count16; i += WORKGROUP) {
        let a = x[token * params.count16 + i];
        for (var r = 0u; r < ROWS; r++) {
            let w = weights_of(weights[starts[r] + i]);
            sums[r] = plus_products(sums[r], w, a);
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        let sum = workgroup_sums(sums[r], lane);
        if (lane.index == r && first + r < params.packed_rows) {
            store_fields(first + r, token, sum);
        }
    }
}
