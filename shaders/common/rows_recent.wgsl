// Where the original key at a position lies: the sink's in slots of their own, and behind them the
// most recent ones in a ring.

fn key_row(kv_head: u32, position: u32) -> u32 {
    let slot = select(params.sink + position % params.recent, position, position < params.sink);
    return kv_head * (params.sink + params.recent) + slot;
}
