// Quantises a row of results to i8, packed four in a word. The operation defines `element4`.

struct Activation {
    scale: f32,
    sum: i32,
}

@group(0) @binding(3) var<storage, read_write> out: array<u32>;
@group(0) @binding(4) var<storage, read_write> out_rows: array<Activation>;

fn finish_row(row: u32, count4: u32, lane: Lane) {
    // The bits of floats that are not negative are ordered like the floats, with NaN above them
    // all: a maximum of bits keeps NaN, which then shows in the row's scale and in all it touches.
    var peak_bits = bitcast<u32>(1e-5f);
    for (var i = lane.index; i < count4; i += WORKGROUP) {
        let bits = bitcast<vec4<u32>>(element4(row, i)) & vec4<u32>(0x7fffffffu);
        peak_bits = max(peak_bits, max(max(bits.x, bits.y), max(bits.z, bits.w)));
    }
    let peak = bitcast<f32>(workgroup_max_u32(peak_bits, lane));
    let inverse = divide(127.0, peak);

    var sum = 0;
    for (var i = lane.index; i < count4; i += WORKGROUP) {
        let level = clamp(round(element4(row, i) * inverse), vec4<f32>(-128.0), vec4<f32>(127.0));
        let q = vec4<i32>(level);
        out[row * count4 + i] = pack4xI8(q);
        sum += q.x + q.y + q.z + q.w;
    }
    sum = workgroup_sum_i32(sum, lane);
    if (lane.index == 0u) {
        out_rows[row] = Activation(divide(peak, 127.0), sum);
    }
}
