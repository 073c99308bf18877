// Scores of a page of keys, read as it is compressed, except for the keys that the query sees
// exactly. A tile is a page; several invocations share a key. The format of pages defines
// `prepare_page`, after which all invocations see what it leaves, and `page_part`.

const LANES = WORKGROUP / TILE;
// Where the parts of approximate and of exact scores lie in `parts`; before them lies what
// `prepare_page` leaves, [channel].
const APPROXIMATE = 256u;
const EXACT = 384u;

// Running sums over the tokens of the page: a token's reference is the key before it.
fn page_prefix(value: vec4<f32>, lane: Lane) -> vec4<f32> {
    workgroupBarrier();
    if (lane.index < TILE) {
        parts[APPROXIMATE + lane.index] = value;
    }
    workgroupBarrier();
    if (lane.index < TILE / 8u) {
        let first = APPROXIMATE + 8u * lane.index;
        for (var i = 1u; i < 8u; i++) {
            parts[first + i] += parts[first + i - 1u];
        }
    }
    workgroupBarrier();
    var sum = vec4<f32>();
    if (lane.index < TILE) {
        sum = parts[APPROXIMATE + lane.index];
        for (var group = 0u; group < lane.index / 8u; group++) {
            sum += parts[APPROXIMATE + 8u * group + 7u];
        }
    }
    return sum;
}

// The scores of four heads with key `tile + lane`, for lanes below `count`; the queries are in
// `q_tile`. Every invocation must call it.
fn tile_scores(kv_head: u32, tile: u32, count: u32, query: u32, lane: Lane) -> vec4<f32> {
    let key = lane.index / LANES;
    let share = lane.index % LANES;
    let start = exact_start(query);
    let any_approximate = tile < start && tile + TILE > params.sink;
    let any_exact = tile < params.sink || tile + count > start;

    var base = vec4<f32>();
    if (any_approximate) {
        let header = page_header(kv_head, tile / TILE);
        base = prepare_page(header, lane);
        parts[APPROXIMATE + lane.index] = page_part(header, key, share);
    }
    if (any_exact) {
        var part = vec4<f32>();
        if (key < count && is_exact(tile + key, start)) {
            let row = key_row(kv_head, tile + key);
            for (var d = share; d < DIM4; d += LANES) {
                part += scores4(d, key4(row * DIM4 + d));
            }
        }
        parts[EXACT + lane.index] = part;
    }
    workgroupBarrier();

    var score = vec4<f32>();
    if (any_approximate) {
        if (lane.index < TILE) {
            for (var i = 0u; i < LANES; i++) {
                score += parts[APPROXIMATE + lane.index * LANES + i];
            }
        }
        if (CHAIN == 1u) {
            score = page_prefix(score, lane);
        }
        score += base;
    }
    if (lane.index < count && is_exact(tile + lane.index, start)) {
        score = vec4<f32>();
        for (var i = 0u; i < LANES; i++) {
            score += parts[EXACT + lane.index * LANES + i];
        }
    }
    return score;
}
