//! Exact match and F1 of extracted answers, as the official evaluation script of SQuAD 2.0 defines
//! them (<https://rajpurkar.github.io/SQuAD-explorer/>; Rajpurkar et al., arXiv 1806.03822).

use std::collections::HashMap;

/// How well an answer matches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Match {
    /// 1 where the normalised texts are equal, else 0.
    pub exact: f64,
    /// F1 of the bags of words.
    pub f1: f64,
}

/// The best match of `answer` with any of the right answers; the empty text is the answer to a
/// question that has none.
///
/// Right answers that are nothing after [`normalise`] are ignored; where none is left, only an empty
/// answer is right.
pub fn score(answer: &str, right: &[String]) -> Match {
    let found = normalise(answer);
    let mut right: Vec<String> =
        right.iter().map(|r| normalise(r)).filter(|r| !r.is_empty()).collect();
    if right.is_empty() {
        right.push(String::new());
    }
    right.iter().fold(Match { exact: 0.0, f1: 0.0 }, |best, right| Match {
        exact: best.exact.max(f64::from(u8::from(*right == found))),
        f1: best.f1.max(f1(&found, right)),
    })
}

/// Lower case, without ASCII punctuation, without the articles a, an and the, and with single spaces.
pub fn normalise(text: &str) -> String {
    let lower = text.to_lowercase();
    let kept: String = lower.chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let mut out = String::with_capacity(kept.len());
    for word in words(&kept) {
        match word {
            "a" | "an" | "the" => out.push(' '),
            _ => out.push_str(word),
        }
    }
    out.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The text in runs of letters and digits, and what stands between them.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let inside = rest.chars().next()?.is_alphanumeric();
        let end = rest.find(|c: char| c.is_alphanumeric() != inside).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        rest = after;
        Some(word)
    })
}

/// F1 of two normalised texts.
fn f1(found: &str, right: &str) -> f64 {
    let (found, right): (Vec<_>, Vec<_>) = (found.split(' ').collect(), right.split(' ').collect());
    if found == [""] || right == [""] {
        return f64::from(u8::from(found == right));
    }
    let mut counts: HashMap<&str, usize> = HashMap::new();
    right.iter().for_each(|word| *counts.entry(word).or_default() += 1);
    let mut same = 0;
    for word in &found {
        if let Some(left) = counts.get_mut(word).filter(|left| **left > 0) {
            *left -= 1;
            same += 1;
        }
    }
    if same == 0 {
        return 0.0;
    }
    let (precision, recall) = (same as f64 / found.len() as f64, same as f64 / right.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand, after the definition; tests/fixtures/eval has the same and more from the definition
    /// in Python.
    #[test]
    fn hard_cases() {
        let cases: [(&str, &[&str], f64, f64); 16] = [
            ("Norman", &["Normans", "norman"], 1.0, 1.0),
            ("The  Normans!", &["normans"], 1.0, 1.0),
            ("an apple a day", &["apple day"], 1.0, 1.0),
            ("U.S.", &["US"], 1.0, 1.0),
            ("theatre", &["atre"], 0.0, 0.0),
            ("a-b", &["ab"], 1.0, 1.0),
            // An en dash is not ASCII punctuation, but ends a word.
            ("the–end", &["–end"], 1.0, 1.0),
            ("", &[], 1.0, 1.0),
            ("", &["", "the", "!"], 1.0, 1.0),
            ("", &["something"], 0.0, 0.0),
            ("something", &[], 0.0, 0.0),
            ("the", &[], 1.0, 1.0),
            ("red ball", &["the red ball and hat"], 0.0, 2.0 * 0.5 / 1.5),
            ("red red", &["red"], 0.0, 2.0 * 0.5 / 1.5),
            ("x y", &["x z", "x y z"], 0.0, 0.8),
            ("ÉCOLE", &["école"], 1.0, 1.0),
        ];
        for (answer, right, exact, f1) in cases {
            let right: Vec<String> = right.iter().map(|&r| r.to_owned()).collect();
            let found = score(answer, &right);
            assert!(
                (found.exact - exact).abs() + (found.f1 - f1).abs() < 1e-12,
                "{answer:?} {right:?}: {found:?}"
            );
        }
    }
}
