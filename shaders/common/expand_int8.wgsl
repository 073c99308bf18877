// Expands a channel of keys in 8 bits.

fn expand_channel(header: u32, channel: u32, out: u32) {
    for (var token = 0u; token < PAGE; token++) {
        let word = pages[header + LEVELS + token * LEVEL_WORDS + channel / 4u];
        let level = f32(extractBits(bitcast<i32>(word), 8u * (channel % 4u), 8u));
        store_expanded(out, token, level * page_half(header + SCALES, token));
    }
}
