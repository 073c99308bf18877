// sums[i] = the sum of the words that invocation i reads, and nothing else: how fast the device reads.
// It is no operation of a model, and its twin on the CPU is the loop of src/cpu/read_speed.rs.
// One workgroup reads 64 KiB. Grid: (pieces of 64 KiB).

@group(0) @binding(1) var<storage, read> data: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> sums: array<u32>;

@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
    var sum = vec4<u32>();
    for (var i = 0u; i < 64u; i++) {
        sum += data[(group.x * 64u + i) * 64u + lane];
    }
    sums[group.x * 64u + lane] = sum.x + sum.y + sum.z + sum.w;
}
