// Keys that are exact for every query.

const PASSES = 1u;

fn window_start(query: u32) -> u32 {
    return 0u;
}

fn tile_has(exact: bool, first: u32, end: u32, first_start: u32, last_start: u32) -> bool {
    return true;
}

fn takes(exact: bool, keys: vec4<u32>, start: u32) -> vec4<bool> {
    return vec4<bool>(true);
}

fn key4_as(exact: bool, kv_head: u32, position: u32, d4: u32) -> vec4<f32> {
    return key4(key_row(kv_head, position) * DIM4 + d4);
}
