// Sums and maxima over the whole workgroup: first within each subgroup, then over the subgroups'
// results in workgroup memory. Every invocation must call them, and every invocation gets the
// result. A subgroup may be of any size from one invocation to the workgroup; where it is all of
// it, no barrier is needed, nor made: these functions do not order what their callers write to
// workgroup memory.

struct Lane {
    @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_invocation_id) within: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
}

var<workgroup> part_u32: array<u32, WORKGROUP>;
var<workgroup> part_i32: array<i32, WORKGROUP>;
var<workgroup> part_f32: array<f32, WORKGROUP>;
var<workgroup> part_vec4i: array<vec4<i32>, WORKGROUP>;
var<workgroup> part_vec4f: array<vec4<f32>, WORKGROUP>;

fn workgroup_max_u32(value: u32, lane: Lane) -> u32 {
    var result = subgroupMax(value);
    if (lane.subgroups == 1u) {
        return result;
    }
    // The result of an earlier call may still be being read.
    workgroupBarrier();
    if (lane.within == 0u) {
        part_u32[lane.subgroup] = result;
    }
    workgroupBarrier();
    for (var i = 0u; i < lane.subgroups; i++) {
        result = max(result, part_u32[i]);
    }
    return result;
}

fn workgroup_sum_i32(value: i32, lane: Lane) -> i32 {
    let part = subgroupAdd(value);
    if (lane.subgroups == 1u) {
        return part;
    }
    workgroupBarrier();
    if (lane.within == 0u) {
        part_i32[lane.subgroup] = part;
    }
    workgroupBarrier();
    var result = 0;
    for (var i = 0u; i < lane.subgroups; i++) {
        result += part_i32[i];
    }
    return result;
}

fn workgroup_sum_f32(value: f32, lane: Lane) -> f32 {
    let part = subgroupAdd(value);
    if (lane.subgroups == 1u) {
        return part;
    }
    workgroupBarrier();
    if (lane.within == 0u) {
        part_f32[lane.subgroup] = part;
    }
    workgroupBarrier();
    var result = 0.0;
    for (var i = 0u; i < lane.subgroups; i++) {
        result += part_f32[i];
    }
    return result;
}

fn workgroup_sum_vec4i(value: vec4<i32>, lane: Lane) -> vec4<i32> {
    let part = subgroupAdd(value);
    if (lane.subgroups == 1u) {
        return part;
    }
    workgroupBarrier();
    if (lane.within == 0u) {
        part_vec4i[lane.subgroup] = part;
    }
    workgroupBarrier();
    var result = vec4<i32>();
    for (var i = 0u; i < lane.subgroups; i++) {
        result += part_vec4i[i];
    }
    return result;
}

fn workgroup_sum_vec4f(value: vec4<f32>, lane: Lane) -> vec4<f32> {
    let part = subgroupAdd(value);
    if (lane.subgroups == 1u) {
        return part;
    }
    workgroupBarrier();
    if (lane.within == 0u) {
        part_vec4f[lane.subgroup] = part;
    }
    workgroupBarrier();
    var result = vec4<f32>();
    for (var i = 0u; i < lane.subgroups; i++) {
        result += part_vec4f[i];
    }
    return result;
}

fn workgroup_max_vec4f(value: vec4<f32>, lane: Lane) -> vec4<f32> {
    var result = subgroupMax(value);
    if (lane.subgroups == 1u) {
        return result;
    }
    workgroupBarrier();
    if (lane.within == 0u) {
        part_vec4f[lane.subgroup] = result;
    }
    workgroupBarrier();
    for (var i = 0u; i < lane.subgroups; i++) {
        result = max(result, part_vec4f[i]);
    }
    return result;
}
