// Products of what is in registers, and nothing else: how fast the device multiplies. It is no operation
// of a model; its twin on the CPU is src/cpu/multiply_speed.rs. An invocation makes 8 vectors of sums
// 256 times, each of four products of floats, or of four packed bytes for each of its lanes.
// Grid: (workgroups).

@group(0) @binding(1) var<storage, read> factors: array<vec4<u32>>; // two
@group(0) @binding(2) var<storage, read_write> sums: array<u32>;    // one an invocation

const REPEATS = 256u;

@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
    let at = group.x * 64u + lane;
    if (BYTES == 1u) {
        sums[at] = bytes(factors[0], factors[1]);
    } else {
        sums[at] = bitcast<u32>(floats(bitcast<vec4<f32>>(factors[0]), bitcast<vec4<f32>>(factors[1])));
    }
}

// x = 1/2 x + 1, again and again: 2 in the end.
fn floats(half: vec4<f32>, one: vec4<f32>) -> f32 {
    var a = one;
    var b = one * 2.0;
    var c = one * 3.0;
    var d = one * 4.0;
    var e = one * 5.0;
    var f = one * 6.0;
    var g = one * 7.0;
    var h = one * 8.0;
    for (var i = 0u; i < REPEATS; i++) {
        a = fma(a, half, one);
        b = fma(b, half, one);
        c = fma(c, half, one);
        d = fma(d, half, one);
        e = fma(e, half, one);
        f = fma(f, half, one);
        g = fma(g, half, one);
        h = fma(h, half, one);
    }
    let sum = (a + b + c + d) + (e + f + g + h);
    return sum.x + sum.y + sum.z + sum.w;
}

// Sums that are factors of what comes next, so that none can be worked out beforehand; only the lowest
// bits count.
fn bytes(start: vec4<u32>, factor: vec4<u32>) -> u32 {
    var a = start;
    var b = start + 1u;
    var c = start + 2u;
    var d = start + 3u;
    var e = start + 4u;
    var f = start + 5u;
    var g = start + 6u;
    var h = start + 7u;
    for (var i = 0u; i < REPEATS; i++) {
        a = dots(a, factor);
        b = dots(b, factor);
        c = dots(c, factor);
        d = dots(d, factor);
        e = dots(e, factor);
        f = dots(f, factor);
        g = dots(g, factor);
        h = dots(h, factor);
    }
    let sum = (a + b + c + d) + (e + f + g + h);
    return sum.x + sum.y + sum.z + sum.w;
}

fn dots(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
    return a + bitcast<vec4<u32>>(vec4<i32>(dot4(a.x, b.x), dot4(a.y, b.y), dot4(a.z, b.z), dot4(a.w, b.w)));
}
