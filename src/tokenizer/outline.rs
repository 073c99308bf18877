//! What is looked at in a `tokenizer.json` before the tokenizer library reads it: how much its parts
//! may make of a text.
//!
//! Normalisers, pre-tokenizers, post-processors and decoders stand in sequences, and each may make
//! its text longer: forty that double a letter take a terabyte, of a file of some kilobytes. What is
//! measured here is the most that a part can make of a byte, times that of those behind it; real
//! tokenizers stay below a hundred.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

/// Bytes that a part of a tokenizer may make of each byte.
const MAX_GROWTH: f64 = 1024.0;
/// Special tokens that a template may put around a text.
const MAX_ADDED: usize = 256;
/// Lists and objects within each other, and objects in all, of a part.
const MAX_DEPTH: usize = 12;
const MAX_OBJECTS: usize = 1000;

/// The parts of the file; the vocabulary is passed over.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    model: Option<Model>,
}

/// What the library cannot be trusted with.
#[derive(Deserialize)]
struct Model {
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    merges: Option<IgnoredAny>,
}

/// Refuses a file whose parts would make too much of a text.
///
/// # Errors
/// What is wrong with it, in words.
pub fn check(text: &[u8]) -> Result<(), String> {
    let outline: Outline =
        serde_json::from_slice(text).map_err(|error| format!("is not usable: {error}"))?;
    let Outline { normalizer, pre_tokenizer, post_processor, decoder, model } = &outline;
    // Of each merge's second token it cuts off as many bytes, and takes what is left for UTF-8
    // without a look (`BpeBuilder::build`).
    if let Some(Model { continuing_subword_prefix: Some(prefix), merges: Some(_) }) = model
        && !prefix.is_empty()
    {
        return Err("model: a continuing_subword_prefix beside merges is not supported".into());
    }
    let parts = [
        ("normalizer", normalizer),
        ("pre_tokenizer", pre_tokenizer),
        ("post_processor", post_processor),
        ("decoder", decoder),
    ];
    for (name, part) in parts {
        let mut objects = 0;
        let growth = growth(part, 0, &mut objects).map_err(|what| format!("{name}: {what}"))?;
        if growth > MAX_GROWTH {
            return Err(format!(
                "{name}: may make {growth:.3e} bytes of each byte of a text, above {MAX_GROWTH}"
            ));
        }
    }
    Ok(())
}

/// The most that a part makes of a byte.
fn growth(part: &Value, depth: usize, objects: &mut usize) -> Result<f64, String> {
    if depth > MAX_DEPTH {
        return Err(format!("is nested more than {MAX_DEPTH} deep"));
    }
    let mut product = 1.0;
    match part {
        Value::Array(list) => {
            for part in list {
                product *= growth(part, depth + 1, objects)?;
            }
        }
        Value::Object(object) => {
            *objects += 1;
            if *objects > MAX_OBJECTS {
                return Err(format!("has more than {MAX_OBJECTS} parts"));
            }
            product *= own_growth(part)?;
            for part in object.values() {
                product *= growth(part, depth + 1, objects)?;
            }
        }
        _ => {}
    }
    Ok(product)
}

/// The same of an object, without what stands in it. Kinds are told by their fields, as the library
/// does where a file does not name them.
fn own_growth(part: &Value) -> Result<f64, String> {
    let text = |field: &str| part.get(field).and_then(Value::as_str);
    let mut most: f64 = 1.0;
    // `Replace`: by a content, of which a pattern that matches nothing puts one before each byte.
    if let Some(content) = text("content").filter(|_| part.get("pattern").is_some()) {
        let pattern = part["pattern"].get("String").and_then(Value::as_str).map_or(0, str::len);
        most = most.max(match pattern {
            0 => 1.0 + content.len() as f64,
            length => content.len() as f64 / length as f64,
        });
    }
    // `Metaspace`, for each space.
    if let Some(replacement) = text("replacement") {
        most = most.max(replacement.len() as f64);
    }
    // `ByteLevel`: two bytes for each that is not a letter of ASCII.
    if text("type") == Some("ByteLevel") || part.get("trim_offsets").is_some() {
        most = most.max(2.0);
    }
    // `BPEDecoder` and `CTC`, where what becomes a space is nothing.
    if text("suffix") == Some("") || text("word_delimiter_token") == Some("") {
        most = most.max(2.0);
    }
    if let Some(map) = text("precompiled_charsmap") {
        let longest = longest_replacement(map).ok_or("has a character map that is none")?;
        most = most.max(longest as f64);
    }
    if let Some(single) = part.get("single").and_then(Value::as_array) {
        most = most.max(template(part, single)?);
    }
    Ok(most)
}

/// How often a template of `TemplateProcessing` has its text.
fn template(part: &Value, single: &[Value]) -> Result<f64, String> {
    let (mut texts, mut added) = (0, 0);
    for piece in single {
        match piece.get("SpecialToken").and_then(|token| token.get("id")?.as_str()) {
            None => texts += 1,
            Some(id) => {
                let ids = part.get("special_tokens").and_then(|all| all.get(id)?.get("ids"));
                added += ids.and_then(Value::as_array).map_or(0, Vec::len);
            }
        }
    }
    if added > MAX_ADDED {
        return Err(format!("adds {added} special tokens to a text, above {MAX_ADDED}"));
    }
    Ok(f64::from(texts.max(1)))
}

/// The longest text in a character map of SentencePiece, which is a table of a size that it says, and
/// behind it what characters become, each with a zero at its end. `None` where it is no such map: the
/// library panics on what is not base64, and takes gigabytes for a table whose size is a lie.
fn longest_replacement(map: &str) -> Option<usize> {
    let bytes = base64(map)?;
    let (size, rest) = bytes.split_first_chunk::<4>()?;
    // Of whole words.
    let texts = rest.get(u32::from_le_bytes(*size) as usize / 4 * 4..)?;
    texts.split(|&byte| byte == 0).map(<[u8]>::len).max()
}

/// The bytes of a text in base64.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut held, mut count) = (0u32, 0);
    for letter in text.bytes().take_while(|&letter| letter != b'=') {
        let six = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        held = held << 6 | u32::from(six);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((held >> count) as u8);
            held &= (1 << count) - 1;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checked(part: &str, value: &Value) -> Result<(), String> {
        check(json!({ part: value, "model": { "vocab": { "a": 0 } } }).to_string().as_bytes())
    }

    #[test]
    fn known_tokenizers_pass() {
        let replace = |pattern: &str, content: &str| json!({ "type": "Replace", "pattern": { "String": pattern }, "content": content });
        let space = json!({ "type": "Replace", "pattern": { "Regex": " {2,}" }, "content": " " });
        // Llama 2, ALBERT and XLNet, Llama 3.
        let llama = json!({ "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "\u{2581}" }, replace(" ", "\u{2581}")] });
        checked("normalizer", &llama).expect("Llama 2");
        let albert = json!({ "type": "Sequence", "normalizers": [
            replace("``", "\""), replace("''", "\""), { "type": "NFKD" }, { "type": "StripAccents" },
            { "type": "Lowercase" }, space] });
        checked("normalizer", &albert).expect("ALBERT");
        let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true });
        checked(
            "pre_tokenizer",
            &json!({ "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": "x" } }, bytes] }),
        )
        .expect("Llama 3");
        checked(
            "decoder",
            &json!({ "type": "Sequence", "decoders": [replace("\u{2581}", " "),
            { "type": "ByteFallback" }, { "type": "Fuse" }] }),
        )
        .expect("Llama 2");
    }

    #[test]
    fn character_maps_are_measured() {
        let map = |texts: &[u8]| {
            let bytes = [&4u32.to_le_bytes()[..], &[0; 4], texts].concat();
            let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
            let mut text = String::new();
            for three in bytes.chunks(3) {
                let word = three.iter().fold(0u32, |word, &byte| word << 8 | u32::from(byte));
                let word = word << (8 * (3 - three.len()));
                for place in (0..=three.len()).map(|i| 18 - 6 * i) {
                    text.push(char::from(letters[(word >> place) as usize & 63]));
                }
            }
            text + &"="[..usize::from(bytes.len() % 3 != 0)]
        };
        assert_eq!(longest_replacement(&map(b"ab\0abcde\0c")), Some(5));
        assert_eq!(longest_replacement(&map(b"")), Some(0));
        let value = |map: String| json!({ "type": "Precompiled", "precompiled_charsmap": map });
        checked("normalizer", &value(map(b"\xef\xb7\xba\0"))).expect("as Unicode has them");
        let error = checked("normalizer", &value(map(&[b'a'; 5000]))).expect_err("too long");
        assert!(error.contains("5.000e3 bytes"), "{error}");
        assert_eq!(longest_replacement("!"), None);
        assert_eq!(longest_replacement("/////w=="), None);
        let error = checked("normalizer", &value("/////w==".into())).expect_err("a lie");
        assert!(error.contains("a character map that is none"), "{error}");
    }

    #[test]
    fn what_is_too_much_says_how_much() {
        let double = json!({ "pattern": { "String": "a" }, "content": "aa" });
        let error = checked("decoder", &json!(vec![double; 40])).expect_err("a terabyte");
        assert!(error.contains("decoder: may make 1.100e12 bytes"), "{error}");
        let model = |prefix: &str, merges: Value| {
            let model = json!({ "continuing_subword_prefix": prefix, "merges": merges });
            check(json!({ "model": model }).to_string().as_bytes())
        };
        model("", json!([])).expect("nothing is cut off");
        model("##", Value::Null).expect("a WordPiece");
        assert!(model("##", json!([["a", "##\u{e9}"]])).is_err());
        let nested = (0..20).fold(json!({}), |inner, _| json!({ "normalizers": [inner] }));
        let error = checked("normalizer", &nested).expect_err("deep");
        assert!(error.contains("nested"), "{error}");
    }
}
