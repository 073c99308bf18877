// Candidates of a token, straight from the logits: (key, id), where a larger key is a better token.
//
// The key is the logit after the repetition penalty, its bits turned so that they are ordered like
// the floats. NaN gets the largest key of all: it wins every comparison and is found at the end.

@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read> seen: array<u32>;

fn candidate(i: u32) -> vec2<u32> {
    if (i >= params.count) {
        return vec2<u32>(0u, 0xffffffffu);
    }
    var logit = logits[params.first + i];
    if (params.penalty != 1.0 && ((seen[i / 32u] >> (i % 32u)) & 1u) == 1u) {
        logit = select(logit * params.penalty, divide(logit, params.penalty), logit > 0.0);
    }
    let bits = bitcast<u32>(logit);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return vec2<u32>(0xffffffffu, i);
    }
    // Zero of either sign is the same logit.
    let magnitude = bits & 0x7fffffffu;
    let negative = bits > 0x80000000u;
    return vec2<u32>(select(0x80000000u | magnitude, ~bits, negative), i);
}
