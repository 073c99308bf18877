// out[t, :] = act(gate) * up, where gate and up are the halves of row t of gate_up; then RMSNorm
// where NORM is 1; in f32 or quantised. One workgroup a row. Grid: (T).

struct Params {
    width: u32,    // elements of a row of out: half a row of gate_up
    stride: u32,   // elements of a padded row of gate_up
    count4: u32,   // elements of a padded row of out, in fours
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;

var<private> root: f32;

fn activate(g: vec4<f32>) -> vec4<f32> {
    if (SILU == 1u) {
        return g / (1.0 + exp(-g));
    }
    let positive = max(g, vec4<f32>());
    return positive * positive;
}

// Elements 4 i to 4 i + 3 of act(gate) * up; zero in the padding.
fn product4(row: u32, i: u32) -> vec4<f32> {
    if (4u * i >= params.width) {
        return vec4<f32>();
    }
    return activate(gate4(row, i)) * up4(row, i);
}

// Elements 4 i to 4 i + 3 of a row of the result.
fn element4(row: u32, i: u32) -> vec4<f32> {
    return normalise(product4(row, i), i);
}

@compute @workgroup_size(WORKGROUP)
fn main(lane: Lane, @builtin(workgroup_id) group: vec3<u32>) {
    let row = group.x;
    if (NORM == 1u) {
        var squares = 0.0;
        for (var i = lane.index; i < params.count4; i += WORKGROUP) {
            let v = product4(row, i);
            squares += dot(v, v);
        }
        squares = workgroup_sum_f32(squares, lane);
        root = square_root(divide(squares, f32(params.width)) + params.eps);
    }
    finish_row(row, params.count4, lane);
}
