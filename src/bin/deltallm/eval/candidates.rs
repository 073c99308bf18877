//! Which policies are compared.

use std::path::Path;

use deltallm::Error;
use deltallm::backend::CacheFormat;
use deltallm::delta::{AttentionPolicy, PolicyFile};
use deltallm::eval::Candidate;

use crate::attention_args::Attention;

/// Dense attention in f32, what the attention options say if that is another policy, every
/// combination of the sweeps over it, and those that are given as text or file; none twice.
pub fn list(base: &Attention, sweeps: &[String], more: &[String]) -> Result<Vec<Candidate>, Error> {
    let dense = Attention { policy: AttentionPolicy::plain(CacheFormat::F32), thresholds: None };
    let mut found = vec![(dense, None)];
    if sweeps.is_empty() {
        if base.policy != AttentionPolicy::dense() {
            found.push((base.clone(), None));
        }
    } else if base.thresholds.is_some() {
        return Err(Error::Parameter {
            name: "sweep",
            value: sweeps.join(" "),
            allowed: "cannot vary a --policy-file with thresholds for each head: use --compare"
                .into(),
        });
    } else {
        let mut texts = vec![base.policy.to_string()];
        for (at, sweep) in sweeps.iter().enumerate() {
            let field = |sweep: &String| sweep.split('=').next().unwrap_or_default().to_owned();
            if sweeps[..at].iter().any(|before| field(before) == field(sweep)) {
                return Err(refused(
                    sweep,
                    "names a field that another sweep has: list its values in one",
                ));
            }
            texts = swept(&texts, sweep)?;
        }
        for text in texts {
            found.push((Attention { policy: text.parse()?, thresholds: None }, None));
        }
    }
    for text in more {
        found.push(given(text)?);
    }
    let mut unique: Vec<(Attention, Option<String>)> = Vec::new();
    for one in found {
        let same = |(other, _): &(Attention, _)| {
            (other.policy, &other.thresholds) == (one.0.policy, &one.0.thresholds)
        };
        if !unique.iter().any(same) {
            unique.push(one);
        }
    }
    Ok(named(unique))
}

/// A policy as text, or the name of a policy file.
fn given(text: &str) -> Result<(Attention, Option<String>), Error> {
    let path = Path::new(text);
    if path.extension().is_none_or(|extension| extension != "json") {
        return Ok((Attention { policy: text.parse()?, thresholds: None }, None));
    }
    let PolicyFile { policy, thresholds, .. } = PolicyFile::read(path)?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok((Attention { policy, thresholds }, Some(name)))
}

/// Each policy with each value of `field=a,b,..`.
fn swept(texts: &[String], sweep: &str) -> Result<Vec<String>, Error> {
    let Some((field, values)) = sweep.split_once('=') else {
        return Err(refused(sweep, "must be FIELD=VALUE,VALUE,.. with a field of a policy"));
    };
    let mut out = Vec::new();
    for text in texts {
        let pairs: Vec<(&str, &str)> =
            text.split_whitespace().filter_map(|word| word.split_once('=')).collect();
        for value in values.split(',') {
            if value.is_empty() {
                return Err(refused(sweep, "has an empty value"));
            }
            out.push(with(&pairs, field, value));
        }
    }
    let has =
        |text: &String| text.split_whitespace().any(|word| word.starts_with(&format!("{field}=")));
    if !out.iter().any(has) {
        return Err(refused(
            sweep,
            "has no effect with these keys: it needs --attention delta or other --keys",
        ));
    }
    Ok(out)
}

fn refused(sweep: &str, allowed: &str) -> Error {
    Error::Parameter { name: "sweep", value: sweep.to_owned(), allowed: allowed.to_owned() }
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
/// that have it differ; those of a file under its name.
fn named(policies: Vec<(Attention, Option<String>)>) -> Vec<Candidate> {
    let texts: Vec<String> = policies.iter().map(|(one, _)| one.policy.to_string()).collect();
    let value = |text: &str, name: &str| {
        let mut pairs = text.split_whitespace().filter_map(|word| word.split_once('='));
        pairs.find(|(field, _)| *field == name).map(|(_, value)| value.to_owned())
    };
    let made = |index: usize, text: &str| {
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
    let mut candidates: Vec<Candidate> = Vec::with_capacity(policies.len());
    for (index, (one, name)) in policies.into_iter().enumerate() {
        let Attention { policy, thresholds } = one;
        let own = if thresholds.is_some() { " of each head" } else { "" };
        let base = name.unwrap_or_else(|| made(index, &texts[index]) + own);
        let (mut name, mut number) = (base.clone(), 2);
        while candidates.iter().any(|other| other.name == name) {
            name = format!("{base} ({number})");
            number += 1;
        }
        candidates.push(Candidate { name, attention: policy, thresholds });
    }
    candidates
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(base: &str, sweeps: &[&str], more: &[&str]) -> Vec<String> {
        let owned = |texts: &[&str]| texts.iter().map(|&t| t.to_owned()).collect::<Vec<_>>();
        let base = Attention { policy: base.parse().expect("policy"), thresholds: None };
        let found = list(&base, &owned(sweeps), &owned(more)).expect("policies");
        found.into_iter().map(|candidate| candidate.name).collect()
    }

    #[test]
    fn sweeps_are_combined_and_none_comes_twice() {
        let found = names("delta", &["keys=int8,delta", "theta=0.5sigma,1sigma"], &[]);
        assert_eq!(found, ["dense", "int8", "delta theta=0.5sigma", "delta theta=1sigma"]);
        let found = names("delta", &["page=32,64"], &["keys=channel4"]);
        let expected = [
            "dense",
            "delta theta=0.7sigma page=32",
            "delta theta=0.7sigma page=64",
            "channel4 page=64",
        ];
        assert_eq!(found, expected);
        assert_eq!(names("dense", &[], &[]), ["dense"]);
    }

    #[test]
    fn what_is_no_policy_is_refused() {
        let dense = Attention { policy: AttentionPolicy::delta(), thresholds: None };
        let twice = ["theta=1".into(), "theta=2".into()];
        assert!(list(&dense, &twice, &[]).is_err());
        let plain = Attention { policy: AttentionPolicy::dense(), thresholds: None };
        assert!(list(&plain, &["theta=1".into()], &[]).is_err());
        for sweep in ["theta", "theta=", "theta=1,,2", "thetta=1", "page=20"] {
            assert!(list(&dense, &[sweep.into()], &[]).is_err(), "{sweep}");
        }
        assert!(list(&dense, &[], &["keys=none".into()]).is_err());
        assert!(list(&dense, &[], &["not-there.json".into()]).is_err());
    }
}
