//! What a cache holds, for people and for scripts.

use deltallm::delta::{CacheStatistics, PageStatistics};
use deltallm::model::MemoryUse;
use serde_json::{Value, json};

use crate::output::{bytes, say, tokens};

/// Prints what keys and values take, and a table of the compressed heads, on standard error.
pub fn print(statistics: &CacheStatistics, memory: &MemoryUse) {
    let total = statistics.total();
    say!("policy    {}", statistics.policy);
    say!("cache     {}", tokens(statistics.length));
    for (name, in_use, held) in [
        ("keys", statistics.key_bytes, memory.keys),
        ("values", statistics.value_bytes, memory.values),
    ] {
        let dense = bytes(statistics.dense_bytes / 2);
        let (in_use, held) = (bytes(in_use), bytes(held));
        say!(
            "{name:<10}{in_use} in use, where dense f16 takes {dense}; {held} held with room to grow"
        );
    }
    if statistics.policy.is_dense() {
        return;
    }
    let Some(bits) = total.bits_per_element() else {
        say!("          no page of {} tokens is full yet", statistics.policy.page);
        return;
    };
    say!(
        "pages     {} of {} tokens, {}: {bits:.2} bits a key element",
        total.pages,
        statistics.policy.page,
        bytes(total.bytes())
    );
    if let (Some(zeros), Some(sparsity)) = (total.zero_share(), total.sparsity(&statistics.policy))
    {
        let alpha = statistics.policy.prefill.share;
        say!(
            "zeros     {} of the deltas; sparsity {} (zeros times 1 - {alpha})",
            percent(zeros),
            percent(sparsity)
        );
    }
    if let Some(theta) = total.theta {
        say!("theta     {:.4} to {:.4}, mean {:.4}", theta.min, theta.max, theta.mean());
    }
    table(&statistics.heads);
}

/// Zeros of each KV head, or bits a key element where keys are not deltas: a line a layer.
fn table(layers: &[Vec<PageStatistics>]) {
    let deltas = layers.iter().flatten().any(|head| head.theta.is_some());
    let cell = |head: &PageStatistics| match head.zero_share() {
        Some(zeros) => percent(zeros),
        None => head.bits_per_element().map_or("-".into(), |bits| format!("{bits:.2}")),
    };
    let heads = layers.first().map_or(0, Vec::len);
    let names: String = (0..heads).map(|head| format!("{head:>8}")).collect();
    let what = if deltas { "zeros" } else { "bits a key element" };
    say!("{what} of each layer (rows) and KV head (columns)");
    say!("layer   all{names}");
    for (layer, heads) in layers.iter().enumerate() {
        let all: PageStatistics = heads.iter().copied().sum();
        let cells: String = heads.iter().map(|head| format!("{:>8}", cell(head))).collect();
        say!("{layer:>5}{:>6}{cells}", cell(&all));
    }
}

/// What keys and values take, each: in use, held with room to grow, and in use were they dense f16.
pub fn bytes_json(statistics: &CacheStatistics, memory: &MemoryUse) -> (Value, Value) {
    let part = |in_use: u64, held: u64| {
        let dense = statistics.dense_bytes / 2;
        json!({ "in_use": in_use, "held": held, "dense_f16": dense })
    };
    (part(statistics.key_bytes, memory.keys), part(statistics.value_bytes, memory.values))
}

/// Everything that was counted: the whole cache, each layer, each head.
pub fn to_json(statistics: &CacheStatistics) -> Value {
    let layers: Vec<Value> = (0..statistics.heads.len())
        .map(|layer| {
            let mut object = counts(statistics, &statistics.layer(layer));
            let heads = statistics.heads[layer].iter();
            object["heads"] = heads.map(|head| counts(statistics, head)).collect();
            object
        })
        .collect();
    let mut object = counts(statistics, &statistics.total());
    object["length"] = statistics.length.into();
    object["layers"] = layers.into();
    object
}

fn counts(statistics: &CacheStatistics, of: &PageStatistics) -> Value {
    json!({
        "pages": of.pages,
        "compressed_tokens": of.tokens,
        "key_elements": of.elements,
        "zero_elements": of.theta.map(|_| of.zeros),
        "zeros": of.zero_share(),
        "sparsity": of.sparsity(&statistics.policy),
        "bits_per_key_element": of.bits_per_element(),
        "bytes": of.bytes(),
        "theta": of.theta.map(|theta| json!({
            "min": theta.min,
            "mean": theta.mean(),
            "max": theta.max,
        })),
    })
}

/// A share as people read it.
pub fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}
