// The best candidate of each block of 1024. Grid: (ceil(count / 1024)).

struct Params {
    count: u32,   // candidates
    first: u32,   // index of the first logit
    penalty: f32, // repetition penalty
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read_write> kept: array<vec2<u32>>;

var<workgroup> best: array<vec2<u32>, 256>;

@compute @workgroup_size(256)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let start = group.x * 1024u + lane;
    var mine = candidate(start);
    for (var i = 1u; i < 4u; i++) {
        let other = candidate(start + i * 256u);
        if (before(other, mine)) {
            mine = other;
        }
    }
    best[lane] = mine;
    for (var half = 128u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane < half) {
            let other = best[lane + half];
            if (before(other, best[lane])) {
                best[lane] = other;
            }
        }
    }
    if (lane == 0u) {
        kept[group.x] = best[0];
    }
}
