// No norm after the gate.

const NORM: u32 = 0u;

fn normalise(v: vec4<f32>, i: u32) -> vec4<f32> {
    return v;
}
