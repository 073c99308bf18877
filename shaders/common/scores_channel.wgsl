// Scores with keys in 4 or 2 bits, a scale and a minimum a channel.

// Leaves the queries times the scales; returns their products with the minima, which all keys of
// the page share.
fn prepare_page(header: u32, lane: Lane) -> vec4<f32> {
    var base = vec4<f32>();
    for (var c = lane.index; c < HEAD_DIM; c += WORKGROUP) {
        let q = query_channel(c);
        let scale_minimum = unpack2x16float(pages[header + SCALES + c]);
        parts[c] = q * scale_minimum.x;
        base += q * scale_minimum.y;
    }
    // What each invocation leaves, others read.
    workgroupBarrier();
    return workgroup_sum_vec4f(base, lane);
}

fn page_part(header: u32, key: u32, share: u32) -> vec4<f32> {
    var part = vec4<f32>();
    for (var w = share; w < LEVEL_WORDS; w += LANES) {
        let word = pages[header + LEVELS + key * LEVEL_WORDS + w];
        let first = w * (32u / BITS);
        for (var i = 0u; i < min(32u / BITS, HEAD_DIM - first); i++) {
            part += parts[first + i] * f32(extractBits(word, BITS * i, BITS));
        }
    }
    return part;
}
