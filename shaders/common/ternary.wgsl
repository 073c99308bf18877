// Ternary matrices: several output rows in a byte, several matrices stacked in one buffer.
//
// A word of weights is 4 columns x FIELDS rows. How the rows lie in its bytes is the packing's own:
// `ternary_four.wgsl` or `ternary_five.wgsl`. There a weight is 0, 1 or 2 and stands for -1, 0, +1: the
// sum of the activations, which the quantiser leaves beside the scale, takes the 1 off again.

struct Activation {
    scale: f32,
    sum: i32,
}

// One matrix of the stack, or the part of it that lies in this buffer.
struct Segment {
    start: u32,  // its first packed row in the buffer
    count: u32,  // its packed rows in the buffer
    source: u32, // the first of them, counted in the matrix
    apart: u32,  // packed rows of the whole matrix: the distance of the fields' rows
    rows: u32,   // output rows of the whole matrix
    offset: u32, // column of `out` of its first row
    scale: f32,
    unused: u32,
}

@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(2) var<uniform> segments: array<Segment, 4>;
@group(0) @binding(3) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> x_rows: array<Activation>;
@group(0) @binding(5) var<storage, read_write> out: array<f32>;

fn dot16(w: vec4<u32>, a: vec4<u32>) -> i32 {
    return dot4(w.x, a.x) + dot4(w.y, a.y) + dot4(w.z, a.z) + dot4(w.w, a.w);
}

// Writes the results of a packed row of the buffer for one token.
fn store_fields(packed_row: u32, token: u32, sums: Sums) {
    let activation = x_rows[token];
    var fields = fields_of(sums);
    for (var s = 0u; s < 4u; s++) {
        let segment = segments[s];
        if (packed_row < segment.start || packed_row >= segment.start + segment.count) {
            continue;
        }
        let scale = activation.scale * segment.scale;
        let first = segment.source + packed_row - segment.start;
        for (var field = 0u; field < FIELDS; field++) {
            let row = first + field * segment.apart;
            if (row < segment.rows) {
                let at = token * params.out_stride + segment.offset + row;
                let value = f32(fields[field] - activation.sum) * scale;
                if (ACCUMULATE == 1u) {
                    out[at] += value;
                } else {
                    out[at] = value;
                }
            }
        }
    }
}
