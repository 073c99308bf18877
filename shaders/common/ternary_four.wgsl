// Four rows in a byte, two bits each: as checkpoints have them. For the 16 weights of a word 7
// operations and 4 dot products, 0.7 for a weight.

const FIELDS = 4u;

// The sums of a packed row, of each field.
alias Sums = vec4<i32>;

// 16 columns of a packed row, ready to be multiplied.
alias Weights = vec4<u32>;

fn weights_of(packed: vec4<u32>) -> Weights {
    return packed;
}

// Adds the products of 16 columns with 16 activations. Field j of a word's bytes, masked out, is four
// weights of row j, ready for a dot product with four packed i8.
fn plus_products(sums: Sums, w: Weights, a: vec4<u32>) -> Sums {
    let mask = vec4<u32>(0x03030303u);
    return sums + vec4<i32>(
        dot16(w & mask, a),
        dot16((w >> vec4<u32>(2u)) & mask, a),
        dot16((w >> vec4<u32>(4u)) & mask, a),
        dot16((w >> vec4<u32>(6u)) & mask, a),
    );
}

fn fields_of(sums: Sums) -> array<i32, FIELDS> {
    return array<i32, FIELDS>(sums.x, sums.y, sums.z, sums.w);
}
