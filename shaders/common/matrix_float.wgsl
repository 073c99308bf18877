// A matrix unit's product of float weights and activations, the kernel's `linear_matrix.wgsl`; needs a
// snippet `weights_*.wgsl` whose weights are numbers of the unit, and `matrix_whole.wgsl` or
// `matrix_split.wgsl`.

struct Params {
    rows: u32,          // rows of the block
    first: u32,         // column of out of the block's first row
    chunks: u32,        // chunks of eight columns in a padded row of x
    weight_chunks: u32, // likewise of W
    out_stride: u32,    // elements of a padded row of out
    tokens: u32,
}

const EIGHTS = COLUMNS / 8u;
const QUARTERS = COLUMNS / 4u;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

fn column_count() -> u32 {
    return params.chunks * 8u;
}

fn load_weights(tile: u32, column: u32, lane: u32) {
    for (var at = lane; at < TILE_ROWS * EIGHTS; at += WORKGROUP) {
        let row = tile * TILE_ROWS + at / EIGHTS;
        let chunk = column / 8u + at % EIGHTS;
        var w = Eight();
        if (row < params.rows && chunk < params.chunks) {
            w = weights8(row * params.weight_chunks + chunk);
        }
        let to = at / EIGHTS * STRIDE + at % EIGHTS * 8u;
        for (var i = 0u; i < 4u; i++) {
            weight_tile[to + i] = Element(w.a[i]);
            weight_tile[to + 4u + i] = Element(w.b[i]);
        }
    }
}

fn load_x(first_token: u32, column: u32, lane: u32) {
    for (var at = lane; at < TILE_TOKENS * QUARTERS; at += WORKGROUP) {
        let token = at / QUARTERS;
        let quarter = column / 4u + at % QUARTERS;
        var a = vec4<f32>();
        if (first_token + token < params.tokens && quarter < 2u * params.chunks) {
            a = x[(first_token + token) * 2u * params.chunks + quarter];
        }
        put_x(token, token * STRIDE + at % QUARTERS * 4u, a);
    }
}

fn store(tile: u32, tile_row: u32, first_token: u32, tile_token: u32, at: u32) {
    let row = tile * TILE_ROWS + tile_row;
    let token = first_token + tile_token;
    if (row >= params.rows || token >= params.tokens) {
        return;
    }
    let to = token * params.out_stride + params.first + row;
    let value = result(tile_token, at);
    if (ACCUMULATE == 1u) {
        out[to] += value;
    } else {
        out[to] = value;
    }
}
