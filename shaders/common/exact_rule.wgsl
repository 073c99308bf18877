// Which keys a query sees exactly; see src/delta/window.rs.

// The first key of a query's window.
fn exact_start(query: u32) -> u32 {
    let own_page = query / PAGE * PAGE;
    let before = query + 1u - min(query + 1u, params.window);
    var start = 0u;
    switch params.window_kind {
        case 1u: { start = query / params.window * params.window; }
        case 2u: { start = before; }
        case 3u: { start = before / PAGE * PAGE; }
        default: {}
    }
    return min(start, own_page);
}

fn is_exact(key: u32, start: u32) -> bool {
    return key < params.sink || key >= start;
}
