// Causal attention over the cache for a few tokens. A workgroup takes one token, up to four query
// heads of one KV head, which share every key and value it reads, and one span of the keys.
//
// Tiles of 64 keys: scores by 8 invocations a key, then online softmax, then the values with the
// invocations spread over elements and keys. Several spans leave partial results, which
// attention_merge joins; a single span writes the result itself.
// Grid: (spans, G ceil(H / G / 4), T).

struct Params {
    position: u32,   // of the step's first token
    context: u32,    // tokens that the cache holds
    qkv_stride: u32, // elements of a padded row of qkv
    out_stride: u32, // elements of a padded row of out
    heads: u32,
    group: u32,      // query heads of a KV head
    span: u32,       // keys of a span, a multiple of 64
    spans: u32,
    scale: f32,      // 1 / sqrt(D)
}

const TILE = 64u;
const SUBSETS = WORKGROUP / DIM4;
// What a score starts from: below any score, yet finite, so that differences are never NaN.
const LOWEST = -3.0e38f;

@group(0) @binding(0) var<uniform> params: Params;
// A row is (T, span, head): DIM4 vectors of sums, then (maximum, sum of weights, -, -).
@group(0) @binding(4) var<storage, read_write> partials: array<vec4<f32>>;

// [head][element / 4]
var<workgroup> q_tile: array<vec4<f32>, 4u * DIM4>;
// First [key][eighth of the elements]: parts of the scores; at the end [head][invocation]: sums.
var<workgroup> parts: array<vec4<f32>, 512>;
// [key]: the weights of the four heads.
var<workgroup> weights: array<vec4<f32>, TILE>;

@compute @workgroup_size(WORKGROUP)
fn main(lane: Lane, @builtin(workgroup_id) workgroup: vec3<u32>) {
    let blocks = (params.group + 3u) / 4u;
    let kv_head = workgroup.y / blocks;
    let first_in_group = workgroup.y % blocks * 4u;
    let heads_here = min(4u, params.group - first_in_group);
    let first_head = kv_head * params.group + first_in_group;
    let token = workgroup.z;
    let row = kv_head * params.context;

    for (var at = lane.index; at < 4u * DIM4; at += WORKGROUP) {
        var q = vec4<f32>();
        if (at / DIM4 < heads_here) {
            let head = token * params.qkv_stride + (first_head + at / DIM4) * HEAD_DIM;
            q = load_query4(head, at % DIM4) * params.scale;
        }
        q_tile[at] = q;
    }

    let end = min((workgroup.x + 1u) * params.span, params.position + token + 1u);
    var highest = vec4<f32>(LOWEST);
    var total = vec4<f32>();
    // The sums of the four heads for four elements, over every SUBSETS-th key.
    var sums: array<vec4<f32>, 4>;
    sums[0] = vec4<f32>();
    sums[1] = vec4<f32>();
    sums[2] = vec4<f32>();
    sums[3] = vec4<f32>();
    let subset = lane.index / DIM4;
    let element = lane.index % DIM4;

    for (var tile = workgroup.x * params.span; tile < end; tile += TILE) {
        let count = min(TILE, end - tile);
        // The queries are written, and the parts of the last tile are read.
        workgroupBarrier();
        let eighth = lane.index % 8u;
        for (var k = lane.index / 8u; k < count; k += WORKGROUP / 8u) {
            var part = vec4<f32>();
            for (var d = eighth; d < DIM4; d += 8u) {
                let key = key4((row + tile + k) * DIM4 + d);
                part += vec4<f32>(
                    dot(q_tile[d], key),
                    dot(q_tile[DIM4 + d], key),
                    dot(q_tile[2u * DIM4 + d], key),
                    dot(q_tile[3u * DIM4 + d], key),
                );
            }
            parts[k * 8u + eighth] = part;
        }
        workgroupBarrier();
        var score = vec4<f32>(LOWEST);
        if (lane.index < count) {
            score = vec4<f32>();
            for (var i = 0u; i < 8u; i++) {
                score += parts[lane.index * 8u + i];
            }
        }
        let higher = max(highest, workgroup_max_vec4f(score, lane));
        let shrink = exp(highest - higher);
        highest = higher;
        var weight = vec4<f32>();
        if (lane.index < count) {
            weight = exp(score - higher);
            weights[lane.index] = weight;
        }
        // Its barriers also make the weights visible.
        total = total * shrink + workgroup_sum_vec4f(weight, lane);
        sums[0] *= shrink.x;
        sums[1] *= shrink.y;
        sums[2] *= shrink.z;
        sums[3] *= shrink.w;
        if (subset < SUBSETS) {
            for (var k = subset; k < count; k += SUBSETS) {
                let value = value4((row + tile + k) * DIM4 + element);
                let w = weights[k];
                sums[0] += w.x * value;
                sums[1] += w.y * value;
                sums[2] += w.z * value;
                sums[3] += w.w * value;
            }
        }
    }

    workgroupBarrier();
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
        let head = first_head + in_block;
        if (params.spans == 1u) {
            let start = token * params.out_stride + head * HEAD_DIM;
            store_out4(start, d4, sum / total[in_block]);
        } else {
            let partial = (token * params.spans + workgroup.x) * params.heads + head;
            partials[partial * (DIM4 + 1u) + d4] = sum;
            if (d4 == 0u) {
                partials[partial * (DIM4 + 1u) + DIM4] =
                    vec4<f32>(highest[in_block], total[in_block], 0.0, 0.0);
            }
        }
    }
}
