// RMSNorm: out[t, :] = weight * (x[first + t, :] / sqrt(mean(x[first + t, :]^2) + eps)), in f32 or
// quantised. One workgroup a row. Grid: (rows).

struct Params {
    first: u32,  // first row of x
    width: u32,  // elements of a row
    count4: u32, // elements of a padded row, in fours
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;

var<private> root: f32;

// Elements 4 i to 4 i + 3 of a row of the result.
fn element4(row: u32, i: u32) -> vec4<f32> {
    return weight[i] * (x[(params.first + row) * params.count4 + i] / root);
}

@compute @workgroup_size(WORKGROUP)
fn main(lane: Lane, @builtin(workgroup_id) group: vec3<u32>) {
    let row = group.x;
    var squares = 0.0;
    for (var i = lane.index; i < params.count4; i += WORKGROUP) {
        let v = x[(params.first + row) * params.count4 + i];
        squares += dot(v, v);
    }
    squares = workgroup_sum_f32(squares, lane);
    root = square_root(divide(squares, f32(params.width)) + params.eps);
    finish_row(row, params.count4, lane);
}
