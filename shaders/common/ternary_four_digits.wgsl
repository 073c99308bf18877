// The weights of a packed row's 16 columns, 0 to 2 in a byte each, row by row: `ternary_four.wgsl`.
fn digits_of(packed: vec4<u32>) -> array<vec4<u32>, FIELDS> {
    let mask = vec4<u32>(0x03030303u);
    return array<vec4<u32>, FIELDS>(
        packed & mask,
        (packed >> vec4<u32>(2u)) & mask,
        (packed >> vec4<u32>(4u)) & mask,
        (packed >> vec4<u32>(6u)) & mask,
    );
}
