// Scores with delta keys: of each key only the deltas that are kept are read and multiplied.

// Leaves the queries times the scales; returns their products with the reference, which all keys of
// the page share.
fn prepare_page(header: u32, lane: Lane) -> vec4<f32> {
    var base = vec4<f32>();
    for (var c = lane.index; c < HEAD_DIM; c += WORKGROUP) {
        let q = query_channel(c);
        base += q * page_half(header, c);
        parts[c] = q;
        if (BITS < 16u) {
            parts[c] *= page_half(header + SCALES, c);
        }
    }
    // What each invocation leaves, others read.
    workgroupBarrier();
    return workgroup_sum_vec4f(base, lane);
}

// The invocations of a key take turns with the words of its mask.
fn page_part(header: u32, key: u32, share: u32) -> vec4<f32> {
    let deltas = params.deltas + pages[header + TOTAL + 2u];
    var next = page_short(header + OFFSETS, key);
    // The word that holds the next delta, kept while it does.
    var word = 0u;
    var part = vec4<f32>();
    for (var w = 0u; w < MASK_WORDS; w++) {
        var mask = pages[header + MASKS + key * MASK_WORDS + w];
        let kept = countOneBits(mask);
        if (w % LANES == share) {
            for (var i = 0u; i < kept; i++) {
                let index = next + i;
                if (i == 0u || index % (32u / BITS) == 0u) {
                    word = pages[deltas + index / (32u / BITS)];
                }
                let channel = 32u * w + firstTrailingBit(mask);
                part += parts[channel] * delta_of(word, index);
                mask &= mask - 1u;
            }
        }
        next += kept;
    }
    return part;
}
