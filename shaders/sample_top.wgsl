// The best `keep` candidates of each block of 1024, in order, by a bitonic sort of the block.
// Grid: (ceil(count / 1024)).

struct Params {
    count: u32,   // candidates
    first: u32,   // index of the first logit
    penalty: f32, // repetition penalty
    keep: u32,    // at most 256
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read_write> kept: array<vec2<u32>>;

var<workgroup> block: array<vec2<u32>, 1024>;

@compute @workgroup_size(256)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    for (var i = lane; i < 1024u; i += 256u) {
        block[i] = candidate(group.x * 1024u + i);
    }
    for (var size = 2u; size <= 1024u; size *= 2u) {
        for (var distance = size / 2u; distance > 0u; distance /= 2u) {
            workgroupBarrier();
            for (var pair = lane; pair < 512u; pair += 256u) {
                let low = pair / distance * distance * 2u + pair % distance;
                let high = low + distance;
                let a = block[low];
                let b = block[high];
                // Runs of `size` are sorted in turn forwards and backwards.
                let forwards = (low & size) == 0u;
                if (before(b, a) == forwards) {
                    block[low] = b;
                    block[high] = a;
                }
            }
        }
    }
    workgroupBarrier();
    if (lane < params.keep) {
        kept[group.x * params.keep + lane] = block[lane];
    }
}
