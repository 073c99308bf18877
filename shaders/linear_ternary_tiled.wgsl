// out = x W^T for ternary W and int8 x, for many tokens. A workgroup of 256 makes a tile of
// 32 packed rows (128 outputs) x 8 TOKENS tokens, 64 columns at a time through workgroup memory;
// an invocation keeps one packed row x TOKENS tokens in registers.
// Grid: (ceil(packed rows / 32), ceil(T / (8 TOKENS))).

struct Params {
    packed_rows: u32,
    count16: u32,    // columns of a padded row of weights and of x, in sixteens
    out_stride: u32, // elements of a padded row of out
    tokens: u32,
}

const TILE_ROWS = 32u;
const TILE_TOKENS = 8u * TOKENS;
const TILE_16 = 4u;

@group(0) @binding(0) var<uniform> params: Params;

// [column / 16][packed row]: neighbouring invocations read neighbouring rows.
var<workgroup> weight_tile: array<vec4<u32>, TILE_16 * TILE_ROWS>;
// [token][column / 16]: all invocations of a token group read the same element.
var<workgroup> x_tile: array<vec4<u32>, TILE_TOKENS * TILE_16>;

@compute @workgroup_size(256)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let tile_row = lane % TILE_ROWS;
    let tile_token = lane / TILE_ROWS * TOKENS;
    let first_row = group.x * TILE_ROWS;
    let first_token = group.y * TILE_TOKENS;
    var sums: array<vec4<i32>, TOKENS>;
    for (var t = 0u; t < TOKENS; t++) {
        sums[t] = vec4<i32>();
    }

    for (var column = 0u; column < params.count16; column += TILE_16) {
        if (lane < TILE_ROWS * TILE_16) {
            let row = first_row + lane / TILE_16;
            let i = column + lane % TILE_16;
            var w = vec4<u32>();
            if (row < params.packed_rows && i < params.count16) {
                w = weights[row * params.count16 + i];
            }
            weight_tile[lane % TILE_16 * TILE_ROWS + lane / TILE_16] = w;
        }
        for (var at = lane; at < TILE_TOKENS * TILE_16; at += 256u) {
            let token = first_token + at / TILE_16;
            let i = column + at % TILE_16;
            var a = vec4<u32>();
            if (token < params.tokens && i < params.count16) {
                a = x[token * params.count16 + i];
            }
            x_tile[at] = a;
        }
        workgroupBarrier();
        for (var i = 0u; i < TILE_16; i++) {
            let w = weight_tile[i * TILE_ROWS + tile_row];
            for (var t = 0u; t < TOKENS; t++) {
                sums[t] += dot_fields(w, x_tile[(tile_token + t) * TILE_16 + i]);
            }
        }
        workgroupBarrier();
    }

    let row = first_row + tile_row;
    for (var t = 0u; t < TOKENS; t++) {
        let token = first_token + tile_token + t;
        if (row < params.packed_rows && token < params.tokens) {
            store_fields(row, token, sums[t]);
        }
    }
}
