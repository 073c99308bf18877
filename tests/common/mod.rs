//! What the tests share: the fixtures, and the devices that every model path runs on.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use deltallm::backend::CacheFormat;
use deltallm::delta::AttentionPolicy;
use deltallm::gpu::GpuOptions;
use deltallm::{Cancel, DeviceChoice, Model, ModelOptions};
use safetensors::SafeTensors;

pub const LLAMAS: [&str; 4] = ["llama-32", "llama-64", "llama-80", "llama-128"];
pub const BITNETS: [&str; 4] = ["bitnet-32", "bitnet-64", "bitnet-80", "bitnet-128"];
pub const LENGTHS: [usize; 4] = [1, 7, 65, 300];

pub fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", name].iter().collect()
}

/// Every device that a model path is tested on. Without any GPU adapter the tests fail: a software
/// one is a package away (see tests/run.sh).
pub fn devices() -> Vec<(&'static str, ModelOptions)> {
    let on = |device: DeviceChoice, gpu: GpuOptions| ModelOptions {
        device,
        gpu,
        ..ModelOptions::default()
    };
    let adapter = DeviceChoice::Named(test_adapter());
    let floor =
        GpuOptions { f16: false, subgroups: false, floor_limits: true, ..GpuOptions::default() };
    vec![
        ("reference", on(DeviceChoice::Reference, GpuOptions::default())),
        ("cpu", on(DeviceChoice::Cpu, GpuOptions::default())),
        ("gpu", on(adapter.clone(), GpuOptions::default())),
        ("gpu, WebGPU's floor", on(adapter, floor)),
    ]
}

/// The adapter that tests run on: a hardware GPU where there is one, else a software one.
pub fn test_adapter() -> String {
    // Hardware comes first in the list.
    match deltallm::gpu::adapters().first() {
        Some(adapter) => adapter.name.clone(),
        None => panic!(
            "no GPU adapter, not even a software one: install one (Debian, Ubuntu: \
             mesa-vulkan-drivers) or run tests/run.sh, which does"
        ),
    }
}

pub fn open(name: &str, options: &ModelOptions) -> Model {
    Model::open(fixture(name), options).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The tensors of a fixture's `golden.safetensors`.
pub struct Golden {
    ids: HashMap<String, Vec<u32>>,
    floats: HashMap<String, Vec<f32>>,
}

impl Golden {
    pub fn read(name: &str) -> Self {
        let bytes = fs::read(fixture(name).join("golden.safetensors")).expect("golden file");
        let file = SafeTensors::deserialize(&bytes).expect("golden tensors");
        let (mut ids, mut floats) = (HashMap::new(), HashMap::new());
        for (name, view) in file.tensors() {
            let words = || view.data().chunks_exact(4).map(|b| <[u8; 4]>::try_from(b).unwrap());
            match view.dtype() {
                safetensors::Dtype::F32 => {
                    floats.insert(name, words().map(f32::from_le_bytes).collect());
                }
                safetensors::Dtype::I32 => {
                    ids.insert(name, words().map(u32::from_le_bytes).collect());
                }
                other => panic!("{name}: {other:?}"),
            }
        }
        Self { ids, floats }
    }

    pub fn ids(&self, name: &str) -> &[u32] {
        &self.ids[name]
    }

    pub fn floats(&self, name: &str) -> &[f32] {
        &self.floats[name]
    }
}

/// Logits of every position, `[tokens, vocabulary]`.
pub fn logits(model: &Model, ids: &[u32], cache: CacheFormat) -> Vec<f32> {
    let mut all = Vec::new();
    model
        .logits(ids, &AttentionPolicy::plain(cache), &Cancel::default(), |rows| {
            all.extend_from_slice(rows);
            Ok(())
        })
        .expect("logits");
    all
}

/// How far two sets of logits `[tokens, vocabulary]` are apart.
#[derive(Debug)]
pub struct Distance {
    pub max: f32,
    pub median: f32,
    /// Largest KL divergence of a position, in nats.
    pub max_kl: f64,
    /// Share of positions with the same likeliest token.
    pub argmax: f64,
}

pub fn distance(found: &[f32], expected: &[f32], vocabulary: usize) -> Distance {
    assert_eq!(found.len(), expected.len());
    let mut apart: Vec<f32> = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).collect();
    apart.sort_by(f32::total_cmp);
    let (mut max_kl, mut same, mut positions) = (0.0f64, 0, 0);
    for (f, e) in found.chunks(vocabulary).zip(expected.chunks(vocabulary)) {
        let (log_f, log_e) = (log_softmax(f), log_softmax(e));
        let kl: f64 = log_e.iter().zip(&log_f).map(|(e, f)| e.exp() * (e - f)).sum();
        max_kl = max_kl.max(kl);
        same += usize::from(argmax(f) == argmax(e));
        positions += 1;
    }
    Distance {
        max: apart[apart.len() - 1],
        median: apart[apart.len() / 2],
        max_kl,
        argmax: same as f64 / positions as f64,
    }
}

pub fn argmax(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - max).exp()).sum();
    logits.iter().map(|x| f64::from(*x) - max - sum.ln()).collect()
}
