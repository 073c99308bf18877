// Expands compressed pages to the keys that they stand for, for the many queries of a prompt.
// An invocation takes a channel. Grid: (pages, G).

struct Params {
    page: u32,       // first page of this dispatch
    page_first: u32, // of the segment of pages: its first page
    kv_heads: u32,
    deltas: u32,     // word at which the deltas of the segment begin
    first: u32,      // position of the first key in `expanded`
    stride: u32,     // keys a KV head in `expanded`
}

@group(0) @binding(0) var<uniform> params: Params;
// [KV head][key][element], elements padded to fours.
@group(0) @binding(5) var<storage, read_write> expanded: array<f32>;

fn store_expanded(out: u32, token: u32, key: f32) {
    expanded[out + token * (4u * DIM4)] = key;
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) workgroup: vec3<u32>,
) {
    let page = params.page + workgroup.x;
    let header = page_header(workgroup.y, page);
    let row = workgroup.y * params.stride + page * PAGE - params.first;
    for (var channel = lane; channel < HEAD_DIM; channel += WORKGROUP) {
        expand_channel(header, channel, row * (4u * DIM4) + channel);
    }
}
