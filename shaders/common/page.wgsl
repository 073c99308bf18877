// Reads compressed pages of keys; their bits are described in src/delta/page.rs. The headers of a
// segment's pages stand first, [page][KV head], and behind them the deltas of all.

@group(0) @binding(6) var<storage, read> pages: array<u32>;

// The word at which a page begins.
fn page_header(kv_head: u32, page: u32) -> u32 {
    return 1u + ((page - params.page_first) * params.kv_heads + kv_head) * HEADER;
}

// Entry `index` of an array of f16.
fn page_half(at: u32, index: u32) -> f32 {
    return unpack2x16float(pages[at + index / 2u])[index % 2u];
}

// Entry `index` of an array of 16 bits.
fn page_short(at: u32, index: u32) -> u32 {
    return extractBits(pages[at + index / 2u], 16u * (index % 2u), 16u);
}

// Delta `index`, before its channel's scale, of the word that holds it.
fn delta_of(word: u32, index: u32) -> f32 {
    if (BITS == 16u) {
        return unpack2x16float(word)[index % 2u];
    }
    return f32(extractBits(bitcast<i32>(word), BITS * (index % (32u / BITS)), BITS));
}
