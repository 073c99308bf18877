// Activations for a matrix unit that multiplies f16 and adds in f32: each in two parts, its upper 11 bits
// and 2^11 times what is left as f16, whose products are summed apart. However a driver rounds to f16, that
// is an activation to 2^-22, four roundings of an f32; products are not rounded at all where weights are
// f16. So a sum of n is within n + 4 roundings, which sums of f32 are given, too.
//
// f16 ends at 2^16. So the activations of a token are multiplied with a power of two that brings the
// largest of them to 2^14 or above. What is below 2^-28 of it has the second part alone, so 11 bits. A device
// that takes what is no normal f16 for zero loses bits of second parts from 2^-17 of it on.

const PARTS = 2u;
const LOW = 2048.0;
const HIGH = 0x1p-11f;
// The smallest normal f16.
const NORMAL = 0x1p-14f;
// Invocations side by side that look for the largest activation of a token.
const READERS = 8u;

// Of each token the bits of its largest activation, without a sign.
var<workgroup> largest: array<atomic<u32>, TILE_TOKENS>;

fn begin(first_token: u32, lane: u32) {
    for (var token = lane; token < TILE_TOKENS; token += WORKGROUP) {
        atomicStore(&largest[token], 0u);
    }
    workgroupBarrier();
    for (var token = lane / READERS; token < TILE_TOKENS; token += WORKGROUP / READERS) {
        if (first_token + token < params.tokens) {
            let first = (first_token + token) * 2u * params.chunks;
            var most = vec4<u32>();
            for (var i = lane % READERS; i < 2u * params.chunks; i += READERS) {
                most = max(most, bitcast<vec4<u32>>(x[first + i]) & vec4<u32>(0x7fffffffu));
            }
            atomicMax(&largest[token], max(max(most.x, most.y), max(most.z, most.w)));
        }
    }
    workgroupBarrier();
}

// The biased exponent of the power of two for a token. At most 253, so that its inverse is a normal
// number, too. What is made of an infinity or NaN is not finite.
fn exponent_for(token: u32) -> u32 {
    return min(127u + 14u + 127u - (atomicLoad(&largest[token]) >> 23u), 253u);
}

fn put_x(token: u32, to: u32, a: vec4<f32>) {
    let scaled = a * bitcast<f32>(exponent_for(token) << 23u);
    // Rounded by their bits: a compiler may take a number for what it is after a conversion to f16 and back.
    let bits = (bitcast<vec4<u32>>(scaled) + vec4<u32>(0x1000u)) & vec4<u32>(0xffffe000u);
    let normal = abs(scaled) >= vec4<f32>(NORMAL);
    let high = select(vec4<f32>(), bitcast<vec4<f32>>(bits), normal);
    let low = (scaled - high) * LOW;
    for (var i = 0u; i < 4u; i++) {
        x_tile[to + i] = Element(high[i]);
        x_tile[TILE_TOKENS * STRIDE + to + i] = Element(low[i]);
    }
}

fn result(token: u32, at: u32) -> f32 {
    let sum = results[at] + results[PATCHES * BLOCK + at] * HIGH;
    return sum * bitcast<f32>((254u - exponent_for(token)) << 23u);
}
