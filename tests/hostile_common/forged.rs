//! Files in the form of safetensors whose parts are right by themselves and lie to each other.

use serde_json::Value;

/// The header of a valid file, and what follows it.
pub fn split(file: &[u8]) -> (Value, &[u8]) {
    let length = u64::from_le_bytes(*file.first_chunk().expect("eight bytes")) as usize;
    let header = serde_json::from_slice(&file[8..8 + length]).expect("a header");
    (header, &file[8 + length..])
}

/// A file of these, whose header has the length that it says.
pub fn join(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

/// A session's file whose checksum is right, as far as it has the parts of one: what damage never
/// makes, but a forger does. The sum is that of `src/session/file.rs`.
pub fn session(header: &[u8], data: &[u8]) -> Vec<u8> {
    let Ok(mut header) = serde_json::from_slice::<Value>(header) else { return join(header, data) };
    let mut sum = Sum(0);
    let fields =
        ["format", "version", "model", "policy", "context", "prompt", "length", "exact_from"];
    for field in fields.iter().chain(&["thresholds"]) {
        if let Some(value) = header["__metadata__"][field].as_str() {
            sum.add(value.as_bytes());
        }
    }
    let mut names = vec!["tokens".to_owned()];
    for layer in 0..4 {
        let parts = ["page_words", "pages", "exact", "values"];
        names.extend(parts.map(|part| format!("layer.{layer}.{part}")));
    }
    for name in names {
        let offset = |i: usize| header[&name]["data_offsets"][i].as_u64();
        if let (Some(start), Some(end)) = (offset(0), offset(1))
            && let Some(bytes) = data.get(start as usize..end as usize)
        {
            sum.add(bytes);
        }
    }
    if header["__metadata__"]["checksum"].is_string() {
        header["__metadata__"]["checksum"] = format!("{:016x}", sum.0).into();
    }
    join(header.to_string().as_bytes(), data)
}

struct Sum(u64);

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| self.step(u64::from_le_bytes(*word)));
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        self.step(u64::from_le_bytes(last));
        self.step(bytes.len() as u64);
    }

    fn step(&mut self, word: u64) {
        let x = self.0 ^ word ^ 0x9e37_79b9_7f4a_7c15;
        let x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        self.0 = x ^ (x >> 29);
    }
}
