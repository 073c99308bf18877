// out = x W^T for ternary W and int8 x, for many tokens. A workgroup makes a tile of TILE_ROWS packed
// rows (FIELDS outputs each) x TILE_TOKENS tokens, 64 columns at a time through workgroup memory; an
// invocation keeps ROWS packed rows x TOKENS tokens in registers.
// Grid: (ceil(packed rows / TILE_ROWS), ceil(T / TILE_TOKENS)).

struct Params {
    packed_rows: u32,
    count16: u32,    // columns of a padded row of weights and of x, in sixteens
    out_stride: u32, // elements of a padded row of out
    tokens: u32,
}

const TILE_ROWS = ROW_LANES * ROWS;
const TILE_TOKENS = WORKGROUP / ROW_LANES * TOKENS;
const TILE_16 = 4u;

@group(0) @binding(0) var<uniform> params: Params;

// [column / 16][packed row]: neighbouring invocations read neighbouring rows.
var<workgroup> weight_tile: array<vec4<u32>, TILE_16 * TILE_ROWS>;
// [token][column / 16]: all invocations of a token group read the same element.
var<workgroup> x_tile: array<vec4<u32>, TILE_TOKENS * TILE_16>;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let tile_row = lane % ROW_LANES;
    let tile_token = lane / ROW_LANES * TOKENS;
    let first_row = group.x * TILE_ROWS;
    let first_token = group.y * TILE_TOKENS;
    var sums: array<Sums, ROWS * TOKENS>;
    for (var s = 0u; s < ROWS * TOKENS; s++) {
        sums[s] = Sums();
    }

    for (var column = 0u; column < params.count16; column += TILE_16) {
        for (var at = lane; at < TILE_ROWS * TILE_16; at += WORKGROUP) {
            let row = first_row + at / TILE_16;
            let i = column + at % TILE_16;
            var w = vec4<u32>();
            if (row < params.packed_rows && i < params.count16) {
                w = weights[row * params.count16 + i];
            }
            weight_tile[at % TILE_16 * TILE_ROWS + at / TILE_16] = w;
        }
        for (var at = lane; at < TILE_TOKENS * TILE_16; at += WORKGROUP) {
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
            var w: array<Weights, ROWS>;
            for (var r = 0u; r < ROWS; r++) {
                w[r] = weights_of(weight_tile[i * TILE_ROWS + tile_row + r * ROW_LANES]);
            }
            for (var t = 0u; t < TOKENS; t++) {
                let a = x_tile[(tile_token + t) * TILE_16 + i];
                for (var r = 0u; r < ROWS; r++) {
                    let at = r * TOKENS + t;
                    sums[at] = plus_products(sums[at], w[r], a);
                }
            }
        }
        workgroupBarrier();
    }

    for (var r = 0u; r < ROWS; r++) {
        let row = first_row + tile_row + r * ROW_LANES;
        for (var t = 0u; t < TOKENS; t++) {
            let token = first_token + tile_token + t;
            if (row < params.packed_rows && token < params.tokens) {
                store_fields(row, token, sums[r * TOKENS + t]);
            }
        }
    }
}
