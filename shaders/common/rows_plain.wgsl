// Where the key at a position lies: in the segment that begins with `key_first`.

fn key_row(kv_head: u32, position: u32) -> u32 {
    return kv_head * params.key_stride + position - params.key_first;
}
