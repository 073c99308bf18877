// Expands a channel of delta keys.

fn expand_channel(header: u32, channel: u32, out: u32) {
    let deltas = params.deltas + pages[header + TOTAL + 2u];
    let reference = page_half(header, channel);
    var scale = 1.0;
    if (BITS < 16u) {
        scale = page_half(header + SCALES, channel);
    }
    var key = reference;
    for (var token = 0u; token < PAGE; token++) {
        let masks = header + MASKS + token * MASK_WORDS;
        let word = pages[masks + channel / 32u];
        if (CHAIN == 0u) {
            key = reference;
        }
        if (extractBits(word, channel % 32u, 1u) == 1u) {
            var index = page_short(header + OFFSETS, token);
            for (var w = 0u; w < channel / 32u; w++) {
                index += countOneBits(pages[masks + w]);
            }
            index += countOneBits(word & ((1u << (channel % 32u)) - 1u));
            let delta = delta_of(pages[deltas + index / (32u / BITS)], index);
            key += delta * scale;
        }
        store_expanded(out, token, key);
    }
}
