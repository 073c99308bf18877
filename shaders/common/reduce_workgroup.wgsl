// Sums and maxima over the whole workgroup, by a tree in workgroup memory: needs no feature.
// Every invocation must call them, and every invocation gets the result.

struct Lane {
    @builtin(local_invocation_index) index: u32,
}

var<workgroup> tree_u32: array<u32, WORKGROUP>;
var<workgroup> tree_i32: array<i32, WORKGROUP>;
var<workgroup> tree_f32: array<f32, WORKGROUP>;
var<workgroup> tree_vec4i: array<vec4<i32>, WORKGROUP>;
var<workgroup> tree_vec4f: array<vec4<f32>, WORKGROUP>;

fn workgroup_max_u32(value: u32, lane: Lane) -> u32 {
    // The result of an earlier call may still be being read.
    workgroupBarrier();
    tree_u32[lane.index] = value;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane.index < half) {
            tree_u32[lane.index] = max(tree_u32[lane.index], tree_u32[lane.index + half]);
        }
    }
    workgroupBarrier();
    return tree_u32[0];
}

fn workgroup_sum_i32(value: i32, lane: Lane) -> i32 {
    workgroupBarrier();
    tree_i32[lane.index] = value;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane.index < half) {
            tree_i32[lane.index] += tree_i32[lane.index + half];
        }
    }
    workgroupBarrier();
    return tree_i32[0];
}

fn workgroup_sum_f32(value: f32, lane: Lane) -> f32 {
    workgroupBarrier();
    tree_f32[lane.index] = value;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane.index < half) {
            tree_f32[lane.index] += tree_f32[lane.index + half];
        }
    }
    workgroupBarrier();
    return tree_f32[0];
}

fn workgroup_sum_vec4i(value: vec4<i32>, lane: Lane) -> vec4<i32> {
    workgroupBarrier();
    tree_vec4i[lane.index] = value;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane.index < half) {
            tree_vec4i[lane.index] += tree_vec4i[lane.index + half];
        }
    }
    workgroupBarrier();
    return tree_vec4i[0];
}

fn workgroup_sum_vec4f(value: vec4<f32>, lane: Lane) -> vec4<f32> {
    workgroupBarrier();
    tree_vec4f[lane.index] = value;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane.index < half) {
            tree_vec4f[lane.index] += tree_vec4f[lane.index + half];
        }
    }
    workgroupBarrier();
    return tree_vec4f[0];
}

fn workgroup_max_vec4f(value: vec4<f32>, lane: Lane) -> vec4<f32> {
    workgroupBarrier();
    tree_vec4f[lane.index] = value;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane.index < half) {
            tree_vec4f[lane.index] = max(tree_vec4f[lane.index], tree_vec4f[lane.index + half]);
        }
    }
    workgroupBarrier();
    return tree_vec4f[0];
}
