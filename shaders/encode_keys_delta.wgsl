// Compresses full pages of keys to the deltas that exceed the threshold; the arithmetic is that of
// src/delta/encode.rs, sum by sum, so that the bits are the same. An invocation takes channels, and
// goes through their tokens three times: for the reference and the scale, for the mask, and, once
// the mask says where each delta belongs, for the deltas.
//
// A workgroup takes `loops` pages of a KV head, one after another: all of them in a continuous
// chain, in which each begins where the one before has ended, else one. Grid: (pages / loops, G).

struct Params {
    page: u32,       // first page of this dispatch
    loops: u32,
    page_first: u32, // of the segment of pages: its first page
    kv_heads: u32,
    deltas: u32,     // word at which the deltas of the segment begin
    sink: u32,       // slots of the sink's keys
    recent: u32,     // slots of recent keys
    relative: u32,   // 1 for thresholds in standard deviations
}

// What REFERENCE can be.
const CONTINUOUS = 0u;
const MEAN = 2u;

@group(0) @binding(0) var<uniform> params: Params;
// Word 0 counts the words of deltas in use; headers and deltas follow.
@group(0) @binding(3) var<storage, read_write> pages: array<atomic<u32>>;
// [KV head][channel]: the last reconstructed key, for a continuous chain.
@group(0) @binding(4) var<storage, read_write> carry: array<f32>;
// [KV head]: absolute, or in standard deviations.
@group(0) @binding(5) var<storage, read> thresholds: array<f32>;

// [channel]; the first two serve the deviation before.
var<workgroup> reference: array<f32, HEAD_DIM>;
var<workgroup> scale: array<f32, HEAD_DIM>;
// [token][channel / 32]
var<workgroup> mask: array<atomic<u32>, PAGE * MASK_WORDS>;
// [token]: kept deltas before it; then their number.
var<workgroup> before: array<u32, PAGE + 1u>;
var<workgroup> theta: f32;
var<workgroup> first_delta: u32;

struct Rounded {
    field: u32,
    value: f32,
}

fn key(kv_head: u32, position: u32, channel: u32) -> f32 {
    return key4(key_row(kv_head, position) * DIM4 + channel / 4u)[channel % 4u];
}

fn round_delta(delta: f32, channel: u32) -> Rounded {
    if (BITS == 16u) {
        let value = nearest_f16(delta);
        return Rounded(pack2x16float(vec2<f32>(value, 0.0)) & 0xffffu, value);
    }
    let top = f32(LEVEL_MAX);
    let level = clamp(nearest_level(delta, scale[channel]), -top, top);
    return Rounded(extractBits(bitcast<u32>(i32(level)), 0u, BITS), level * scale[channel]);
}

// The standard deviation's share that theta is. Sums run down each channel, then over channels.
fn find_theta(kv_head: u32, first: u32, lane: u32) {
    if (params.relative == 0u) {
        if (lane == 0u) {
            theta = thresholds[kv_head];
        }
        return;
    }
    for (var c = lane; c < HEAD_DIM; c += WORKGROUP) {
        var sum = 0.0;
        var squares = 0.0;
        for (var token = 0u; token < PAGE; token++) {
            let k = nearest_f16(key(kv_head, first + token, c));
            sum += k;
            squares += k * k;
        }
        reference[c] = sum;
        scale[c] = squares;
    }
    workgroupBarrier();
    if (lane == 0u) {
        var sum = 0.0;
        var squares = 0.0;
        for (var c = 0u; c < HEAD_DIM; c++) {
            sum += reference[c];
            squares += scale[c];
        }
        let count = f32(PAGE * HEAD_DIM);
        // The mean in two parts of half its digits each, whose products are exact.
        let mean = divide(sum, count);
        let high = bitcast<f32>(bitcast<u32>(mean) & 0xfffff000u);
        let low = mean - high;
        let rest = divide(squares, count) - high * high - 2.0 * high * low - low * low;
        let variance = max(rest, 0.0);
        if (variance > 0.0) {
            theta = nearest_f16(thresholds[kv_head] * square_root(variance));
        } else {
            theta = 0.0;
        }
    }
}

fn find_reference(kv_head: u32, page: u32, channel: u32) {
    let first = page * PAGE;
    var r = key(kv_head, first, channel);
    if (REFERENCE == MEAN) {
        var sum = 0.0;
        for (var token = 0u; token < PAGE; token++) {
            sum += key(kv_head, first + token, channel);
        }
        r = sum * (1.0 / f32(PAGE));
    } else if (REFERENCE == CONTINUOUS && page > 0u) {
        r = carry[kv_head * HEAD_DIM + channel];
    }
    r = nearest_f16(r);
    reference[channel] = r;
    if (BITS == 16u) {
        return;
    }

    var largest = 0.0;
    var last = r;
    for (var token = 0u; token < PAGE; token++) {
        let k = key(kv_head, first + token, channel);
        let d = abs(k - last);
        if (REFERENCE != MEAN || d > theta) {
            largest = max(largest, d);
        }
        if (REFERENCE != MEAN) {
            last = k;
        }
    }
    var s = largest * (1.0 / f32(LEVEL_MAX));
    if (REFERENCE != MEAN) {
        // Rounding to f16 must not make it smaller.
        s = (largest + theta) * (1.001 / f32(LEVEL_MAX));
    }
    s = nearest_f16(s);
    scale[channel] = s;
}

// How many channels before this one are kept.
fn rank(token: u32, channel: u32) -> u32 {
    var kept = 0u;
    for (var w = 0u; w < channel / 32u; w++) {
        kept += countOneBits(atomicLoad(&mask[token * MASK_WORDS + w]));
    }
    let word = atomicLoad(&mask[token * MASK_WORDS + channel / 32u]);
    return kept + countOneBits(word & ((1u << (channel % 32u)) - 1u));
}

// Goes through a channel's tokens: marks what is kept, or writes it to where `deltas` begin.
// Returns the last reconstructed key.
fn go_through(kv_head: u32, first: u32, channel: u32, write: bool, deltas: u32) -> f32 {
    var r = reference[channel];
    for (var token = 0u; token < PAGE; token++) {
        let d = key(kv_head, first + token, channel) - r;
        if (!(abs(d) > theta)) {
            continue;
        }
        let rounded = round_delta(d, channel);
        if (rounded.value == 0.0) {
            continue;
        }
        if (REFERENCE != MEAN) {
            r += rounded.value;
        }
        if (write) {
            let bit = (before[token] + rank(token, channel)) * BITS;
            atomicOr(&pages[deltas + bit / 32u], rounded.field << (bit % 32u));
        } else {
            atomicOr(&mask[token * MASK_WORDS + channel / 32u], 1u << (channel % 32u));
        }
    }
    return r;
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) workgroup: vec3<u32>,
) {
    let kv_head = workgroup.y;
    for (var loop_index = 0u; loop_index < params.loops; loop_index++) {
        let page = params.page + workgroup.x * params.loops + loop_index;
        let header = 1u + ((page - params.page_first) * params.kv_heads + kv_head) * HEADER;
        let first = page * PAGE;

        workgroupBarrier();
        for (var i = lane; i < PAGE * MASK_WORDS; i += WORKGROUP) {
            atomicStore(&mask[i], 0u);
        }
        find_theta(kv_head, first, lane);
        workgroupBarrier();
        for (var c = lane; c < HEAD_DIM; c += WORKGROUP) {
            find_reference(kv_head, page, c);
            go_through(kv_head, first, c, false, 0u);
        }
        workgroupBarrier();

        for (var token = lane; token < PAGE; token += WORKGROUP) {
            var kept = 0u;
            for (var w = 0u; w < MASK_WORDS; w++) {
                kept += countOneBits(atomicLoad(&mask[token * MASK_WORDS + w]));
            }
            before[token + 1u] = kept;
        }
        workgroupBarrier();
        if (lane == 0u) {
            before[0] = 0u;
            for (var token = 1u; token <= PAGE; token++) {
                before[token] += before[token - 1u];
            }
            first_delta = atomicAdd(&pages[0], (before[PAGE] * BITS + 31u) / 32u);
            atomicStore(&pages[header + TOTAL], before[PAGE]);
            atomicStore(&pages[header + TOTAL + 1u], bitcast<u32>(theta));
            atomicStore(&pages[header + TOTAL + 2u], first_delta);
        }
        workgroupBarrier();

        for (var i = lane; i < HEAD_DIM / 2u; i += WORKGROUP) {
            let pair = vec2<f32>(reference[2u * i], reference[2u * i + 1u]);
            atomicStore(&pages[header + i], pack2x16float(pair));
            if (BITS < 16u) {
                let scales = vec2<f32>(scale[2u * i], scale[2u * i + 1u]);
                atomicStore(&pages[header + SCALES + i], pack2x16float(scales));
            }
        }
        for (var i = lane; i < PAGE * MASK_WORDS; i += WORKGROUP) {
            atomicStore(&pages[header + MASKS + i], atomicLoad(&mask[i]));
        }
        for (var i = lane; i < PAGE / 2u; i += WORKGROUP) {
            let pair = before[2u * i] | (before[2u * i + 1u] << 16u);
            atomicStore(&pages[header + OFFSETS + i], pair);
        }
        // What lay there may be left from a text that was cut.
        let deltas = params.deltas + first_delta;
        for (var i = lane; i < (before[PAGE] * BITS + 31u) / 32u; i += WORKGROUP) {
            atomicStore(&pages[deltas + i], 0u);
        }
        storageBarrier();
        for (var c = lane; c < HEAD_DIM; c += WORKGROUP) {
            let last = go_through(kv_head, first, c, true, deltas);
            if (REFERENCE == CONTINUOUS) {
                carry[kv_head * HEAD_DIM + c] = last;
            }
        }
    }
}
