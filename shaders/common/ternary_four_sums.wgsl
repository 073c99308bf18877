// Sums of a packed row over a workgroup; needs a snippet `reduce_*.wgsl`.
fn workgroup_sums(sums: Sums, lane: Lane) -> Sums {
    return workgroup_sum_vec4i(sums, lane);
}
