// Scores with keys in 8 bits, a scale a token.

fn prepare_page(header: u32, lane: Lane) -> vec4<f32> {
    return vec4<f32>();
}

fn page_part(header: u32, key: u32, share: u32) -> vec4<f32> {
    var part = vec4<f32>();
    for (var d = share; d < LEVEL_WORDS; d += LANES) {
        let word = pages[header + LEVELS + key * LEVEL_WORDS + d];
        part += scores4(d, vec4<f32>(unpack4xI8(word)));
    }
    return part * page_half(header + SCALES, key);
}
