// RMSNorm after the gate; `root` is the row's root mean square.

const NORM: u32 = 1u;

@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;

fn normalise(v: vec4<f32>, i: u32) -> vec4<f32> {
    return weight[i] * (v / root);
}
