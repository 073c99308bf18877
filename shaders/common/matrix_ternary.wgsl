// A matrix unit's product of ternary weights and int8 activations, the kernel's `linear_matrix.wgsl`;
// needs `ternary.wgsl` and a snippet `ternary_*_digits.wgsl`.
//
// Trits and int8 are numbers of the unit, their products are exact, and so are f32 sums of them below
// 2^24: whoever dispatches this sees to it that there are no more columns.

struct Params {
    packed_rows: u32,
    count16: u32,    // columns of a padded row of weights and of x, in sixteens
    out_stride: u32, // elements of a padded row of out
    tokens: u32,
}

const PARTS = 1u;
// Of a tile.
const PACKED_ROWS = TILE_ROWS / FIELDS;
const SIXTEENS = COLUMNS / 16u;

@group(0) @binding(0) var<uniform> params: Params;

fn begin(first_token: u32, lane: u32) {}

fn column_count() -> u32 {
    return params.count16 * 16u;
}

// The rows of a tile are the first fields of its packed rows, then their second fields, and so on.
fn load_weights(tile: u32, column: u32, lane: u32) {
    for (var at = lane; at < PACKED_ROWS * SIXTEENS; at += WORKGROUP) {
        let row = tile * PACKED_ROWS + at / SIXTEENS;
        let i = column / 16u + at % SIXTEENS;
        var packed = vec4<u32>();
        if (row < params.packed_rows && i < params.count16) {
            packed = weights[row * params.count16 + i];
        }
        var digits = digits_of(packed);
        for (var field = 0u; field < FIELDS; field++) {
            let to = (field * PACKED_ROWS + at / SIXTEENS) * STRIDE + at % SIXTEENS * 16u;
            for (var word = 0u; word < 4u; word++) {
                let trits = vec4<Element>(vec4<i32>(unpack4xU8(digits[field][word])) - 1);
                for (var i = 0u; i < 4u; i++) {
                    weight_tile[to + 4u * word + i] = trits[i];
                }
            }
        }
    }
}

// Beyond the last column there is zero, so that it does not matter what meets it.
fn load_x(first_token: u32, column: u32, lane: u32) {
    for (var at = lane; at < TILE_TOKENS * SIXTEENS; at += WORKGROUP) {
        let token = first_token + at / SIXTEENS;
        let i = column / 16u + at % SIXTEENS;
        var packed = vec4<u32>();
        if (token < params.tokens && i < params.count16) {
            packed = x[token * params.count16 + i];
        }
        let to = at / SIXTEENS * STRIDE + at % SIXTEENS * 16u;
        for (var word = 0u; word < 4u; word++) {
            let levels = vec4<Element>(unpack4xI8(packed[word]));
            for (var i = 0u; i < 4u; i++) {
                x_tile[to + 4u * word + i] = levels[i];
            }
        }
    }
}

// Rounds as `store_fields` does.
fn store(tile: u32, tile_row: u32, first_token: u32, tile_token: u32, at: u32) {
    let packed_row = tile * PACKED_ROWS + tile_row % PACKED_ROWS;
    let token = first_token + tile_token;
    if (packed_row >= params.packed_rows || token >= params.tokens) {
        return;
    }
    for (var s = 0u; s < 4u; s++) {
        let segment = segments[s];
        if (packed_row < segment.start || packed_row >= segment.start + segment.count) {
            continue;
        }
        let first = segment.source + packed_row - segment.start;
        let row = first + tile_row / PACKED_ROWS * segment.apart;
        if (row < segment.rows) {
            let to = token * params.out_stride + segment.offset + row;
            let value = results[at] * (x_rows[token].scale * segment.scale);
            if (ACCUMULATE == 1u) {
                out[to] += value;
            } else {
                out[to] = value;
            }
        }
    }
}
