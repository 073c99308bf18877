// out[t, :] = act(gate) * up, where gate and up are the halves of row t of gate_up; then RMSNorm
// where NORM is 1; in f32 or quantised. One workgroup a row. Grid: (T).

struct Params {
    width: u32,    // elements of a row of out: half a row of gate_up
    stride: u32,   // elements of a padded row of gate_up
    count4: u32,   // elements of a padded row of out, in fours
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> gate_up: array<f32>;

var<private> root: f32;

fn activate(g: f32) -> f32 {
    if (SILU == 1u) {
        return g / (1.0 + exp(-g));
    }
    let positive = max(g, 0.0);
    return positive * positive;
}

// One element of act(gate) * up; zero in the padding.
fn product(row: u32, i: u32) -> f32 {
    if (i >= params.width) {
        return 0.0;
    }
    let at = row * params.stride + i;
    return activate(gate_up[at]) * gate_up[at + params.width];
}

fn product4(row: u32, i: u32) -> vec4<f32> {
    let first = 4u * i;
    return vec4<f32>(
        product(row, first),
        product(row, first + 1u),
        product(row, first + 2u),
        product(row, first + 3u),
    );
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
