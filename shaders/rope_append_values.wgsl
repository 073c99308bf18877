// Quantises the step's values and appends them to the cache: levels first, and behind them for
// each row its scale and, in 4 bits, its minimum. A row that is not finite has NaN as its scale, so
// that all of it is NaN when it is read. A workgroup takes one token of one KV head.
// Grid: (G, tokens of this dispatch).

struct Params {
    position: u32,     // of the step's first token
    first: u32,        // first token of this dispatch, counted from the step's
    stride: u32,       // elements of a padded row of qkv
    values: u32,       // element of a row at which the values begin
    value_first: u32,  // first position of the segment
    value_stride: u32, // its tokens a KV head
    value_scales: u32, // word at which the scales begin
}

const PER_WORD = 32u / BITS;
const LARGEST = 3.0e38f;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> qkv: array<f32>;
@group(0) @binding(4) var<storage, read_write> values: array<u32>;

@compute @workgroup_size(WORKGROUP)
fn main(lane: Lane, @builtin(workgroup_id) workgroup: vec3<u32>) {
    let token = params.first + workgroup.y;
    let start = token * params.stride + params.values + workgroup.x * HEAD_DIM;
    let position = params.position + token;
    let row = workgroup.x * params.value_stride + position - params.value_first;

    // The highest and, negated, the lowest element; and 1 where one is not finite, which no
    // comparison of floats is sure to tell.
    var range = vec4<f32>(-LARGEST);
    for (var i = lane.index; i < HEAD_DIM; i += WORKGROUP) {
        let v = qkv[start + i];
        if ((bitcast<u32>(v) & 0x7f800000u) == 0x7f800000u) {
            range.z = 1.0;
        } else {
            range = max(range, vec4<f32>(v, -v, 0.0, 0.0));
        }
    }
    range = workgroup_max_vec4f(range, lane);
    var minimum = 0.0;
    var scale = 0.0;
    var lowest = -127.0;
    var highest = 127.0;
    if (BITS == 8u) {
        scale = nearest_f16(max(range.x, range.y) * (1.0 / 127.0));
    } else {
        minimum = nearest_f16(-range.y);
        scale = nearest_f16((range.x - minimum) * (1.0 / 15.0));
        lowest = 0.0;
        highest = 15.0;
    }

    let words = (HEAD_DIM + PER_WORD - 1u) / PER_WORD;
    for (var w = lane.index; w < words; w += WORKGROUP) {
        var word = 0u;
        for (var i = 0u; i < min(PER_WORD, HEAD_DIM - w * PER_WORD); i++) {
            let v = qkv[start + w * PER_WORD + i];
            let level = i32(clamp(nearest_level(v - minimum, scale), lowest, highest));
            word = insertBits(word, bitcast<u32>(level), BITS * i, BITS);
        }
        values[row * ROW_WORDS + w] = word;
    }
    if (lane.index == 0u) {
        let halves = pack2x16float(vec2<f32>(scale, minimum));
        values[params.value_scales + row] = select(halves, 0x7e007e00u, range.z > 0.5);
    }
}
