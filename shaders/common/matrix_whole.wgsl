// Activations for a matrix unit that multiplies f32: as they are.

const PARTS = 1u;

fn begin(first_token: u32, lane: u32) {}

fn put_x(token: u32, to: u32, a: vec4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        x_tile[to + i] = Element(a[i]);
    }
}

fn result(token: u32, at: u32) -> f32 {
    return results[at];
}
