// Causal attention over the cache for a few tokens. A workgroup takes one token, up to four query
// heads of one KV head, which share every key and value it reads, and one span of the keys.
//
// Tile by tile: the scores, which `tile_scores` makes in a way of the key's format, then online
// softmax, then the values with the invocations spread over elements and keys. Several spans leave
// partial results, which attention_merge joins; a single span writes the result itself.
//
// One dispatch takes the keys from `start` to `stop`, which lie in one segment of the cache.
// Grid: (spans of this dispatch, G ceil(H / G / 4), T).

struct Params {
    position: u32,     // of the step's first token
    qkv_stride: u32,   // elements of a padded row of qkv
    out_stride: u32,   // elements of a padded row of out
    heads: u32,
    group: u32,        // query heads of a KV head
    scale: f32,        // 1 / sqrt(D)
    start: u32,        // first key, a multiple of TILE
    stop: u32,         // the key after the last
    span: u32,         // keys of a span, a multiple of TILE
    first_span: u32,   // spans of earlier dispatches
    spans: u32,        // spans of all dispatches
    key_first: u32,    // of the segment of plain keys: its first position
    key_stride: u32,   // and its tokens a KV head
    value_first: u32,  // the same of the segment of values
    value_stride: u32,
    value_scales: u32, // word at which the scales of quantised values begin
    sink: u32,         // keys that are exact for all queries
    recent: u32,       // slots of recent keys
    window_kind: u32,
    window: u32,
    page_first: u32,   // of the segment of pages: its first page
    kv_heads: u32,
    deltas: u32,       // word at which the deltas of the segment begin
}

const SUBSETS = WORKGROUP / DIM4;
// What a score starts from: below any score, yet finite, so that differences are never NaN.
const LOWEST = -3.0e38f;

@group(0) @binding(0) var<uniform> params: Params;
// A row is (T, span, head): DIM4 vectors of sums, then (maximum, sum of weights, -, -).
@group(0) @binding(4) var<storage, read_write> partials: array<vec4<f32>>;

// [head][element / 4]
var<workgroup> q_tile: array<vec4<f32>, 4u * DIM4>;
// First what makes the scores; at the end [head][invocation]: sums.
var<workgroup> parts: array<vec4<f32>, 512>;
// [key]: the weights of the four heads, times the scale of the value.
var<workgroup> weights: array<vec4<f32>, TILE>;

// Products of the four heads with four elements of a key.
fn scores4(d4: u32, key: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(
        dot(q_tile[d4], key),
        dot(q_tile[DIM4 + d4], key),
        dot(q_tile[2u * DIM4 + d4], key),
        dot(q_tile[3u * DIM4 + d4], key),
    );
}

// The elements of the four heads at one channel.
fn query_channel(channel: u32) -> vec4<f32> {
    let d4 = channel / 4u;
    let c = channel % 4u;
    return vec4<f32>(
        q_tile[d4][c],
        q_tile[DIM4 + d4][c],
        q_tile[2u * DIM4 + d4][c],
        q_tile[3u * DIM4 + d4][c],
    );
}

@compute @workgroup_size(WORKGROUP)
fn main(lane: Lane, @builtin(workgroup_id) workgroup: vec3<u32>) {
    let blocks = (params.group + 3u) / 4u;
    let kv_head = workgroup.y / blocks;
    let first_in_group = workgroup.y % blocks * 4u;
    let heads_here = min(4u, params.group - first_in_group);
    let first_head = kv_head * params.group + first_in_group;
    let token = workgroup.z;
    let query = params.position + token;
    let value_row = kv_head * params.value_stride - params.value_first;

    for (var at = lane.index; at < 4u * DIM4; at += WORKGROUP) {
        var q = vec4<f32>();
        if (at / DIM4 < heads_here) {
            let head = token * params.qkv_stride + (first_head + at / DIM4) * HEAD_DIM;
            q = load_query4(head, at % DIM4) * params.scale;
        }
        q_tile[at] = q;
    }

    let begin = params.start + workgroup.x * params.span;
    let end = min(min(begin + params.span, params.stop), query + 1u);
    var highest = vec4<f32>(LOWEST);
    // Over this invocation's keys: the sum of weights, and what the minima of quantised values add
    // to each element.
    var total = vec4<f32>();
    var offset = vec4<f32>();
    // The sums of the four heads for four elements, over every SUBSETS-th key.
    var sums: array<vec4<f32>, 4>;
    sums[0] = vec4<f32>();
    sums[1] = vec4<f32>();
    sums[2] = vec4<f32>();
    sums[3] = vec4<f32>();
    let subset = lane.index / DIM4;
    let element = lane.index % DIM4;

    for (var tile = begin; tile < end; tile += TILE) {
        let count = min(TILE, end - tile);
        // The queries are written, and the parts of the last tile are read.
        workgroupBarrier();
        var score = tile_scores(kv_head, tile, count, query, lane);
        if (lane.index >= count) {
            score = vec4<f32>(LOWEST);
        }
        let higher = max(highest, workgroup_max_vec4f(score, lane));
        let shrink = exp(highest - higher);
        highest = higher;
        total *= shrink;
        offset *= shrink;
        if (lane.index < count) {
            let weight = exp(score - higher);
            let scale = value_scale(value_row + tile + lane.index);
            weights[lane.index] = weight * scale.x;
            total += weight;
            offset += weight * scale.y;
        }
        workgroupBarrier();
        sums[0] *= shrink.x;
        sums[1] *= shrink.y;
        sums[2] *= shrink.z;
        sums[3] *= shrink.w;
        if (subset < SUBSETS) {
            for (var k = subset; k < count; k += SUBSETS) {
                let value = value_levels4(value_row + tile + k, element);
                let w = weights[k];
                sums[0] += w.x * value;
                sums[1] += w.y * value;
                sums[2] += w.z * value;
                sums[3] += w.w * value;
            }
        }
    }

    // The parts of the last tile were read before its last barrier.
    total = workgroup_sum_vec4f(total, lane);
    var added = vec4<f32>();
    if (VALUE_MINIMA) {
        added = workgroup_sum_vec4f(offset, lane);
    }
    parts[lane.index] = sums[0];
    parts[WORKGROUP + lane.index] = sums[1];
    parts[2u * WORKGROUP + lane.index] = sums[2];
    parts[3u * WORKGROUP + lane.index] = sums[3];
    workgroupBarrier();
    for (var at = lane.index; at < heads_here * DIM4; at += WORKGROUP) {
        let in_block = at / DIM4;
        let d4 = at % DIM4;
        var sum = vec4<f32>();
        for (var s = 0u; s < SUBSETS; s++) {
            sum += parts[in_block * WORKGROUP + s * DIM4 + d4];
        }
        sum += added[in_block];
        let head = first_head + in_block;
        if (params.spans == 1u) {
            let start = token * params.out_stride + head * HEAD_DIM;
            store_out4(start, d4, sum / total[in_block]);
        } else {
            let span = params.first_span + workgroup.x;
            let partial = (token * params.spans + span) * params.heads + head;
            partials[partial * (DIM4 + 1u) + d4] = sum;
            if (d4 == 0u) {
                partials[partial * (DIM4 + 1u) + DIM4] =
                    vec4<f32>(highest[in_block], total[in_block], 0.0, 0.0);
            }
        }
    }
}
