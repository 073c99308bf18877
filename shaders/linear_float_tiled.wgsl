// out = x W^T for float W, for many tokens. A workgroup of 256 makes a tile of 64 rows of W x
// 64 tokens, 16 columns at a time through workgroup memory; an invocation keeps 4 x 4 of it in
// registers. Grid: (ceil(rows / 64), ceil(T / 64)).

struct Params {
    rows: u32,          // rows of the block
    first: u32,         // column of out of the block's first row
    chunks: u32,        // chunks of eight columns in a padded row of x
    weight_chunks: u32, // likewise of W
    out_stride: u32,    // elements of a padded row of out
    tokens: u32,
}

const TILE = 64u;
// Four vectors of four columns and one of padding, which spreads the rows over the memory's banks.
const TILE_STRIDE = 5u;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

// [row][column / 4] and [token][column / 4].
var<workgroup> weight_tile: array<vec4<f32>, TILE * TILE_STRIDE>;
var<workgroup> x_tile: array<vec4<f32>, TILE * TILE_STRIDE>;

@compute @workgroup_size(256)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let first_row = group.x * TILE;
    let first_token = group.y * TILE;
    // This invocation's rows and tokens are 16 apart: neighbours read neighbouring tile rows.
    let tile_row = lane % 16u;
    let tile_token = lane / 16u;
    // One vector a token, its components the four rows.
    var sums0 = vec4<f32>();
    var sums1 = vec4<f32>();
    var sums2 = vec4<f32>();
    var sums3 = vec4<f32>();

    for (var chunk = 0u; chunk < params.chunks; chunk += 2u) {
        if (lane < 2u * TILE) {
            let row = first_row + lane / 2u;
            var w = Eight();
            if (row < params.rows) {
                w = weights8(row * params.weight_chunks + chunk + lane % 2u);
            }
            let at = lane / 2u * TILE_STRIDE + lane % 2u * 2u;
            weight_tile[at] = w.a;
            weight_tile[at + 1u] = w.b;
        }
        let token = first_token + lane / 4u;
        var a = vec4<f32>();
        if (token < params.tokens) {
            a = x[(token * params.chunks + chunk) * 2u + lane % 4u];
        }
        x_tile[lane / 4u * TILE_STRIDE + lane % 4u] = a;
        workgroupBarrier();
        for (var i = 0u; i < 4u; i++) {
            let w0 = weight_tile[tile_row * TILE_STRIDE + i];
            let w1 = weight_tile[(tile_row + 16u) * TILE_STRIDE + i];
            let w2 = weight_tile[(tile_row + 32u) * TILE_STRIDE + i];
            let w3 = weight_tile[(tile_row + 48u) * TILE_STRIDE + i];
            let x0 = x_tile[tile_token * TILE_STRIDE + i];
            let x1 = x_tile[(tile_token + 16u) * TILE_STRIDE + i];
            let x2 = x_tile[(tile_token + 32u) * TILE_STRIDE + i];
            let x3 = x_tile[(tile_token + 48u) * TILE_STRIDE + i];
            sums0 += vec4<f32>(dot(w0, x0), dot(w1, x0), dot(w2, x0), dot(w3, x0));
            sums1 += vec4<f32>(dot(w0, x1), dot(w1, x1), dot(w2, x1), dot(w3, x1));
            sums2 += vec4<f32>(dot(w0, x2), dot(w1, x2), dot(w2, x2), dot(w3, x2));
            sums3 += vec4<f32>(dot(w0, x3), dot(w1, x3), dot(w2, x3), dot(w3, x3));
        }
        workgroupBarrier();
    }

    store_rows(first_row + tile_row, first_token + tile_token, sums0);
    store_rows(first_row + tile_row, first_token + tile_token + 16u, sums1);
    store_rows(first_row + tile_row, first_token + tile_token + 32u, sums2);
    store_rows(first_row + tile_row, first_token + tile_token + 48u, sums3);
}

fn store_rows(row: u32, token: u32, sums: vec4<f32>) {
    if (token >= params.tokens) {
        return;
    }
    for (var i = 0u; i < 4u; i++) {
        if (row + 16u * i < params.rows) {
            let at = token * params.out_stride + params.first + row + 16u * i;
            if (ACCUMULATE == 1u) {
                out[at] += sums[i];
            } else {
                out[at] = sums[i];
            }
        }
    }
}
