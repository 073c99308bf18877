// out = x W^T for many tokens by a matrix unit, which multiplies matrices of SIZE x SIZE at once: a
// subgroup holds them together. The tile of a workgroup is that of `linear_*_tiled.wgsl` with the same
// grid, COLUMNS columns at a time through workgroup memory. A subgroup keeps a patch of it, PATCH_ROWS x
// PATCH_TOKENS matrices, and there are as many patches as there are subgroups of the largest size at
// most: where they are smaller, those that are left over only help to load.
//
// What is read and written is for `common/matrix_ternary.wgsl` or `common/matrix_float.wgsl`; what is
// multiplied, for a snippet `common/unit_*.wgsl`.

// Sixteen bytes of padding, which spread the rows over the memory's banks: a multiple of what the unit
// wants rows to be aligned to.
const STRIDE = COLUMNS + PADDING;
const BLOCK = SIZE * SIZE;
const PATCH_BLOCKS = PATCH_ROWS * PATCH_TOKENS;

// [row][column].
var<workgroup> weight_tile: array<Element, TILE_ROWS * STRIDE>;
// [part][token][column].
var<workgroup> x_tile: array<Element, PARTS * TILE_TOKENS * STRIDE>;
// A matrix of each patch: [part][patch][token][row].
var<workgroup> results: array<f32, PARTS * PATCHES * BLOCK>;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(workgroup_id) group: vec3<u32>,
) {
    let first_token = group.y * TILE_TOKENS;
    begin(first_token, lane);
    // [part][token][row].
    var sums: array<Sum, PARTS * PATCH_BLOCKS>;
    for (var s = 0u; s < PARTS * PATCH_BLOCKS; s++) {
        sums[s] = Sum();
    }

    let columns = column_count();
    for (var column = 0u; column < columns; column += COLUMNS) {
        load_weights(group.x, column, lane);
        load_x(first_token, column, lane);
        workgroupBarrier();
        // One turn or none: an `if` would do, but the validator takes a branch on the subgroup for
        // one within the subgroup, where matrices are forbidden.
        for (var mine = subgroup; mine < PATCHES; mine += PATCHES) {
            let row = mine % PATCHES_DOWN * PATCH_ROWS * SIZE;
            let token = mine / PATCHES_DOWN * PATCH_TOKENS * SIZE;
            for (var k = 0u; k < COLUMNS; k += SIZE) {
                var w: array<Left, PATCH_ROWS>;
                for (var r = 0u; r < PATCH_ROWS; r++) {
                    w[r] = coopLoadT<Left>(&weight_tile[(row + r * SIZE) * STRIDE + k], STRIDE);
                }
                for (var part = 0u; part < PARTS; part++) {
                    for (var t = 0u; t < PATCH_TOKENS; t++) {
                        let first = part * TILE_TOKENS + token + t * SIZE;
                        let a = coopLoad<Right>(&x_tile[first * STRIDE + k], STRIDE);
                        for (var r = 0u; r < PATCH_ROWS; r++) {
                            let s = (part * PATCH_TOKENS + t) * PATCH_ROWS + r;
                            sums[s] = coopMultiplyAdd(w[r], a, sums[s]);
                        }
                    }
                }
            }
        }
        workgroupBarrier();
    }

    for (var t = 0u; t < PATCH_TOKENS; t++) {
        for (var r = 0u; r < PATCH_ROWS; r++) {
            for (var mine = subgroup; mine < PATCHES; mine += PATCHES) {
                for (var part = 0u; part < PARTS; part++) {
                    let s = (part * PATCH_TOKENS + t) * PATCH_ROWS + r;
                    coopStore(sums[s], &results[(part * PATCHES + mine) * BLOCK], SIZE);
                }
            }
            workgroupBarrier();
            // Neighbours write neighbouring rows of a token.
            for (var at = lane; at < PATCHES * BLOCK; at += WORKGROUP) {
                let whose = at / BLOCK;
                let row = (whose % PATCHES_DOWN * PATCH_ROWS + r) * SIZE + at % SIZE;
                let token = (whose / PATCHES_DOWN * PATCH_TOKENS + t) * SIZE + at / SIZE % SIZE;
                store(group.x, row, first_token, token, at);
            }
            workgroupBarrier();
        }
    }
}
