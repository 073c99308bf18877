//! Ways to spoil a valid input: its bytes, and the values of its JSON.

use serde_json::Value;

/// Random numbers of a seed: SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is above 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// What stands for a value, as text: also what is no JSON, and what no program should believe.
const VALUES: [&str; 32] = [
    "0",
    "-0",
    "1",
    "-1",
    "2",
    "3",
    "0.5",
    "65536",
    "2147483647",
    "2147483648",
    "4294967296",
    "9007199254740993",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "-1e308",
    "1e-308",
    "1e999",
    "NaN",
    "null",
    "true",
    "\"\"",
    "\"x\"",
    "\"-1\"",
    "\"../../x\"",
    "\"\\u0000\"",
    "[]",
    "{}",
    "[null, 0, \"\"]",
    "[[[[1]]]]",
    "{\"type\": \"Sequence\"}",
];

/// A place in a JSON value.
#[derive(Clone, Debug)]
enum Step {
    Key(String),
    Index(usize),
}

/// The places of a value, of each list and object with the first and last few entries only: a
/// vocabulary has thousands that are alike.
fn places(value: &Value, most: usize, here: &[Step], all: &mut Vec<Vec<Step>>) {
    all.push(here.to_vec());
    let few = |count: usize| (0..count).filter(move |i| *i < most || i + 2 >= count);
    match value {
        Value::Object(object) => {
            let entries: Vec<_> = object.iter().collect();
            for i in few(entries.len()) {
                let step = Step::Key(entries[i].0.clone());
                places(entries[i].1, most, &[here, &[step]].concat(), all);
            }
        }
        Value::Array(list) => {
            for i in few(list.len()) {
                places(&list[i], most, &[here, &[Step::Index(i)]].concat(), all);
            }
        }
        _ => {}
    }
}

fn at<'a>(value: &'a mut Value, place: &[Step]) -> &'a mut Value {
    place.iter().fold(value, |value, step| match step {
        Step::Key(key) => &mut value[key.as_str()],
        Step::Index(index) => &mut value[*index],
    })
}

/// Stands for a value that is to be replaced in the text.
const HOLE: &str = "@@hole@@";

/// The text of `value` with `text` in place of what is at a place.
fn with(value: &Value, place: &[Step], text: &str) -> Vec<u8> {
    let mut value = value.clone();
    *at(&mut value, place) = HOLE.into();
    value.to_string().replacen(&format!("\"{HOLE}\""), text, 1).into_bytes()
}

/// Every place of `valid` with every value in [`VALUES`], and without it, and twice, and with what
/// is long or deep: calls `each` with a description and the text.
pub fn json(valid: &Value, most: usize, each: &mut dyn FnMut(&str, &[u8])) {
    let mut all = Vec::new();
    places(valid, most, &[], &mut all);
    let long = format!("\"{}\"", "long ".repeat(20_000));
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    let nested = format!("{}1{}", "{\"type\":".repeat(100), "}".repeat(100));
    let many = format!("[{}0]", "0,".repeat(20_000));
    for place in &all {
        let found = at(&mut valid.clone(), place).to_string();
        let values = VALUES.into_iter().chain([&long[..], &deep, &nested, &many]);
        for text in values {
            each(&format!("{place:?} is {text:.40}"), &with(valid, place, text));
        }
        if let Some(step) = place.last() {
            let twice = match step {
                Step::Key(key) => format!("{found},{}:0", Value::from(key.as_str())),
                Step::Index(_) => format!("{found},{found}"),
            };
            each(&format!("{place:?} is there twice"), &with(valid, place, &twice));
            let mut less = valid.clone();
            match (at(&mut less, &place[..place.len() - 1]), step) {
                (Value::Object(object), Step::Key(key)) => drop(object.remove(key)),
                (Value::Array(list), Step::Index(index)) => drop(list.remove(*index)),
                _ => {}
            }
            each(&format!("{place:?} is not there"), less.to_string().as_bytes());
        }
    }
}

/// Several places at once, each with a value from another place or from [`VALUES`].
pub fn json_at_random(valid: &Value, random: &mut Random) -> Vec<u8> {
    let mut spoilt = valid.clone();
    let mut text = None;
    for _ in 0..1 + random.below(4) {
        let mut all = Vec::new();
        places(&spoilt, 6, &[], &mut all);
        let (to, from) = (random.pick(&all).clone(), random.pick(&all).clone());
        if random.below(3) == 0 {
            let value = at(&mut spoilt, &from).clone();
            *at(&mut spoilt, &to) = value;
        } else {
            let value = *random.pick(&VALUES);
            match serde_json::from_str(value) {
                Ok(value) => *at(&mut spoilt, &to) = value,
                Err(_) => text = Some(with(&spoilt, &to, value)),
            }
        }
    }
    text.unwrap_or_else(|| spoilt.to_string().into_bytes())
}

/// A few changes that know nothing of what the bytes mean.
pub fn bytes(valid: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = valid.to_vec();
    for _ in 0..1 + random.below(3) {
        let at = random.below(bytes.len().max(1));
        let end = (at + 1 + random.below(16)).min(bytes.len());
        match random.below(9) {
            0 => bytes.truncate(at),
            1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            2 if at < bytes.len() => bytes[at] = *random.pick(&[0, 0xff, 0x80, b'"', b'{', b'9']),
            3 => drop(bytes.drain(at.min(end)..end)),
            4 => {
                let part = bytes[at.min(end)..end].to_vec();
                bytes.splice(at..at, part);
            }
            5 => bytes.extend(std::iter::repeat_n(random.next() as u8, random.below(64))),
            6 => drop(bytes.splice(at..at, *b"\xef\xbb\xbf")),
            7 if at + 8 <= bytes.len() => {
                let number: u64 = *random.pick(&[0, 1, 7, 1 << 31, 1 << 53, 1 << 63, u64::MAX]);
                bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            }
            _ => bytes.rotate_left(at),
        }
    }
    bytes
}

/// What is not even text, or not of this kind, whatever the kind is.
pub fn never_valid() -> Vec<(&'static str, Vec<u8>)> {
    let utf16 = "\u{feff}{\"a\": 1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    vec![
        ("nothing", Vec::new()),
        ("a zero", vec![0]),
        ("zeros", vec![0; 4096]),
        ("ones", vec![0xff; 4096]),
        ("a byte order mark", b"\xef\xbb\xbf".to_vec()),
        ("UTF-16", utf16),
        ("half a character", b"{\"a\": \"\xe2\x82\"}".to_vec()),
        ("brackets", vec![b'['; 100_000]),
        ("braces", b"{\"a\":".repeat(20_000)),
        ("a quotation mark", b"\"".to_vec()),
        ("null", b"null".to_vec()),
        ("a number", b"1e999".to_vec()),
        ("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0".to_vec()),
        ("a program", b"\x7fELF\x02\x01\x01".repeat(100)),
    ]
}
