//! `deltallm bench`, as a newcomer, a script and an impatient user meet it. What is counted is held
//! against counts by hand; no time is.
#![cfg(all(feature = "cli", feature = "demo"))]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use deltallm::backend::{Backend, MatrixFormat, read_pattern};
use deltallm::cpu::{Cpu, Kernels};
use deltallm::gpu::{Gpu, GpuOptions, Select};
use deltallm::reference::Reference;
use serde_json::Value;

fn bench(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deltallm"));
    // What is found out about adapters is nothing to leave in a user's home.
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    command.arg("bench").args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    bench(args).output().expect("the program starts")
}

fn ok(output: Output) -> Output {
    assert!(output.status.success(), "{}", err(&output));
    output
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

fn json(args: &[&str]) -> Value {
    let output = ok(run(&[args, &["--json", "--no-files"]].concat()));
    serde_json::from_str(&out(&output)).expect("one JSON object and nothing else")
}

/// The only directory within another.
fn only(dir: &Path) -> PathBuf {
    let mut found =
        fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("entry").path());
    let first = found.next().expect("something");
    assert!(found.next().is_none(), "{first:?} is not alone");
    first
}

const HIDDEN: u64 = 256;
const INNER: u64 = 640;
const LAYERS: u64 = 6;
const KV: u64 = 128;
const QKV: u64 = HIDDEN + 2 * KV;
const VOCABULARY: u64 = 1300;

/// Bytes of weights that a token of the model inside reads: trits at two bits, norms in f32, the
/// head and a row of the embedding in bf16.
fn weights() -> u64 {
    let trits = QKV * HIDDEN + HIDDEN * HIDDEN + 2 * INNER * HIDDEN + HIDDEN * INNER;
    let norms = 4 * (3 * HIDDEN + INNER);
    LAYERS * (trits / 4 + norms) + 4 * HIDDEN + 2 * VOCABULARY * HIDDEN + 2 * HIDDEN
}

/// Bytes of intermediate results that a token of it reads and writes, operation by operation.
fn activations() -> u64 {
    let float = |width: u64| 4 * width;
    let int8 = |width: u64| width + 8;
    let norm = float(HIDDEN) + int8(HIDDEN);
    let qkv = int8(HIDDEN) + float(QKV);
    let rope = float(QKV) + float(64) + float(HIDDEN);
    let attention = 2 * float(HIDDEN);
    let output = int8(HIDDEN) + 2 * float(HIDDEN);
    let gate_up = int8(HIDDEN) + float(2 * INNER);
    let gate = float(2 * INNER) + int8(INNER);
    let down = int8(INNER) + 2 * float(HIDDEN);
    let layer = norm + qkv + rope + attention + norm + output + norm + gate_up + gate + down;
    let embed = float(HIDDEN);
    let head = 2 * float(HIDDEN) + float(HIDDEN) + float(VOCABULARY);
    LAYERS * layer + embed + head + float(VOCABULARY)
}

fn multiply_adds(keys: u64) -> u64 {
    let matrices = QKV * HIDDEN + HIDDEN * HIDDEN + 3 * INNER * HIDDEN;
    LAYERS * (matrices + 2 * HIDDEN * keys) + VOCABULARY * HIDDEN
}

#[track_caller]
fn equal(found: &Value, expected: f64) {
    let found = found.as_f64().expect("a number");
    assert!((found - expected).abs() <= 1e-9 * expected, "{found} instead of {expected}");
}

#[test]
fn bytes_of_a_token_are_those_counted_by_hand() {
    let dense = ["--device", "cpu", "--prompt", "none", "--generate", "8", "--depths", "200"];
    let found = json(&[&dense[..], &["--attention", "dense", "--repeats", "1"]].concat());
    let test = &found["runs"][0]["tests"][0];
    assert_eq!(test["test"], "tg8 @ d200");
    equal(&test["bytes_per_token"]["weights"], weights() as f64);
    equal(&test["bytes_per_token"]["activations"], activations() as f64);
    // Each token sees the keys before it and its own, 201 to 208, and writes its own.
    let row = 2 * (2 * KV);
    let seen: u64 = (201..=208).sum();
    equal(&test["bytes_per_token"]["cache"], (LAYERS * row * (seen + 8)) as f64 / 8.0);
    let sum: u64 = (201..=208).map(multiply_adds).sum();
    equal(&test["multiply_adds_per_token"], sum as f64 / 8.0);
    let total = (weights() + activations()) as f64 + (LAYERS * row * (seen + 8)) as f64 / 8.0;
    equal(&test["bytes_per_token"]["total"], total);
    let rate = test["tokens_per_s"]["median"].as_f64().expect("a rate");
    equal(&test["bytes_per_s"], rate * total);
    let reads = found["runs"][0]["read_bytes_per_s"].as_f64().expect("a speed");
    equal(&test["share_of_reading"], rate * total / reads);
}

/// On the CPU and on a GPU: each reads the sink, the pages before the window, and the window.
#[test]
fn bytes_of_a_compressed_cache_are_those_counted_by_hand() {
    let adapter = common::test_adapter();
    let policy = "keys=int8 page=16 window=16 sink=4";
    for device in ["cpu", &adapter] {
        let options = ["--device", device, "--prompt", "none", "--generate", "40"];
        let more = ["--depths", "200", "--attention", policy, "--repeats", "1", "--warm-up", "0"];
        let found = json(&[&options[..], &more].concat());
        let test = &found["runs"][0]["tests"][0];
        // A page of 16 tokens and 64 channels at 8 bits, and a scale of 16 bits a token.
        let page = 2 * 16 * (64 + 2);
        let mut cache = 0;
        for position in 200..240u64 {
            let keys = position + 1;
            let window = (keys - 16) / 16 * 16;
            cache += 2 * KV * (keys - window + 4) + window / 16 * page + 2 * KV * keys;
            cache += 2 * (2 * KV);
            if keys.is_multiple_of(16) {
                cache += 16 * 2 * KV + page;
            }
        }
        equal(&test["bytes_per_token"]["cache"], (LAYERS * cache) as f64 / 40.0);
    }
}

#[test]
fn a_prompt_reads_weights_once_for_the_tokens_that_run_together() {
    let options = ["--device", "cpu", "--prompt", "100", "--generate", "none", "--depths", "0"];
    let found = json(&[&options[..], &["--repeats", "1", "--warm-up", "0"]].concat());
    for run in found["runs"].as_array().expect("runs") {
        let rows = 99 * 2 * HIDDEN;
        equal(&run["tests"][0]["bytes_per_token"]["weights"], (weights() + rows) as f64 / 100.0);
    }
}

#[test]
fn devices_and_modes_stand_side_by_side_in_every_format() {
    let adapter = common::test_adapter();
    let dir = tempfile::tempdir().expect("directory");
    let place = dir.path().join("runs");
    let args = ["--device", "cpu", "--device", &adapter, "--attention", "dense,delta"];
    let more = ["--prompt", "20,9", "--generate", "3", "--depths", "150,0", "--repeats", "3"];
    let all = [&args[..], &more, &["--out", place.to_str().expect("UTF-8")]].concat();
    let output = ok(run(&all));

    let table = out(&output);
    for word in ["tg3 @ d150", "pp20", "delta", "of reading", "CPU", &adapter] {
        assert!(table.contains(word), "{word}: {table}");
    }
    // A header, a rule, and six tests with two devices and two modes.
    assert_eq!(
        table.lines().filter(|line| line.starts_with("| pp") || line.starts_with("| tg")).count(),
        24
    );
    let mut widths =
        table.lines().filter(|line| line.starts_with("| ")).map(|l| l.matches('|').count());
    assert!(widths.all(|columns| columns == 9 || columns == 13), "{table}");

    let run_dir = only(&place);
    let name = run_dir.file_name().expect("name").to_str().expect("UTF-8").to_owned();
    assert!(name.len() > 11 && name[..2] == *"20" && name.contains('+'), "{name}");
    assert!(err(&output).contains(&name), "{}", err(&output));
    let read = |file: &str| fs::read_to_string(run_dir.join(file)).expect(file);
    assert!(read("README.md").contains("tg3 @ d150"));
    let chart = read("chart.svg");
    assert!(chart.starts_with("<svg") && chart.contains("pp20 @ d150") && !chart.contains("NaN"));

    let results: Value = serde_json::from_str(&read("results.json")).expect("JSON");
    assert_eq!(results["complete"], true);
    let runs = results["runs"].as_array().expect("runs");
    assert_eq!(runs.len(), 4);
    for run in runs {
        for field in ["load_s", "read_bytes_per_s"] {
            assert!(
                run[field].as_f64().is_some_and(|x| x > 0.0 && x.is_finite()),
                "{field}: {run}"
            );
        }
        assert_eq!(run["first_token"]["prompt_tokens"], 9);
        assert!(run["first_token"]["cold_s"].as_f64().is_some_and(|x| x > 0.0));
        let tests = run["tests"].as_array().expect("tests");
        let names: Vec<&str> = tests.iter().filter_map(|test| test["test"].as_str()).collect();
        assert_eq!(names, ["pp9", "pp20", "tg3", "pp9 @ d150", "pp20 @ d150", "tg3 @ d150"]);
        for test in tests {
            let rate = &test["tokens_per_s"];
            let number = |field: &str| rate[field].as_f64().expect(field);
            assert_eq!(rate["samples"].as_array().map(Vec::len), Some(3));
            assert!(0.0 < number("min") && number("min") <= number("median"));
            assert!(number("median") <= number("max") && number("max").is_finite());
            let memory = &test["memory_bytes"];
            let parts = ["weights", "keys", "values", "activations", "scratch"];
            let sum: u64 = parts.iter().filter_map(|part| memory[part].as_u64()).sum();
            assert_eq!(memory["total"].as_u64(), Some(sum));
            let device = &test["device_per_token"];
            if run["device"]["backend"] == "cpu" {
                assert!(device.is_null(), "{device}");
            } else {
                for field in ["launches", "submissions", "readback_bytes"] {
                    assert!(device[field].as_f64().is_some_and(|x| x > 0.0), "{field}: {device}");
                }
            }
        }
    }

    let csv = read("results.csv");
    let columns = csv.lines().next().expect("a header").split(',').count();
    assert_eq!(csv.lines().count(), 1 + 24);
    for line in csv.lines() {
        // Some adapters' names have commas in them, and are quoted.
        let plain: String = line.split('"').step_by(2).collect();
        assert_eq!(plain.split(',').count(), columns, "{line}");
    }

    // A second run of the day does not overwrite the first.
    let short =
        ["--device", "cpu", "--prompt", "none", "--generate", "1", "--csv", "--repeats", "1"];
    for _ in 0..2 {
        let output = ok(run(&[&short[..], &["--out", place.to_str().expect("UTF-8")]].concat()));
        assert!(out(&output).starts_with("device,kind,"), "{}", out(&output));
    }
    assert_eq!(fs::read_dir(&place).expect("directory").count(), 3);
}

#[test]
fn a_profile_has_every_operation_with_its_time() {
    let adapter = common::test_adapter();
    for device in ["cpu", "reference", &adapter] {
        let options = ["--device", device, "--prompt", "40", "--generate", "2", "--depths", "70"];
        let more = ["--repeats", "1", "--attention", "delta page=16 window=16", "--profile"];
        let found = json(&[&options[..], &more].concat());
        for test in found["runs"][0]["tests"].as_array().expect("tests") {
            let profile = &test["profile"];
            let operations = profile["operations"].as_array().expect("operations");
            let of = |name: &str| {
                operations.iter().filter(|o| o["operation"] == name).collect::<Vec<_>>()
            };
            for name in
                ["embed", "norm", "linear", "linear_add", "rope_append", "attention", "gate"]
            {
                assert!(!of(name).is_empty(), "{device}: {name}: {profile}");
            }
            // 70 + 40 tokens complete the pages that begin at 64, 80 and 96; 2 more complete none.
            assert_eq!(of("encode_keys").len(), usize::from(test["kind"] == "prompt"), "{profile}");
            let (mut time, mut bytes) = (0.0, 0.0);
            for operation in operations {
                time += operation["time_s"].as_f64().expect("a time");
                bytes += operation["bytes"].as_f64().expect("bytes");
                let kernels = operation["kernels"].as_array().expect("kernels");
                assert!(!kernels.is_empty(), "{operation}");
                let multiplies = operation["multiply_adds"].as_u64().expect("a count") > 0;
                let most = &operation["multiply_adds_per_s_at_most"];
                assert_eq!(most.as_f64().is_some_and(|most| most > 0.0), multiplies, "{operation}");
            }
            // Clocks of the device may tick too slowly for one launch, not for all.
            assert!(time > 0.0 && time.is_finite(), "{profile}");
            let each = test["bytes_per_token"]["total"].as_f64().expect("bytes");
            let tokens = test["tokens"].as_f64().expect("tokens");
            assert!((bytes - each * tokens).abs() < 1e-6 * bytes, "{bytes} and {each}");
        }
    }
    // As a table, with each kernel.
    let options = ["--device", &adapter, "--prompt", "none", "--generate", "1", "--depths", "0"];
    let output = ok(run(&[&options[..], &["--repeats", "1", "--profile", "--no-files"]].concat()));
    for word in ["linear 1280 x 256 ternary", "sample_best", "rope_append"] {
        assert!(out(&output).contains(word), "{word}: {}", out(&output));
    }
}

/// The kernel and the loops that read for speed leave nothing out, in one buffer and in several.
#[test]
fn devices_read_all_that_they_are_asked_to() {
    let select = Select::Named(common::test_adapter());
    let gpu = GpuOptions { select, floor_limits: true, ..GpuOptions::default() };
    let gpu = Gpu::open(&gpu).expect("an adapter");
    let small = 3 << 20;
    // Bindings of the floor are of 128 MiB.
    let large = 129 << 20;
    for (found, bytes) in [
        (Reference::new().read_speed(small), small),
        (Cpu::new(Some(3)).and_then(|cpu| cpu.read_speed(small + 4)), small + 4),
        (gpu.read_speed(small), small),
        (gpu.read_speed(large), large),
    ] {
        let found = found.expect("it reads");
        let words = 0..bytes as u32 / 4;
        let sum = words.fold(0, |sum: u32, n| sum.wrapping_add(read_pattern(n)));
        assert_eq!((found.bytes, found.sum), (bytes, sum));
        assert!(found.bytes_per_second.is_finite() && found.bytes_per_second > 0.0);
    }
}

/// The loops and kernels that multiply for speed: a GPU's results are compared with their twin.
#[test]
fn devices_multiply_all_that_they_are_asked_to() {
    let select = Select::Named(common::test_adapter());
    let gpu = Gpu::open(&GpuOptions { select, ..GpuOptions::default() }).expect("an adapter");
    let levels = Kernels::available().into_iter();
    let cpus: Vec<Cpu> =
        levels.map(|kernels| Cpu::with_kernels(Some(1), kernels).expect("a CPU")).collect();
    for format in [MatrixFormat::F32, MatrixFormat::Q8, MatrixFormat::Ternary] {
        let others = [Reference::new().multiply_speed(format), gpu.multiply_speed(format)];
        let speeds = cpus.iter().map(|cpu| cpu.multiply_speed(format));
        for speed in speeds.chain(others) {
            let speed = speed.expect("it multiplies");
            assert!(speed.is_finite() && speed > 0.0, "{format:?}: {speed}");
        }
    }
}

#[test]
fn random_weights_need_no_files_and_any_depth() {
    let options = ["--synthetic", "tiny", "--device", "cpu", "--prompt", "none", "--generate", "2"];
    let found = json(&[&options[..], &["--depths", "2100", "--repeats", "1"]].concat());
    assert_eq!(found["model"], "tiny with random weights");
    assert_eq!(found["runs"].as_array().map(Vec::len), Some(2));
    for run in found["runs"].as_array().expect("runs") {
        assert_eq!(run["tests"][0]["depth"], 2100);
    }
}

/// Each set of instructions is a device of its own; what `cpu` stands for is one of them.
#[test]
fn instructions_of_the_cpu_are_compared_in_one_run() {
    let kernels = Kernels::available();
    let mut devices = vec!["cpu".to_owned()];
    devices.extend(kernels.iter().map(|kernels| format!("cpu:{}", kernels.key())));
    let options = ["--attention", "dense", "--prompt", "none", "--generate", "2", "--depths", "0"];
    let found = json(&[&options[..], &["--device", &devices.join(","), "--repeats", "1"]].concat());
    let drivers: BTreeSet<String> = found["runs"]
        .as_array()
        .expect("runs")
        .iter()
        .map(|run| run["device"].to_string())
        .collect();
    assert_eq!(drivers.len(), kernels.len(), "{drivers:?}");
}

#[test]
fn what_the_context_has_no_room_for_is_left_out_or_refused() {
    let output = ok(run(&["--device", "cpu", "--repeats", "1", "--no-files"]));
    let said = err(&output);
    assert!(said.contains("prompts of 2048, depths of 4096 and 16384: left out"), "{said}");
    assert!(out(&output).contains("| pp512 "), "{}", out(&output));
}

#[test]
fn what_is_wrong_is_said_before_anything_runs() {
    let file = tempfile::NamedTempFile::new().expect("file");
    let inside = file.path().join("runs");
    let inside = inside.to_str().expect("UTF-8");
    for (args, words) in [
        (&["--device", "no-such-gpu"][..], &["no-such-gpu", "not found"][..]),
        (&["--device", ""], &["is needed"]),
        (&["--device", "cpu:sse9"], &["\"sse9\"", "portable"]),
        #[cfg(target_arch = "x86_64")]
        (&["--device", "cpu:neon"], &["NEON", "portable"]),
        (&["--depths", "1000"], &["1000", "1024"]),
        (&["--depths", "900", "--prompt", "200"], &["pp200 @ d900", "1100", "1024"]),
        (&["--repeats", "0"], &["repeats", "at least 1"]),
        (&["--prompt", "0"], &["prompt", "at least 1"]),
        (&["--prompt", "x"], &["\"x\"", "none"]),
        (&["--prompt", "none", "--generate", "none"], &["at least one"]),
        (&["--depths", "none"], &["a depth"]),
        (&["--attention", "dence"], &["dence", "dense, delta or paper"]),
        (&["--attention", "delta page=20"], &["page", "16, 32, 64 or 128"]),
        (&["--synthetic", "gpt-4"], &["gpt-4", "bitnet-2b", "llama-1b"]),
        (&["--synthetic", "tiny", "--model", "x"], &["cannot be used with"]),
        (&["--model", "no/such/dir"], &["no/such/dir", "does not exist"]),
        (&["--threads", "0", "--device", "cpu"], &["threads"]),
        (&["--out", inside], &["is a file"]),
        (&["--csv", "--profile"], &["cannot be used with"]),
        // A place in which not even root can make a directory.
        #[cfg(target_os = "linux")]
        (&["--out", "/proc/runs"], &["/proc/runs", "--no-files"]),
    ] {
        let output = run(args);
        assert!(!output.status.success(), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}: {}", out(&output));
        for word in words {
            assert!(err(&output).contains(word), "{args:?}: {word}: {}", err(&output));
        }
        assert!(!err(&output).contains("panicked"), "{}", err(&output));
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_shows_what_was_measured_so_far() {
    let dir = tempfile::tempdir().expect("directory");
    let place = dir.path().join("runs");
    let args = ["--device", "cpu", "--generate", "1,900", "--prompt", "none", "--repeats", "300"];
    let more = ["--depths", "0", "--warm-up", "0", "--json"];
    let mut command =
        bench(&[&args[..], &more, &["--out", place.to_str().expect("UTF-8")]].concat());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    // The second test takes minutes.
    let mut said = BufReader::new(child.stderr.take().expect("stderr")).lines();
    assert!(said.any(|line| line.expect("a line").contains("tg1: ")));
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(kill.expect("kill").success());
    let rest: Vec<String> = said.map(|line| line.expect("a line")).collect();
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(130), "{rest:?}");
    let found: Value = serde_json::from_str(&out(&output)).expect("JSON");
    assert_eq!(found["complete"], false);
    assert_eq!(found["runs"][0]["tests"].as_array().map(Vec::len), Some(1));
    assert_eq!(rest.last().map(String::as_str), Some("interrupted"));
    assert!(!place.exists());
}
