// Sums of a packed row over a workgroup; needs a snippet `reduce_*.wgsl`.
fn workgroup_sums(sums: Sums, lane: Lane) -> Sums {
    return Sums(workgroup_sum_vec4i(sums.first, lane), workgroup_sum_i32(sums.last, lane));
}
