// Rotates queries in place, and appends rotated keys and values to the cache. Pairs of a head are
// (i, i + D / 2). One invocation rotates one pair of a query, or writes two neighbouring elements
// of a key or value. Grid: (ceil((H + 2 G) D / 2 / 64), tokens of this dispatch).

struct Params {
    position: u32,     // of the step's first token
    first: u32,        // first token of this dispatch, counted from the step's
    stride: u32,       // elements of a padded row of qkv
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    cache_dim: u32,    // elements of a head in the cache: head_dim, padded
    key_first: u32,    // of the segment of plain keys: its first position
    key_stride: u32,   // and its tokens a KV head
    value_first: u32,  // the same of the segment of values
    value_stride: u32,
    sink: u32,         // slots of the sink's keys
    recent: u32,       // slots of recent keys
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> qkv: array<f32>;
// [position][pair]: (cosine, sine)
@group(0) @binding(2) var<storage, read> rope: array<vec2<f32>>;

// Element `i` of the rotated head that starts at `head` of qkv.
fn rotated(head: u32, position: u32, i: u32) -> f32 {
    let half = params.head_dim / 2u;
    if (i < half) {
        let turn = rope[position * half + i];
        return qkv[head + i] * turn.x - qkv[head + half + i] * turn.y;
    }
    let turn = rope[position * half + i - half];
    return qkv[head + i] * turn.x + qkv[head + i - half] * turn.y;
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let half = params.head_dim / 2u;
    let token = params.first + id.y;
    let position = params.position + token;
    let head = id.x / half;
    let i = id.x % half;
    let start = token * params.stride + head * params.head_dim;
    if (head < params.heads) {
        let a = rotated(start, position, i);
        let b = rotated(start, position, i + half);
        qkv[start + i] = a;
        qkv[start + half + i] = b;
    } else if (head < params.heads + params.kv_heads) {
        let row = key_row(head - params.heads, position);
        let pair = vec2<f32>(
            rotated(start, position, 2u * i),
            rotated(start, position, 2u * i + 1u),
        );
        store_key2(row * (params.cache_dim / 2u) + i, pair);
    } else if (head < params.heads + 2u * params.kv_heads) {
        let value_head = head - params.heads - params.kv_heads;
        let row = value_head * params.value_stride + position - params.value_first;
        let pair = vec2<f32>(qkv[start + 2u * i], qkv[start + 2u * i + 1u]);
        store_value2(row * (params.cache_dim / 2u) + i, pair);
    }
}
