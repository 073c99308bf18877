// The weights of a packed row's 16 columns, 0 to 2 in a byte each, row by row: of the numbers that
// `ternary_five.wgsl` makes, each less three times that of the digits before its last. No byte borrows.
fn digits_of(packed: vec4<u32>) -> array<vec4<u32>, FIELDS> {
    let w = weights_of(packed);
    return array<vec4<u32>, FIELDS>(
        w.of_0,
        w.of_01 - thrice(w.of_0),
        w.of_2,
        w.of_23 - thrice(w.of_2),
        w.of_234 - thrice(w.of_23),
    );
}
