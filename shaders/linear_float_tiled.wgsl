// out = x W^T for float W, for many tokens. A workgroup makes a tile of TILE_ROWS rows of W x
// TILE_TOKENS tokens, 16 columns at a time through workgroup memory; an invocation keeps
// ROWS x TOKENS of it in registers. Grid: (ceil(rows / TILE_ROWS), ceil(T / TILE_TOKENS)).

struct Params {
    rows: u32,          // rows of the block
    first: u32,         // column of out of the block's first row
    chunks: u32,        // chunks of eight columns in a padded row of x
    weight_chunks: u32, // likewise of W
    out_stride: u32,    // elements of a padded row of out
    tokens: u32,
}

const TOKEN_LANES = WORKGROUP / ROW_LANES;
const TILE_ROWS = ROW_LANES * ROWS;
const TILE_TOKENS = TOKEN_LANES * TOKENS;
// Rows of an invocation, by four.
const QUADS = ROWS / 4u;
// Four vectors of four columns and one of padding, which spreads the rows over the memory's banks.
const TILE_STRIDE = 5u;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

// [row][column / 4] and [token][column / 4].
var<workgroup> weight_tile: array<vec4<f32>, TILE_ROWS * TILE_STRIDE>;
var<workgroup> x_tile: array<vec4<f32>, TILE_TOKENS * TILE_STRIDE>;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let first_row = group.x * TILE_ROWS;
    let first_token = group.y * TILE_TOKENS;
    // Neighbours read neighbouring rows of the tiles: an invocation's are as far apart as there are
    // invocations beside each other.
    let tile_row = lane % ROW_LANES;
    let tile_token = lane / ROW_LANES;
    // The components are four rows.
    var sums: array<vec4<f32>, TOKENS * QUADS>;
    for (var s = 0u; s < TOKENS * QUADS; s++) {
        sums[s] = vec4<f32>();
    }

    for (var chunk = 0u; chunk < params.chunks; chunk += 2u) {
        for (var at = lane; at < 2u * TILE_ROWS; at += WORKGROUP) {
            let row = first_row + at / 2u;
            var w = Eight();
            if (row < params.rows) {
                w = weights8(row * params.weight_chunks + chunk + at % 2u);
            }
            let to = at / 2u * TILE_STRIDE + at % 2u * 2u;
            weight_tile[to] = w.a;
            weight_tile[to + 1u] = w.b;
        }
        for (var at = lane; at < 4u * TILE_TOKENS; at += WORKGROUP) {
            let token = first_token + at / 4u;
            var a = vec4<f32>();
            if (token < params.tokens) {
                a = x[(token * params.chunks + chunk) * 2u + at % 4u];
            }
            x_tile[at / 4u * TILE_STRIDE + at % 4u] = a;
        }
        workgroupBarrier();
        for (var i = 0u; i < 4u; i++) {
            var w: array<vec4<f32>, ROWS>;
            for (var r = 0u; r < ROWS; r++) {
                w[r] = weight_tile[(tile_row + ROW_LANES * r) * TILE_STRIDE + i];
            }
            for (var t = 0u; t < TOKENS; t++) {
                let a = x_tile[(tile_token + TOKEN_LANES * t) * TILE_STRIDE + i];
                for (var q = 0u; q < QUADS; q++) {
                    let r = 4u * q;
                    sums[t * QUADS + q] +=
                        vec4<f32>(dot(w[r], a), dot(w[r + 1u], a), dot(w[r + 2u], a), dot(w[r + 3u], a));
                }
            }
        }
        workgroupBarrier();
    }

    for (var t = 0u; t < TOKENS; t++) {
        let token = first_token + tile_token + TOKEN_LANES * t;
        for (var q = 0u; q < QUADS; q++) {
            store_rows(first_row + tile_row + 4u * q * ROW_LANES, token, sums[t * QUADS + q]);
        }
    }
}

// Four rows of one token, as far apart as an invocation's are.
fn store_rows(row: u32, token: u32, sums: vec4<f32>) {
    if (token >= params.tokens) {
        return;
    }
    for (var i = 0u; i < 4u; i++) {
        if (row + ROW_LANES * i < params.rows) {
            let at = token * params.out_stride + params.first + row + ROW_LANES * i;
            if (ACCUMULATE == 1u) {
                out[at] += sums[i];
            } else {
                out[at] = sums[i];
            }
        }
    }
}
