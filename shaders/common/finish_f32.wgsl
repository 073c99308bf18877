// Writes a row of results as f32. The operation defines `element4`.

@group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>;

fn finish_row(row: u32, count4: u32, lane: Lane) {
    for (var i = lane.index; i < count4; i += WORKGROUP) {
        out[row * count4 + i] = element4(row, i);
    }
}
