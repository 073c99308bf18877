// Joins the partial results that attention leaves for the spans of the keys.
// An invocation makes four elements of a head. Grid: (H, T).

struct Params {
    out_stride: u32, // elements of a padded row of out
    heads: u32,
    spans: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
// A row is (T, span, head): DIM4 vectors of sums, then (maximum, sum of weights, -, -).
@group(0) @binding(4) var<storage, read> partials: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) workgroup: vec3<u32>,
) {
    let head = workgroup.x;
    let token = workgroup.y;
    let first = token * params.spans * params.heads + head;
    var highest = -3.0e38f;
    for (var s = 0u; s < params.spans; s++) {
        let at = (first + s * params.heads) * (DIM4 + 1u);
        highest = max(highest, partials[at + DIM4].x);
    }
    for (var d4 = lane; d4 < DIM4; d4 += 64u) {
        var sum = vec4<f32>();
        var total = 0.0;
        for (var s = 0u; s < params.spans; s++) {
            let at = (first + s * params.heads) * (DIM4 + 1u);
            let state = partials[at + DIM4];
            let weight = exp(state.x - highest);
            sum += weight * partials[at + d4];
            total += weight * state.y;
        }
        store_out4(token * params.out_stride + head * HEAD_DIM, d4, sum / total);
    }
}
