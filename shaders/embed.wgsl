// out[t, :] = table[token t, :], for the tokens whose rows lie in this block of the table.
// One invocation copies eight elements. Grid: (ceil(chunks / 64), T).

struct Params {
    first: u32,         // first vocabulary row of the block
    rows: u32,          // rows of the block
    chunks: u32,        // chunks of eight elements in a row of `out`
    weight_chunks: u32, // likewise in a row of the table
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> tokens: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let chunk = id.x;
    let token = tokens[id.y];
    if (chunk >= params.chunks || token < params.first || token - params.first >= params.rows) {
        return;
    }
    let w = weights8((token - params.first) * params.weight_chunks + chunk);
    let at = (id.y * params.chunks + chunk) * 2u;
    out[at] = w.a;
    out[at + 1u] = w.b;
}
