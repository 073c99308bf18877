// Compresses full pages of keys to 8 bits a token or to 4 or 2 bits a channel; the arithmetic is
// that of src/delta/encode.rs. A workgroup takes a page. Grid: (pages, G).

struct Params {
    page: u32,       // first page of this dispatch
    page_first: u32, // of the segment of pages: its first page
    kv_heads: u32,
    sink: u32,       // slots of the sink's keys
    recent: u32,     // slots of recent keys
}

const PER_WORD = 32u / BITS;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read_write> pages: array<u32>;

// [channel] or [token]: (scale, minimum)
var<workgroup> scales: array<vec2<f32>, 256>;

fn key(kv_head: u32, position: u32, channel: u32) -> f32 {
    return key4(key_row(kv_head, position) * DIM4 + channel / 4u)[channel % 4u];
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) workgroup: vec3<u32>,
) {
    let kv_head = workgroup.y;
    let page = params.page + workgroup.x;
    let header = 1u + ((page - params.page_first) * params.kv_heads + kv_head) * HEADER;
    let first = page * PAGE;

    if (BITS == 8u) {
        for (var token = lane; token < PAGE; token += WORKGROUP) {
            var largest = 0.0;
            for (var d = 0u; d < DIM4; d++) {
                let k = abs(key4(key_row(kv_head, first + token) * DIM4 + d));
                largest = max(largest, max(max(k.x, k.y), max(k.z, k.w)));
            }
            scales[token] = vec2<f32>(nearest_f16(largest * (1.0 / 127.0)), 0.0);
        }
        workgroupBarrier();
        for (var i = lane; i < PAGE / 2u; i += WORKGROUP) {
            let pair = vec2<f32>(scales[2u * i].x, scales[2u * i + 1u].x);
            pages[header + SCALES + i] = pack2x16float(pair);
        }
    } else {
        let top = f32((1u << BITS) - 1u);
        for (var c = lane; c < HEAD_DIM; c += WORKGROUP) {
            var lowest = key(kv_head, first, c);
            var highest = lowest;
            for (var token = 1u; token < PAGE; token++) {
                let k = key(kv_head, first + token, c);
                lowest = min(lowest, k);
                highest = max(highest, k);
            }
            let minimum = nearest_f16(lowest);
            let scale = nearest_f16((highest - minimum) * (1.0 / top));
            scales[c] = vec2<f32>(scale, minimum);
            pages[header + SCALES + c] = pack2x16float(vec2<f32>(scale, minimum));
        }
        workgroupBarrier();
    }

    for (var at = lane; at < PAGE * LEVEL_WORDS; at += WORKGROUP) {
        let token = at / LEVEL_WORDS;
        let c = at % LEVEL_WORDS * PER_WORD;
        var word = 0u;
        for (var i = 0u; i < min(PER_WORD, HEAD_DIM - c); i++) {
            let k = key(kv_head, first + token, c + i);
            var level = 0;
            if (BITS == 8u) {
                level = i32(clamp(nearest_level(k, scales[token].x), -127.0, 127.0));
            } else {
                let scale = scales[c + i];
                level = i32(clamp(nearest_level(k - scale.y, scale.x), 0.0, f32((1u << BITS) - 1u)));
            }
            word = insertBits(word, bitcast<u32>(level), BITS * i, BITS);
        }
        pages[header + LEVELS + at] = word;
    }
}
