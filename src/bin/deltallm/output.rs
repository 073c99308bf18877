//! What every command prints in the same way: errors, progress, bytes.

use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use deltallm::model::LoadProgress;
use deltallm::{Cancel, Error};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Prints a line on standard error. What is said there is for people: a run does not fail because
/// nobody can read it.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}
pub(crate) use say;

/// Why a command failed.
pub enum Failure {
    /// A fault, to be printed.
    Error(Error),
    /// A command that cannot be run as it was given.
    Usage(String),
    /// Standard output could not be written.
    Output(io::Error),
    /// Ctrl-C.
    Interrupted,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Cancelled => Self::Interrupted,
            error => Self::Error(error),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// What a command returns.
pub type Outcome = Result<(), Failure>;

/// Prints what went wrong and turns it into the exit status that a shell expects.
pub fn exit(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // The reader, such as `head`, has seen enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(Failure::Output(error)) => {
            say!("error: standard output: {error}");
            ExitCode::FAILURE
        }
        Err(Failure::Error(error)) => {
            say!("error: {error}");
            ExitCode::FAILURE
        }
        Err(Failure::Usage(message)) => {
            say!("error: {message}");
            ExitCode::FAILURE
        }
        Err(Failure::Interrupted) => {
            say!("interrupted");
            ExitCode::from(130)
        }
    }
}

/// Makes Ctrl-C stop what runs between two steps; a second one ends the program at once.
pub fn stop_on_interrupt(cancel: Cancel) {
    stop_or_leave_on_interrupt(cancel, Arc::default());
}

/// The same; while the program waits for its user, Ctrl-C ends it at once.
pub fn stop_or_leave_on_interrupt(cancel: Cancel, waiting: Arc<AtomicBool>) {
    let handler = move || {
        if waiting.load(Ordering::Relaxed) {
            say!("");
            std::process::exit(130);
        }
        if cancel.is_cancelled() {
            std::process::exit(130);
        }
        cancel.cancel();
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        log::warn!("Ctrl-C will end the program at once: {error}");
    }
}

/// A progress bar for loading a model, on a terminal only.
pub fn load_bar(cancel: &Cancel) -> impl FnMut(LoadProgress) -> ControlFlow<()> {
    let bar = ProgressBar::with_draw_target(None, bar_target());
    let style =
        ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes} {bytes_per_sec}");
    if let Ok(style) = style {
        bar.set_style(style);
    }
    let cancel = cancel.clone();
    move |progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.bytes);
        if progress.bytes >= progress.total {
            bar.finish_and_clear();
        }
        if cancel.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// A progress bar over tokens, on a terminal only.
pub fn token_bar(tokens: usize) -> ProgressBar {
    count_bar(tokens, "tokens")
}

/// A progress bar over things of this name, on a terminal only.
pub fn count_bar(count: usize, things: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(count as u64), bar_target());
    let style =
        ProgressStyle::with_template(&format!("{{bar:40}} {{pos}}/{{len}} {things} {{eta}} left"));
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar
}

fn bar_target() -> ProgressDrawTarget {
    if io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    }
}

/// So many tokens, for people.
pub fn tokens(n: usize) -> String {
    if n == 1 { "1 token".to_owned() } else { format!("{n} tokens") }
}

/// Bytes for people, in powers of ten as disks and vendors count.
pub fn bytes(n: u64) -> String {
    let x = n as f64;
    match n {
        0..1_000 => format!("{n} B"),
        1_000..1_000_000 => format!("{:.1} kB", x / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", x / 1e6),
        _ => format!("{:.2} GB", x / 1e9),
    }
}

/// A number of parameters, as models are called after it.
pub fn parameters(n: u64) -> String {
    let x = n as f64;
    match n {
        0..1_000_000 => format!("{:.0} K", x / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", x / 1e6),
        _ => format!("{:.2} B", x / 1e9),
    }
}
