// Scores of a tile of keys that are as they are: eight invocations a key.

// The scores of four heads with key `tile + lane`, for lanes below `count`; the queries are in
// `q_tile`. Every invocation must call it.
fn tile_scores(kv_head: u32, tile: u32, count: u32, query: u32, lane: Lane) -> vec4<f32> {
    let row = key_row(kv_head, tile);
    let eighth = lane.index % 8u;
    for (var k = lane.index / 8u; k < count; k += WORKGROUP / 8u) {
        var part = vec4<f32>();
        for (var d = eighth; d < DIM4; d += 8u) {
            part += scores4(d, key4((row + k) * DIM4 + d));
        }
        parts[k * 8u + eighth] = part;
    }
    workgroupBarrier();
    var score = vec4<f32>();
    if (lane.index < count) {
        for (var i = 0u; i < 8u; i++) {
            score += parts[lane.index * 8u + i];
        }
    }
    return score;
}
