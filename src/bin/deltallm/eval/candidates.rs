//! Which policies are compared.

use deltallm::Error;
use deltallm::backend::CacheFormat;
use deltallm::delta::AttentionPolicy;
use deltallm::eval::Candidate;

/// Dense attention in f32, the policy of the attention options if they ask for another one, every
/// combination of the sweeps, and those that are given as text; none twice.
pub fn list(
    base: &AttentionPolicy,
    sweeps: &[String],
    more: &[String],
) -> Result<Vec<Candidate>, Error> {
    let dense = AttentionPolicy::plain(CacheFormat::F32);
    let mut policies = vec![dense];
    if *base != AttentionPolicy::dense() || (sweeps.is_empty() && more.is_empty()) {
        policies.push(*base);
    }
    if !sweeps.is_empty() {
        let start = if base.is_dense() { AttentionPolicy::delta() } else { *base };
        let mut texts = vec![start.to_string()];
        for sweep in sweeps {
            texts = swept(&texts, sweep)?;
        }
        for text in texts {
            policies.push(text.parse()?);
        }
    }
    for text in more {
        policies.push(text.parse()?);
    }
    let mut unique: Vec<AttentionPolicy> = Vec::new();
    for policy in policies {
        if !unique.contains(&policy) {
            unique.push(policy);
        }
    }
    Ok(named(&unique))
}

/// Each policy with each value of `field=a,b,..`.
fn swept(texts: &[String], sweep: &str) -> Result<Vec<String>, Error> {
    let refused = |allowed: &str| Error::Parameter {
        name: "sweep",
        value: sweep.to_owned(),
        allowed: allowed.to_owned(),
    };
    let Some((field, values)) = sweep.split_once('=') else {
        return Err(refused("must be FIELD=VALUE,VALUE,.. with a field of a policy"));
    };
    let mut out = Vec::new();
    for text in texts {
        let pairs: Vec<(&str, &str)> =
            text.split_whitespace().filter_map(|word| word.split_once('=')).collect();
        for value in values.split(',') {
            if value.is_empty() {
                return Err(refused("has an empty value"));
            }
            out.push(with(&pairs, field, value));
        }
    }
    Ok(out)
}

/// A policy's text with another value for one field, without the fields that have no effect then.
fn with(pairs: &[(&str, &str)], field: &str, value: &str) -> String {
    let keys = match field {
        "keys" => value,
        _ => pairs.iter().find(|(name, _)| *name == "keys").map_or("plain", |(_, keys)| keys),
    };
    let effective = |name: &str| match name {
        "theta" | "reference" | "deltas" => keys == "delta",
        "sink" | "alpha" | "shape" | "window" | "page" => keys != "plain",
        _ => true,
    };
    let mut words: Vec<String> = pairs
        .iter()
        .filter(|(name, _)| *name != field && effective(name))
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    // A combination in which the field does nothing is the policy without it.
    let known = ["theta", "reference", "deltas", "sink", "alpha", "shape", "window", "page"];
    if effective(field) || !known.contains(&field) {
        words.push(format!("{field}={value}"));
    }
    words.join(" ")
}

/// Policies under names that say what sets them apart: their keys, and every field in which those
/// that have it differ.
fn named(policies: &[AttentionPolicy]) -> Vec<Candidate> {
    let texts: Vec<String> = policies.iter().map(ToString::to_string).collect();
    let value = |text: &str, name: &str| {
        let mut pairs = text.split_whitespace().filter_map(|word| word.split_once('='));
        pairs.find(|(field, _)| *field == name).map(|(_, value)| value.to_owned())
    };
    let name = |(index, text): (usize, &String)| {
        if index == 0 {
            return "dense".to_owned();
        }
        let told = |name: &str| {
            let mut values = texts[1..].iter().filter_map(|text| value(text, name));
            let first = values.next();
            name == "keys" || name == "theta" || values.any(|value| Some(value) != first)
        };
        let words = text
            .split_whitespace()
            .filter(|word| word.split_once('=').is_some_and(|(name, _)| told(name)));
        let words: Vec<&str> =
            words.map(|word| word.strip_prefix("keys=").unwrap_or(word)).collect();
        words.join(" ")
    };
    texts
        .iter()
        .enumerate()
        .map(name)
        .zip(policies)
        .map(|(name, &attention)| Candidate { name, attention })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(base: &str, sweeps: &[&str], more: &[&str]) -> Vec<String> {
        let owned = |texts: &[&str]| texts.iter().map(|&t| t.to_owned()).collect::<Vec<_>>();
        let base = base.parse().expect("policy");
        let found = list(&base, &owned(sweeps), &owned(more)).expect("policies");
        found.into_iter().map(|candidate| candidate.name).collect()
    }

    #[test]
    fn sweeps_are_combined_and_none_comes_twice() {
        let found = names("dense", &["keys=int8,delta", "theta=0.5sigma,1sigma"], &[]);
        assert_eq!(found, ["dense", "int8", "delta theta=0.5sigma", "delta theta=1sigma"]);
        let found = names("delta", &["page=32,64"], &["keys=channel4"]);
        let expected = [
            "dense",
            "delta theta=0.7sigma page=64",
            "delta theta=0.7sigma page=32",
            "channel4 page=64",
        ];
        assert_eq!(found, expected);
        assert_eq!(names("dense", &[], &[]), ["dense", "plain"]);
    }

    #[test]
    fn what_is_no_policy_is_refused() {
        let dense = AttentionPolicy::dense();
        for sweep in ["theta", "theta=", "theta=1,,2", "thetta=1", "page=20"] {
            assert!(list(&dense, &[sweep.into()], &[]).is_err(), "{sweep}");
        }
        assert!(list(&dense, &[], &["keys=none".into()]).is_err());
    }
}
