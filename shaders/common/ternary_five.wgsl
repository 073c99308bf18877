// Five rows in a byte: fields 0 to 4 are the digits of a number v below 243 in base 3, the first the
// most significant. The byte is q = ceil(v * 256 / 243), so that floor(q * 3^n / 256) is the number that
// the first n digits make: after n multiplications by 3 what has left the lower byte, and no division.
//
// Such numbers are multiplied as they are, and digits taken from each other once, in the sums. That saves
// the masks of what is left of a byte after every digit but one, where the numbers begin anew: they stay
// below 27, and within a signed byte. For the 20 weights of a word 3 + 2 + 5 * 8 operations and 5
// dot products, 2.5 for a weight; 1.75 on processors that shift and add, or mask and combine, at once.

const FIELDS = 5u;

// The sums of a packed row, of its numbers as in `Weights`.
struct Sums {
    first: vec4<i32>,
    last: i32,
}

// 16 columns of a packed row, ready to be multiplied: the numbers made of these digits.
struct Weights {
    of_0: vec4<u32>,
    of_01: vec4<u32>,
    of_2: vec4<u32>,
    of_23: vec4<u32>,
    of_234: vec4<u32>,
}

// Bytes in 16-bit lanes have room for five multiplications by 3: 255 * 243 is below 65536.
const LOWER = vec4<u32>(0x00ff00ffu);

fn thrice(lanes: vec4<u32>) -> vec4<u32> {
    return (lanes << vec4<u32>(1u)) + lanes;
}

// The upper bytes of lanes, those of even columns beside those of odd ones.
fn upper(even: vec4<u32>, odd: vec4<u32>) -> vec4<u32> {
    return ((even >> vec4<u32>(8u)) & LOWER) | (odd & ~LOWER);
}

fn weights_of(packed: vec4<u32>) -> Weights {
    var w: Weights;
    var even = thrice(packed & LOWER);
    var odd = thrice((packed >> vec4<u32>(8u)) & LOWER);
    w.of_0 = upper(even, odd);
    even = thrice(even);
    odd = thrice(odd);
    w.of_01 = upper(even, odd);
    even = thrice(even & LOWER);
    odd = thrice(odd & LOWER);
    w.of_2 = upper(even, odd);
    even = thrice(even);
    odd = thrice(odd);
    w.of_23 = upper(even, odd);
    even = thrice(even);
    odd = thrice(odd);
    w.of_234 = upper(even, odd);
    return w;
}

// Adds the products of 16 columns with 16 activations.
fn plus_products(sums: Sums, w: Weights, a: vec4<u32>) -> Sums {
    let first =
        vec4<i32>(dot16(w.of_0, a), dot16(w.of_01, a), dot16(w.of_2, a), dot16(w.of_23, a));
    return Sums(sums.first + first, sums.last + dot16(w.of_234, a));
}

// The sums of each field: a number less three times that of the digits before its last is this digit.
fn fields_of(sums: Sums) -> array<i32, FIELDS> {
    let s = sums.first;
    return array<i32, FIELDS>(s.x, s.y - 3 * s.x, s.z, s.w - 3 * s.z, sums.last - 3 * s.w);
}
