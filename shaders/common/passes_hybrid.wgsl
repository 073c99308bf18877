// Keys that are exact for some queries and approximate for others: in a first pass what the former
// see, in a second what the latter do.

const PASSES = 2u;

// What compressed pages stand for, [KV head][key][element / 4].
@group(0) @binding(6) var<storage, read> expanded: array<vec4<f32>>;

fn window_start(query: u32) -> u32 {
    return exact_start(query);
}

// Whether the tile of keys `first..end` has any that some query sees exactly, or approximately;
// the queries' windows start from `first_start` to `last_start`.
fn tile_has(exact: bool, first: u32, end: u32, first_start: u32, last_start: u32) -> bool {
    return select(
        first < last_start && end > params.sink,
        first < params.sink || end > first_start,
        exact,
    );
}

// For which keys a query whose window begins at `start` takes the scores of the pass.
fn takes(exact: bool, keys: vec4<u32>, start: u32) -> vec4<bool> {
    let is_exact = (keys < vec4<u32>(params.sink)) | (keys >= vec4<u32>(start));
    return is_exact == vec4<bool>(exact);
}

fn key4_as(exact: bool, kv_head: u32, position: u32, d4: u32) -> vec4<f32> {
    if (exact) {
        return key4(key_row(kv_head, position) * DIM4 + d4);
    }
    let row = kv_head * params.expanded_stride + position - params.expanded_first;
    return expanded[row * DIM4 + d4];
}
