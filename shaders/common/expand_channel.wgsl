// Expands a channel of keys in 4 or 2 bits.

fn expand_channel(header: u32, channel: u32, out: u32) {
    let scale_minimum = unpack2x16float(pages[header + SCALES + channel]);
    let word_of_token = channel / (32u / BITS);
    let shift = channel % (32u / BITS) * BITS;
    for (var token = 0u; token < PAGE; token++) {
        let word = pages[header + LEVELS + token * LEVEL_WORDS + word_of_token];
        let level = f32(extractBits(word, shift, BITS));
        store_expanded(out, token, level * scale_minimum.x + scale_minimum.y);
    }
}
