// Candidates of a token, from the lists that an earlier round has left: (key, id).

@group(0) @binding(1) var<storage, read> list: array<vec2<u32>>;

fn candidate(i: u32) -> vec2<u32> {
    if (i >= params.count) {
        return vec2<u32>(0u, 0xffffffffu);
    }
    return list[i];
}
