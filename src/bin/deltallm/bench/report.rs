//! What came out, as tables, JSON and CSV.

use std::time::Duration;

use deltallm::backend::{DeviceInfo, ReadSpeed};
use deltallm::bench::{
    BenchOptions, Clock, FirstToken, Line, PerToken, Profile, ProfiledOperation,
};
use deltallm::checkpoint::ModelConfig;
use serde_json::{Value, json};

use super::about;
use super::subjects::{Device, Mode, Source};
use crate::args::Weights;
use crate::output::bytes;
use crate::table::{aligned, quoted};

/// Figures of all devices and modes.
pub struct Report<'a> {
    pub options: &'a BenchOptions,
    pub devices: &'a [Device],
    pub subjects: Vec<Subject>,
    /// Whether everything was measured.
    pub complete: bool,
    /// The day, `2026-11-24`.
    pub date: String,
    model: String,
    about: String,
    weights: &'static str,
    commit: Option<String>,
}

/// A device with an attention mode.
pub struct Subject {
    /// The device's name as tables have room for.
    pub device: String,
    pub info: DeviceInfo,
    pub mode: Mode,
    pub load: Option<Duration>,
    pub read_speed: Option<ReadSpeed>,
    pub first_token: Option<FirstToken>,
    pub lines: Vec<Line>,
    pub error: Option<String>,
}

impl Subject {
    pub fn new(device: &Device, mode: &Mode) -> Self {
        Self {
            device: device.name.clone(),
            info: device.info.clone(),
            mode: mode.clone(),
            load: None,
            read_speed: None,
            first_token: None,
            lines: Vec::new(),
            error: None,
        }
    }

    /// Device and mode.
    pub fn name(&self) -> String {
        format!("{}, {}", self.device, self.mode.name)
    }

    /// The share of the device's reading speed that some bytes a second are.
    fn share(&self, bytes_per_second: f64) -> Option<f64> {
        self.read_speed.map(|speed| bytes_per_second / speed.bytes_per_second)
    }

    /// Whether the device has launches to count.
    fn launches(&self) -> bool {
        self.lines.iter().any(|line| line.per_token.launches > 0.0)
    }
}

impl<'a> Report<'a> {
    pub fn new(
        source: &Source,
        config: &ModelConfig,
        weights: Weights,
        options: &'a BenchOptions,
        devices: &'a [Device],
    ) -> Self {
        Self {
            options,
            devices,
            subjects: Vec::new(),
            complete: false,
            date: jiff::Zoned::now().date().to_string(),
            model: source.to_string(),
            about: about(config),
            weights: match weights {
                Weights::Stored => "as stored",
                Weights::Q8 => "q8",
                Weights::Q4 => "q4",
            },
            commit: option_env!("DELTALLM_COMMIT").map(str::to_owned),
        }
    }

    /// How many could not be measured.
    pub fn failures(&self) -> usize {
        self.subjects.iter().filter(|subject| subject.error.is_some()).count()
    }

    pub fn title(&self) -> String {
        format!("{} ({})", self.model, self.about)
    }

    /// The tables, for people; Markdown reads them, too.
    pub fn tables(&self) -> String {
        let mut text = self.header();
        text += &self.subject_table();
        if self.subjects.iter().any(|subject| !subject.lines.is_empty()) {
            text += "\n";
            text += &self.line_table();
        }
        for subject in &self.subjects {
            for line in &subject.lines {
                if let Some(profile) = &line.profile {
                    text += "\n";
                    text += &profile_table(subject, line, profile);
                }
            }
        }
        if !self.complete {
            let all: usize = self.subjects.iter().map(|subject| subject.lines.len()).sum();
            text += &format!("\nNot everything was measured: {all} tests were.\n");
        }
        text
    }

    /// The file that a reader of the directory sees first.
    pub fn markdown(&self) -> String {
        let command: Vec<String> = std::env::args().skip(1).map(|word| shell(&word)).collect();
        format!(
            "# {}, {}\n\n```sh\ndeltallm {}\n```\n\n![rates as bars](chart.svg)\n\n{}\n\
             Rates are medians of {} after {} to warm up. `deltallm bench --help` says what the columns \
             mean; results.json has every sample.\n",
            self.model,
            self.date,
            command.join(" "),
            self.tables(),
            times(self.options.repeats, "repeat"),
            times(self.options.warm_up, "run"),
        )
    }

    fn header(&self) -> String {
        let commit = self.commit.as_ref().map_or(String::new(), |commit| format!(" ({commit})"));
        let mut text = format!(
            "{}, weights {}; deltallm {}{commit}{}, {} {}\n\n",
            self.title(),
            self.weights,
            env!("CARGO_PKG_VERSION"),
            if cfg!(debug_assertions) { ", built without --release" } else { "" },
            std::env::consts::OS,
            std::env::consts::ARCH,
        );
        for Device { info, name, .. } in self.devices {
            let features = match info.features.is_empty() {
                true => String::new(),
                false => format!("; {}", info.features.join(", ")),
            };
            text += &format!(
                "- {name}: {} ({}, {}), {}{features}\n",
                info.name,
                info.kind.name(),
                info.backend,
                info.driver
            );
        }
        text + "\n"
    }

    fn subject_table(&self) -> String {
        let columns = ["device", "attention", "load, s", "prompt", "first token, s", "again, s"];
        let mut rows = vec![columns.map(str::to_owned).to_vec()];
        rows[0].extend(["reads, GB/s".to_owned(), "weights".to_owned()]);
        for subject in &self.subjects {
            let seconds = |time: Option<Duration>| {
                optional(time.map(|time| format!("{:.3}", time.as_secs_f64())))
            };
            let first = subject.first_token;
            let weights = subject.lines.first().map(|line| bytes(line.memory.weights));
            rows.push(vec![
                subject.device.clone(),
                subject.mode.name.clone(),
                seconds(subject.load),
                optional(first.map(|first| first.prompt.to_string())),
                seconds(first.map(|first| first.cold)),
                seconds(first.map(|first| first.warm)),
                optional(subject.read_speed.map(|s| format!("{:.1}", s.bytes_per_second / 1e9))),
                optional(weights),
            ]);
        }
        let mut text = aligned(&rows, 2);
        for subject in &self.subjects {
            if let Some(error) = &subject.error {
                text += &format!("\n{}: {error}\n", subject.name());
            }
        }
        text
    }

    /// A line a test, what is to be compared below each other.
    fn line_table(&self) -> String {
        let columns = [
            "test",
            "device",
            "attention",
            "tokens/s",
            "slowest to fastest",
            "bytes a token",
            "GB/s",
            "of reading",
            "launches",
            "submits",
            "read back",
            "memory",
        ];
        let mut rows = vec![columns.map(str::to_owned).to_vec()];
        for test in self.options.tests() {
            for subject in &self.subjects {
                let Some(line) = subject.lines.iter().find(|line| line.test == test) else {
                    continue;
                };
                let (spread, each) = (&line.rate, &line.per_token);
                let moved = line.bytes_per_second();
                let counted = |n: f64| match subject.launches() {
                    true => count(n),
                    false => "-".to_owned(),
                };
                rows.push(vec![
                    test.to_string(),
                    subject.device.clone(),
                    subject.mode.name.clone(),
                    rate(spread.median),
                    format!("{} to {}", rate(spread.min), rate(spread.max)),
                    bytes(each.bytes().round() as u64),
                    rate(moved / 1e9),
                    optional(subject.share(moved).map(percent)),
                    counted(each.launches),
                    counted(each.submissions),
                    match subject.launches() {
                        true => format!("{} B", count(each.readback_bytes)),
                        false => "-".to_owned(),
                    },
                    bytes(line.memory.total()),
                ]);
            }
        }
        aligned(&rows, 3)
    }

    pub fn json(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "commit": self.commit,
            "debug_assertions": cfg!(debug_assertions),
            "date": self.date,
            "os": std::env::consts::OS,
            "architecture": std::env::consts::ARCH,
            "model": self.model,
            "about": self.about,
            "weights": self.weights,
            "repeats": self.options.repeats,
            "warm_up": self.options.warm_up,
            "complete": self.complete,
            "runs": self.subjects.iter().map(Subject::json).collect::<Vec<_>>(),
        })
    }

    /// One line a test, device and mode.
    pub fn csv(&self) -> String {
        let mut text = "device,kind,backend,driver,attention,policy,test,tokens,depth,repeats,\
            tokens_per_s,tokens_per_s_min,tokens_per_s_max,tokens_per_s_deviation,\
            weight_bytes_per_token,cache_bytes_per_token,activation_bytes_per_token,\
            bytes_per_s,share_of_reading,read_bytes_per_s,multiply_adds_per_token,\
            launches_per_token,submissions_per_token,readback_bytes_per_token,memory_bytes,\
            load_s,first_token_prompt,first_token_cold_s,first_token_warm_s\n"
            .to_owned();
        let optional = |x: Option<f64>| x.map_or(String::new(), |x| x.to_string());
        for subject in &self.subjects {
            let first = subject.first_token;
            for line in &subject.lines {
                let (info, spread, each) = (&subject.info, &line.rate, &line.per_token);
                let moved = line.bytes_per_second();
                let fields = [
                    quoted(&info.name),
                    info.kind.name().to_owned(),
                    info.backend.clone(),
                    quoted(&info.driver),
                    quoted(&subject.mode.name),
                    quoted(&subject.mode.attention.policy.to_string()),
                    quoted(&line.test.to_string()),
                    line.test.tokens.to_string(),
                    line.test.depth.to_string(),
                    spread.samples.len().to_string(),
                    spread.median.to_string(),
                    spread.min.to_string(),
                    spread.max.to_string(),
                    spread.deviation.to_string(),
                    each.weights.to_string(),
                    each.cache.to_string(),
                    each.activations.to_string(),
                    moved.to_string(),
                    optional(subject.share(moved)),
                    optional(subject.read_speed.map(|speed| speed.bytes_per_second)),
                    each.multiply_adds.to_string(),
                    each.launches.to_string(),
                    each.submissions.to_string(),
                    each.readback_bytes.to_string(),
                    line.memory.total().to_string(),
                    optional(subject.load.map(|time| time.as_secs_f64())),
                    first.map_or(String::new(), |first| first.prompt.to_string()),
                    optional(first.map(|first| first.cold.as_secs_f64())),
                    optional(first.map(|first| first.warm.as_secs_f64())),
                ];
                text += &(fields.join(",") + "\n");
            }
        }
        text
    }
}

impl Subject {
    fn json(&self) -> Value {
        let DeviceInfo { name, kind, backend, driver, features } = &self.info;
        json!({
            "device": {
                "name": name,
                "kind": kind.name(),
                "backend": backend,
                "driver": driver,
                "features": features,
            },
            "attention": self.mode.name,
            "policy": self.mode.attention.policy.to_string(),
            "load_s": self.load.map(|time| time.as_secs_f64()),
            "first_token": self.first_token.map(|first| json!({
                "prompt_tokens": first.prompt,
                "cold_s": first.cold.as_secs_f64(),
                "warm_s": first.warm.as_secs_f64(),
            })),
            "read_bytes_per_s": self.read_speed.map(|speed| speed.bytes_per_second),
            "tests": self.lines.iter().map(|line| self.line_json(line)).collect::<Vec<_>>(),
            "error": self.error,
        })
    }

    fn line_json(&self, line: &Line) -> Value {
        let Line { test, rate, per_token, memory, profile } = line;
        let PerToken { weights, cache, activations, multiply_adds, .. } = *per_token;
        let moved = line.bytes_per_second();
        let activity = self.launches().then(|| {
            json!({
                "launches": per_token.launches,
                "submissions": per_token.submissions,
                "readback_bytes": per_token.readback_bytes,
            })
        });
        json!({
            "test": test.to_string(),
            "kind": test.kind.name(),
            "tokens": test.tokens,
            "depth": test.depth,
            "tokens_per_s": {
                "median": rate.median,
                "min": rate.min,
                "max": rate.max,
                "deviation": rate.deviation,
                "samples": rate.samples,
            },
            "bytes_per_token": {
                "weights": weights,
                "cache": cache,
                "activations": activations,
                "total": per_token.bytes(),
            },
            "multiply_adds_per_token": multiply_adds,
            "bytes_per_s": moved,
            "share_of_reading": self.share(moved),
            "device_per_token": activity,
            "memory_bytes": {
                "weights": memory.weights,
                "keys": memory.keys,
                "values": memory.values,
                "activations": memory.activations,
                "scratch": memory.scratch,
                "total": memory.total(),
            },
            "profile": profile.as_ref().map(|profile| self.profile_json(profile)),
        })
    }

    fn profile_json(&self, profile: &Profile) -> Value {
        let operations = profile.operations.iter().map(|operation| {
            let (seconds, cost) = (operation.time().as_secs_f64(), operation.cost);
            let moved = per_second(cost.bytes() as f64, seconds);
            let kernels = operation.kernels.iter().map(|kernel| {
                json!({
                    "kernel": kernel.name,
                    "launches": kernel.launches,
                    "time_s": kernel.time.as_secs_f64(),
                })
            });
            json!({
                "operation": operation.name,
                "detail": operation.detail,
                "calls": operation.calls,
                "time_s": seconds,
                "bytes": cost.bytes(),
                "multiply_adds": cost.multiply_adds,
                "bytes_per_s": moved,
                "share_of_reading": moved.and_then(|moved| self.share(moved)),
                "multiply_adds_per_s_at_most": operation.multiply_speed,
                "share_of_multiplying": share_of_multiplying(operation),
                "kernels": kernels.collect::<Vec<_>>(),
            })
        });
        json!({
            "clock": clock(profile.clock),
            "wall_s": profile.wall.as_secs_f64(),
            "operations": operations.collect::<Vec<_>>(),
        })
    }
}

/// Where the time of a test went: a row an operation, and where that takes several kernels, one a
/// kernel below it.
fn profile_table(subject: &Subject, line: &Line, profile: &Profile) -> String {
    let columns = [
        "operation",
        "kernel",
        "launches",
        "time, ms",
        "share",
        "bytes",
        "GB/s",
        "GOP/s",
        "of reading",
        "of multiplying",
    ];
    let mut rows = vec![columns.map(str::to_owned).to_vec()];
    let all = profile.time().as_secs_f64();
    let share = |time: Duration| percent(time.as_secs_f64() / all.max(f64::MIN_POSITIVE));
    let milliseconds = |time: Duration| format!("{:.3}", 1e3 * time.as_secs_f64());
    for operation in &profile.operations {
        let (time, cost) = (operation.time(), operation.cost);
        let seconds = time.as_secs_f64();
        let moved = per_second(cost.bytes() as f64, seconds);
        let computed = per_second(2.0 * cost.multiply_adds as f64, seconds);
        let launches: u64 = operation.kernels.iter().map(|kernel| kernel.launches).sum();
        let kernel = match &operation.kernels[..] {
            [one] => one.name.clone(),
            several => format!("{} kernels", several.len()),
        };
        rows.push(vec![
            format!("{} {}", operation.name, operation.detail).trim().to_owned(),
            kernel,
            launches.to_string(),
            milliseconds(time),
            share(time),
            bytes(cost.bytes()),
            optional(moved.map(|x| rate(x / 1e9))),
            optional(computed.filter(|x| *x > 0.0).map(|x| rate(x / 1e9))),
            optional(moved.and_then(|moved| subject.share(moved)).map(percent)),
            optional(share_of_multiplying(operation).map(percent)),
        ]);
        if operation.kernels.len() > 1 {
            for kernel in &operation.kernels {
                let mut row = vec![String::new(); columns.len()];
                (row[1], row[2]) = (kernel.name.clone(), kernel.launches.to_string());
                (row[3], row[4]) = (milliseconds(kernel.time), share(kernel.time));
                rows.push(row);
            }
        }
    }
    format!(
        "{}, {}: {:.3} s by {}, of {:.3} s\n\n{}",
        subject.name(),
        line.test,
        all,
        clock(profile.clock),
        profile.wall.as_secs_f64(),
        aligned(&rows, 2)
    )
}

/// Of what the device can multiply in registers.
fn share_of_multiplying(operation: &ProfiledOperation) -> Option<f64> {
    let made = per_second(operation.cost.multiply_adds as f64, operation.time().as_secs_f64())?;
    operation.multiply_speed.map(|most| made / most)
}

fn clock(clock: Clock) -> &'static str {
    match clock {
        Clock::Device => "the device's clock",
        Clock::Host => "the host's clock",
    }
}

fn per_second(count: f64, seconds: f64) -> Option<f64> {
    (seconds > 0.0).then(|| count / seconds)
}

/// A rate with as many digits as it deserves.
pub fn rate(x: f64) -> String {
    match x.abs() {
        x if x < 1.0 => format!("{x:.3}"),
        x if x < 100.0 => format!("{x:.2}"),
        x if x < 10_000.0 => format!("{x:.1}"),
        _ => format!("{x:.0}"),
    }
}

/// A mean count: whole where it is.
fn count(x: f64) -> String {
    if x == x.round() { format!("{x:.0}") } else { rate(x) }
}

/// Whole per cents, but for what is less than ten.
fn percent(share: f64) -> String {
    let digits = usize::from(share < 0.1);
    format!("{:.digits$} %", 100.0 * share)
}

fn optional(x: Option<String>) -> String {
    x.unwrap_or_else(|| "-".to_owned())
}

fn times(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// A word as a shell takes it.
fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:+%@".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}
