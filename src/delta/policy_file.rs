//! A policy as a small JSON file, for people and for every command.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use super::policy::AttentionPolicy;
use super::thresholds::Thresholds;
use crate::checkpoint::Object;
use crate::error::{Error, Result};
use crate::formats::AttentionShape;
use crate::whole_file::write_whole;

const FORMAT: &str = "deltallm policy";
const VERSION: u64 = 1;

/// How keys and values are kept, with a threshold for each layer and KV head where there are such.
///
/// ```json
/// {
///   "format": "deltallm policy",
///   "version": 1,
///   "policy": "keys=delta theta=0.7sigma reference=mean ...",
///   "thresholds": [
///     [0.65, 0.8],
///     [0.7, 0.5]
///   ],
///   "calibration": { ... }
/// }
/// ```
///
/// `thresholds` are `[layers][G]`; they and `calibration` may be absent. A policy without
/// thresholds is for any model. Nothing follows from `calibration`: it is a record.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyFile {
    /// The policy. With thresholds, its own one counts for their unit only.
    pub policy: AttentionPolicy,
    /// In place of the policy's one.
    pub thresholds: Option<Thresholds>,
    /// How it was made.
    pub calibration: Option<Calibration>,
}

/// For the record: how thresholds were found.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// The model's architecture, as its `config.json` names it.
    pub architecture: String,
    /// Its layers.
    pub layers: usize,
    /// Its heads.
    pub attention: AttentionShape,
    /// What was asked for, in words.
    pub budget: String,
    /// Tokens of a segment of the text.
    pub length: usize,
    /// Segments that thresholds were fitted to.
    pub fitting_segments: usize,
    /// Segments that they were not fitted to.
    pub held_out_segments: usize,
    /// What came out.
    pub measured: Vec<Measured>,
}

/// What a policy does to a model on some text.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Which policy.
    pub policy: String,
    /// Which part of the text.
    pub text: String,
    /// Tokens that were foretold.
    pub tokens: usize,
    /// The paper's sparsity.
    pub sparsity: f64,
    /// Bits that an element of a compressed key takes.
    pub bits_per_key_element: f64,
    /// Mean divergence from dense attention, in nats a token.
    pub kl: f64,
    /// Perplexity under the policy.
    pub perplexity: f64,
    /// Perplexity with dense attention.
    pub dense_perplexity: f64,
}

impl PolicyFile {
    /// Reads a file, and checks everything in it. Fields that there are not are refused: a word that
    /// is misspelt should not be a threshold that is left out.
    ///
    /// # Errors
    /// Names the file and the field.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let object = Object::open(path.as_ref())?;
        only(&object, &["format", "version", "policy", "thresholds", "calibration"])?;
        let format = object.required("format", object.text("format")?)?;
        if format != FORMAT {
            return Err(object.error("format", format!("is {format:?}, expected {FORMAT:?}")));
        }
        let version = object.required("version", object.get("version"))?;
        if version.as_u64() != Some(VERSION) {
            return Err(object.error("version", format!("is {version}, expected {VERSION}")));
        }
        let policy = object.required("policy", object.text("policy")?)?;
        let policy: AttentionPolicy =
            policy.parse().map_err(|error: Error| object.error("policy", error.to_string()))?;
        let thresholds = object.get("thresholds").map(|value| thresholds(&object, value));
        let thresholds = thresholds.transpose()?;
        if let Some(thresholds) = &thresholds {
            // Which model it is for is not known yet.
            let (layers, heads) = (thresholds.layers(), thresholds.kv_heads());
            let checked = thresholds.check(&policy, layers, heads);
            checked.map_err(|error| object.error("thresholds", error.to_string()))?;
        }
        let calibration = object.object("calibration")?;
        let calibration = calibration.as_ref().map(Calibration::read).transpose()?;
        Ok(Self { policy, thresholds, calibration })
    }

    /// Writes a file, which appears when it is whole and replaces what was there.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] where something that is not a regular file stands there.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        write_whole(path.as_ref(), &self.to_text())
    }

    /// What [`PolicyFile::write`] writes.
    pub fn to_text(&self) -> String {
        let text = |text: &str| Value::from(text).to_string();
        let mut out = format!(
            "{{\n  \"format\": {},\n  \"version\": {VERSION},\n  \"policy\": {}",
            text(FORMAT),
            text(&self.policy.to_string())
        );
        if let Some(thresholds) = &self.thresholds {
            // A line a layer; numbers as short as they are read back.
            let row = |heads: &[f32]| {
                let heads: Vec<String> = heads.iter().map(f32::to_string).collect();
                format!("    [{}]", heads.join(", "))
            };
            let rows: Vec<String> = thresholds.iter().map(row).collect();
            let _ = write!(out, ",\n  \"thresholds\": [\n{}\n  ]", rows.join(",\n"));
        }
        if let Some(c) = &self.calibration {
            let AttentionShape { heads, kv_heads, head_dim } = c.attention;
            let _ = write!(
                out,
                ",\n  \"calibration\": {{\n    \"model\": {{ \"architecture\": {}, \"layers\": {}, \
                 \"heads\": {heads}, \"kv_heads\": {kv_heads}, \"head_dim\": {head_dim} }},\n    \
                 \"budget\": {},\n    \"length\": {},\n    \"fitting_segments\": {},\n    \
                 \"held_out_segments\": {},\n    \"measured\": [",
                text(&c.architecture),
                c.layers,
                text(&c.budget),
                c.length,
                c.fitting_segments,
                c.held_out_segments,
            );
            for (i, m) in c.measured.iter().enumerate() {
                let _ = write!(
                    out,
                    "{}\n      {{ \"policy\": {}, \"text\": {}, \"tokens\": {}, \"sparsity\": {}, \
                     \"bits_per_key_element\": {}, \"kl\": {}, \"perplexity\": {}, \
                     \"dense_perplexity\": {} }}",
                    if i == 0 { "" } else { "," },
                    text(&m.policy),
                    text(&m.text),
                    m.tokens,
                    // Numbers that JSON has no name for become null.
                    Value::from(m.sparsity),
                    Value::from(m.bits_per_key_element),
                    Value::from(m.kl),
                    Value::from(m.perplexity),
                    Value::from(m.dense_perplexity),
                );
            }
            out += "\n    ]\n  }";
        }
        out + "\n}\n"
    }
}

impl Calibration {
    fn read(object: &Object) -> Result<Self> {
        only(
            object,
            &["model", "budget", "length", "fitting_segments", "held_out_segments", "measured"],
        )?;
        let model = object.required("model", object.object("model")?)?;
        only(&model, &["architecture", "layers", "heads", "kv_heads", "head_dim"])?;
        let number = |field| model.required(field, model.count(field)?);
        let segments = |field| object.required(field, whole(object, field)?);
        let measured = object.required("measured", object.objects("measured")?)?;
        Ok(Self {
            architecture: text(&model, "architecture")?,
            layers: number("layers")?,
            attention: AttentionShape {
                heads: number("heads")?,
                kv_heads: number("kv_heads")?,
                head_dim: number("head_dim")?,
            },
            budget: text(object, "budget")?,
            length: segments("length")?,
            fitting_segments: segments("fitting_segments")?,
            held_out_segments: segments("held_out_segments")?,
            measured: measured.iter().map(Measured::read).collect::<Result<_>>()?,
        })
    }
}

impl Measured {
    fn read(object: &Object) -> Result<Self> {
        only(
            object,
            &[
                "policy",
                "text",
                "tokens",
                "sparsity",
                "bits_per_key_element",
                "kl",
                "perplexity",
                "dense_perplexity",
            ],
        )?;
        let number = |field| object.required(field, object.number(field)?);
        Ok(Self {
            policy: text(object, "policy")?,
            text: text(object, "text")?,
            tokens: object.required("tokens", whole(object, "tokens")?)?,
            sparsity: number("sparsity")?,
            bits_per_key_element: number("bits_per_key_element")?,
            kl: number("kl")?,
            perplexity: number("perplexity")?,
            dense_perplexity: number("dense_perplexity")?,
        })
    }
}

fn text(object: &Object, field: &str) -> Result<String> {
    object.required(field, object.text(field)?.map(str::to_owned))
}

/// A whole number, 0 among them.
fn whole(object: &Object, field: &str) -> Result<Option<usize>> {
    match object.get(field) {
        Some(value) if value.as_u64() == Some(0) => Ok(Some(0)),
        _ => object.count(field),
    }
}

fn only(object: &Object, fields: &[&str]) -> Result<()> {
    match object.entries().find(|(name, _)| !fields.contains(&name.as_str())) {
        None => Ok(()),
        Some((name, _)) => {
            let message = format!("there is no such field; expected {}", fields.join(", "));
            Err(object.error(name, message))
        }
    }
}

fn thresholds(object: &Object, value: &Value) -> Result<Thresholds> {
    let no_list = |at: &str| object.error(at, "is not a list: a list of each layer's numbers");
    let mut layers = Vec::new();
    let rows = value.as_array().ok_or_else(|| no_list("thresholds"))?;
    for (layer, row) in rows.iter().enumerate() {
        let mut heads = Vec::new();
        let row = row.as_array().ok_or_else(|| no_list(&format!("thresholds[{layer}]")))?;
        for (head, theta) in row.iter().enumerate() {
            let number = theta.as_f64().map(|theta| theta as f32);
            let at = format!("thresholds[{layer}][{head}]");
            heads.push(number.ok_or_else(|| object.error(&at, "is not a number"))?);
        }
        layers.push(heads);
    }
    Thresholds::new(layers).map_err(|error| object.error("thresholds", error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn example() -> PolicyFile {
        let measured = Measured {
            policy: "calibrated".into(),
            text: "held out".into(),
            tokens: 1023,
            sparsity: 0.5702,
            bits_per_key_element: 2.75,
            kl: 1.25e-3,
            perplexity: 7.25,
            dense_perplexity: 7.125,
        };
        let calibration = Calibration {
            architecture: "LlamaForCausalLM".into(),
            layers: 2,
            attention: AttentionShape { heads: 6, kv_heads: 3, head_dim: 64 },
            budget: "sparsity 0.57".into(),
            length: 1024,
            fitting_segments: 4,
            held_out_segments: 0,
            measured: vec![
                measured.clone(),
                Measured { policy: "a \"global\" one".into(), ..measured },
            ],
        };
        PolicyFile {
            policy: AttentionPolicy::delta(),
            thresholds: Some("0.1 1e-7 2;3.3333333 0 10000".parse().expect("thresholds")),
            calibration: Some(calibration),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("policy.json");
        let mut file = example();
        loop {
            file.write(&path).expect("written");
            assert_eq!(PolicyFile::read(&path).expect("read"), file);
            assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1);
            if file.calibration.take().is_none() && file.thresholds.take().is_none() {
                break;
            }
        }
        let error = file.write(dir.path()).expect_err("a directory").to_string();
        assert!(error.contains("not a regular file"), "{error}");
        let error = file.write(dir.path().join("no/such")).expect_err("nowhere").to_string();
        assert!(error.contains("no/such"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("policy.json");
        let good = example().to_text();
        for (part, instead, expected) in [
            ("deltallm policy", "another", "format"),
            ("\"version\": 1", "\"version\": 2", "version"),
            ("\"version\": 1", "\"version\": \"1\"", "version"),
            ("\"policy\": \"keys", "\"policy\": \"kees", "policy: attention policy"),
            ("keys=delta theta=0.7sigma reference=mean deltas=int4", "keys=int8", "thresholds"),
            ("\"thresholds\"", "\"tresholds\"", "tresholds"),
            ("[0.1, 0.0000001, 2]", "[0.1, 2]", "thresholds"),
            ("[0.1, 0.0000001, 2]", "[0.1, \"x\", 2]", "thresholds[0][1]"),
            ("[0.1, 0.0000001, 2]", "7", "thresholds[0]"),
            ("10000]", "10001]", "thresholds"),
            ("10000]", "-1]", "thresholds"),
            ("10000]", "1e999]", "not valid JSON"),
            ("\"layers\": 2", "\"layers\": -2", "calibration.model.layers"),
            ("\"head_dim\": 64", "\"head\": 64", "calibration.model.head"),
            ("\"tokens\": 1023", "\"tokens\": \"x\"", "calibration.measured[0].tokens"),
            ("\"kl\": 0.00125", "\"kl\": null", "calibration.measured[0].kl"),
            ("\"budget\": \"", "\"budget\": 1, \"x\": \"", "calibration"),
            ("\n}\n", "", "not valid JSON"),
        ] {
            assert!(good.contains(part), "{part} in {good}");
            fs::write(&path, good.replacen(part, instead, 1)).expect("written");
            let error = PolicyFile::read(&path).expect_err(expected).to_string();
            assert!(error.contains(expected) && error.contains("policy.json"), "{part}: {error}");
        }
        for text in ["", "[]", "{}", "\u{0}", "{\"format\":{}}"] {
            fs::write(&path, text).expect("written");
            let error = PolicyFile::read(&path).expect_err(text).to_string();
            assert!(error.contains("policy.json"), "{error}");
        }
    }
}
