// The token, from the best `count` candidates in order. One workgroup; see SampleStep for the rule.

struct Params {
    count: u32,       // candidates, at most 256
    temperature: f32, // 0 takes the first
    min_p: f32,
    top_p: f32,
    draw: f32,
    slot: u32,        // where the choice goes
}

struct Choice {
    token: u32,
    not_finite: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> kept: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read_write> choices: array<Choice>;
// The first token of the next step, should that go on without the host.
@group(0) @binding(3) var<storage, read_write> tokens: array<u32>;
// The tokens of the context, a bit each.
@group(0) @binding(4) var<storage, read_write> seen: array<u32>;

var<workgroup> weights: array<f32, 256>;

// The logit of a candidate's key.
fn logit(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, key >= 0x80000000u));
}

// Sums run in the candidates' order, one after another: the rule says so, and they are few.
fn draw() -> u32 {
    var all = 0.0;
    for (var i = 0u; i < params.count; i++) {
        all += weights[i];
    }
    var left = 0u;
    var sum = 0.0;
    for (; left < params.count && weights[left] >= params.min_p; left++) {
        sum += weights[left];
        if (sum >= params.top_p * all) {
            left++;
            break;
        }
    }
    let threshold = params.draw * sum;
    var reached = 0.0;
    for (var i = 0u; i < left; i++) {
        reached += weights[i];
        if (reached > threshold) {
            return i;
        }
    }
    return max(left, 1u) - 1u;
}

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) lane: u32) {
    let best = kept[0].x;
    if (lane < params.count) {
        weights[lane] = exp((logit(kept[lane].x) - logit(best)) / params.temperature);
    }
    workgroupBarrier();
    if (lane != 0u) {
        return;
    }
    // NaN has the largest key, above that of infinity; below are minus infinity and nothing.
    let not_finite = best >= 0xff800000u || best <= 0x007fffffu;
    var token = kept[0].y;
    if (not_finite) {
        // Whatever it is, the next step must find it in the vocabulary.
        token = 0u;
    } else if (params.temperature > 0.0 && params.count > 1u) {
        token = kept[draw()].y;
    }
    choices[params.slot] = Choice(token, u32(not_finite));
    tokens[0] = token;
    seen[token / 32u] |= 1u << (token % 32u);
}
