// Causal attention over the cache for many tokens. The tokens and the query heads of one KV head
// form one list of queries, query = token * group + head in group; a workgroup takes 32 of them
// and walks over the keys, 32 at a time, with online softmax.
//
// Where keys are compressed, a tile has keys that are exact for some queries and approximate for
// others: then both scores are made and each query takes its own. `key4_as` reads either.
//
// One dispatch takes the keys from `start` to `stop`; a long context takes several, between which the
// sums wait in `out` and the softmax's state in `states`. Workgroup memory holds 32 elements of
// each head at a time. Grid: (ceil(T H / G / 32), G).

struct Params {
    position: u32,     // of the step's first token
    qkv_stride: u32,   // elements of a padded row of qkv
    out_stride: u32,   // elements of a padded row of out
    tokens: u32,
    group: u32,        // query heads of a KV head
    start: u32,        // first key of this dispatch
    stop: u32,         // the key after the last
    resume: u32,       // 1 after the first dispatch
    last: u32,         // 1 in the last dispatch
    vectors: u32,      // fours of elements in a slice: min(8, DIM4)
    scale: f32,        // 1 / sqrt(D)
    key_first: u32,    // of the segment of plain keys: its first position
    key_stride: u32,   // and its tokens a KV head
    value_first: u32,  // the same of the segment of values
    value_stride: u32,
    value_scales: u32, // word at which the scales of quantised values begin
    sink: u32,         // keys that are exact for all queries
    recent: u32,       // slots of recent keys
    window_kind: u32,
    window: u32,
    expanded_first: u32,  // position of the first expanded key
    expanded_stride: u32, // expanded keys a KV head
}

const SLICES = (DIM4 + 7u) / 8u;
// Eight vectors and one of padding, which spreads the rows over the memory's banks.
const STRIDE = 9u;
const LOWEST = -3.0e38f;

@group(0) @binding(0) var<uniform> params: Params;
// [query of all KV heads]: (maximum, sum of weights)
@group(0) @binding(4) var<storage, read_write> states: array<vec2<f32>>;

// [query][element / 4 of the slice]
var<workgroup> q_tile: array<vec4<f32>, 32u * STRIDE>;
// [key][element / 4 of the slice]: keys, then values.
var<workgroup> kv_tile: array<vec4<f32>, 32u * STRIDE>;
// [query][key / 4]: scores, then weights.
var<workgroup> score_tile: array<vec4<f32>, 32u * STRIDE>;

// Where a query's head starts in rows of `stride` elements.
fn head_start(query: u32, kv_head: u32, stride: u32) -> u32 {
    let head = kv_head * params.group + query % params.group;
    return query / params.group * stride + head * HEAD_DIM;
}

// The largest of a query's 32 scores.
fn highest_score(tile_query: u32) -> f32 {
    var high = score_tile[tile_query * STRIDE];
    for (var i = 1u; i < 8u; i++) {
        high = max(high, score_tile[tile_query * STRIDE + i]);
    }
    return max(max(high.x, high.y), max(high.z, high.w));
}

// Four scores of a query as weights; keys that it must not see weigh nothing.
fn weigh(scores: vec4<f32>, highest: f32, first_key: u32, visible: u32) -> vec4<f32> {
    let key = vec4<u32>(first_key) + vec4<u32>(0u, 1u, 2u, 3u);
    return select(vec4<f32>(), exp(scores - highest), key < vec4<u32>(visible));
}

@compute @workgroup_size(128)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) workgroup: vec3<u32>,
) {
    let kv_head = workgroup.y;
    let value_row = kv_head * params.value_stride - params.value_first;
    let first_query = workgroup.x * 32u;
    let queries = params.tokens * params.group;
    let last_query = min(first_query + 31u, queries - 1u);
    let end = min(params.stop, params.position + last_query / params.group + 1u);

    // This invocation's two queries; with the seven neighbours that share them it takes four keys
    // each, and four elements of each slice.
    let tile_query = lane / 8u * 2u;
    let part = lane % 8u;
    let query0 = first_query + tile_query;
    let query1 = query0 + 1u;
    // The keys that each query sees.
    let visible0 = min(params.stop, params.position + query0 / params.group + 1u);
    let visible1 = min(params.stop, params.position + query1 / params.group + 1u);

    var highest = vec2<f32>(LOWEST);
    var total = vec2<f32>();
    // [slice][query]
    var sums: array<vec4<f32>, 2u * SLICES>;
    for (var slice = 0u; slice < SLICES; slice++) {
        sums[2u * slice] = vec4<f32>();
        sums[2u * slice + 1u] = vec4<f32>();
    }
    let out0 = head_start(query0, kv_head, params.out_stride);
    let out1 = head_start(query1, kv_head, params.out_stride);
    let state0 = kv_head * queries + query0;
    if (params.resume == 1u) {
        if (query0 < queries) {
            highest.x = states[state0].x;
            total.x = states[state0].y;
        }
        if (query1 < queries) {
            highest.y = states[state0 + 1u].x;
            total.y = states[state0 + 1u].y;
        }
        for (var slice = 0u; slice < SLICES; slice++) {
            let d4 = slice * 8u + part;
            if (query0 < queries && d4 < DIM4) {
                sums[2u * slice] = load_out4(out0, d4);
            }
            if (query1 < queries && d4 < DIM4) {
                sums[2u * slice + 1u] = load_out4(out1, d4);
            }
        }
    }

    // The first keys of the windows of this invocation's queries, and of the workgroup's first and
    // last: windows move with the queries.
    let start0 = window_start(params.position + query0 / params.group);
    let start1 = window_start(params.position + query1 / params.group);
    let first_start = window_start(params.position + first_query / params.group);
    let last_start = window_start(params.position + last_query / params.group);

    for (var tile = params.start; tile < end; tile += 32u) {
        // Scores of this invocation's queries with keys 4 part to 4 part + 3 of the tile.
        var scores0 = vec4<f32>();
        var scores1 = vec4<f32>();
        let key = tile + 4u * part;
        let keys = vec4<u32>(key) + vec4<u32>(0u, 1u, 2u, 3u);
        for (var round = 0u; round < PASSES; round++) {
            let exact = round == 0u;
            if (!tile_has(exact, tile, min(tile + 32u, end), first_start, last_start)) {
                continue;
            }
            var pass0 = vec4<f32>();
            var pass1 = vec4<f32>();
            for (var slice = 0u; slice < SLICES; slice++) {
                workgroupBarrier();
                for (var at = lane; at < 256u; at += 128u) {
                    let d4 = slice * 8u + at % 8u;
                    let query = first_query + at / 8u;
                    var q = vec4<f32>();
                    if (query < queries && d4 < DIM4) {
                        let start = head_start(query, kv_head, params.qkv_stride);
                        q = load_query4(start, d4) * params.scale;
                    }
                    q_tile[at / 8u * STRIDE + at % 8u] = q;
                    // Row r holds key 4 (r % 8) + r / 8: invocations that read rows part,
                    // part + 8, .. then hold four keys in a row and never meet in a memory bank.
                    let tile_key = tile + (at / 8u) % 8u * 4u + at / 64u;
                    var k = vec4<f32>();
                    if (tile_key < end && d4 < DIM4) {
                        k = key4_as(exact, kv_head, tile_key, d4);
                    }
                    kv_tile[at / 8u * STRIDE + at % 8u] = k;
                }
                workgroupBarrier();
                // A bound that compilers do not know: unrolled, within slices that are unrolled as
                // well, this would be thousands of instructions, which take long to compile and do
                // not fit the caches of small GPUs. Where the last slice is shorter, it is padded
                // with zeros.
                for (var i = 0u; i < params.vectors; i++) {
                    let q0 = q_tile[tile_query * STRIDE + i];
                    let q1 = q_tile[(tile_query + 1u) * STRIDE + i];
                    let k0 = kv_tile[part * STRIDE + i];
                    let k1 = kv_tile[(part + 8u) * STRIDE + i];
                    let k2 = kv_tile[(part + 16u) * STRIDE + i];
                    let k3 = kv_tile[(part + 24u) * STRIDE + i];
                    pass0 += vec4<f32>(dot(q0, k0), dot(q0, k1), dot(q0, k2), dot(q0, k3));
                    pass1 += vec4<f32>(dot(q1, k0), dot(q1, k1), dot(q1, k2), dot(q1, k3));
                }
            }
            scores0 = select(scores0, pass0, takes(exact, keys, start0));
            scores1 = select(scores1, pass1, takes(exact, keys, start1));
        }
        scores0 = select(vec4<f32>(LOWEST), scores0, keys < vec4<u32>(visible0));
        scores1 = select(vec4<f32>(LOWEST), scores1, keys < vec4<u32>(visible1));
        score_tile[tile_query * STRIDE + part] = scores0;
        score_tile[(tile_query + 1u) * STRIDE + part] = scores1;
        workgroupBarrier();
        let tile_highest = vec2<f32>(highest_score(tile_query), highest_score(tile_query + 1u));
        let higher = max(highest, tile_highest);
        let shrink = exp(highest - higher);
        highest = higher;
        total *= shrink;
        workgroupBarrier();
        score_tile[tile_query * STRIDE + part] = weigh(scores0, higher.x, key, visible0);
        score_tile[(tile_query + 1u) * STRIDE + part] = weigh(scores1, higher.y, key, visible1);

        // Fours of keys in this tile.
        let fours = (min(32u, end - tile) + 3u) / 4u;
        for (var slice = 0u; slice < SLICES; slice++) {
            workgroupBarrier();
            for (var at = lane; at < 256u; at += 128u) {
                let d4 = slice * 8u + at % 8u;
                let value_key = tile + at / 8u;
                var v = vec4<f32>();
                if (value_key < end && d4 < DIM4) {
                    let scale = value_scale(value_row + value_key);
                    v = value_levels4(value_row + value_key, d4) * scale.x + scale.y;
                }
                kv_tile[at / 8u * STRIDE + at % 8u] = v;
            }
            workgroupBarrier();
            var sum0 = sums[2u * slice] * shrink.x;
            var sum1 = sums[2u * slice + 1u] * shrink.y;
            for (var i = 0u; i < fours; i++) {
                let w0 = score_tile[tile_query * STRIDE + i];
                let w1 = score_tile[(tile_query + 1u) * STRIDE + i];
                let v0 = kv_tile[(4u * i) * STRIDE + part];
                let v1 = kv_tile[(4u * i + 1u) * STRIDE + part];
                let v2 = kv_tile[(4u * i + 2u) * STRIDE + part];
                let v3 = kv_tile[(4u * i + 3u) * STRIDE + part];
                sum0 += w0.x * v0 + w0.y * v1 + w0.z * v2 + w0.w * v3;
                sum1 += w1.x * v0 + w1.y * v1 + w1.z * v2 + w1.w * v3;
                if (slice == 0u) {
                    let one = vec4<f32>(1.0);
                    total += vec2<f32>(dot(w0, one), dot(w1, one));
                }
            }
            sums[2u * slice] = sum0;
            sums[2u * slice + 1u] = sum1;
        }
    }

    let last = params.last == 1u;
    if (!last && part == 0u) {
        if (query0 < queries) {
            states[state0] = vec2<f32>(highest.x, total.x);
        }
        if (query1 < queries) {
            states[state0 + 1u] = vec2<f32>(highest.y, total.y);
        }
    }
    let divisor = select(vec2<f32>(1.0), total, last);
    for (var slice = 0u; slice < SLICES; slice++) {
        let d4 = slice * 8u + part;
        if (query0 < queries && d4 < DIM4) {
            store_out4(out0, d4, sums[2u * slice] / divisor.x);
        }
        if (query1 < queries && d4 < DIM4) {
            store_out4(out1, d4, sums[2u * slice + 1u] / divisor.y);
        }
    }
}
