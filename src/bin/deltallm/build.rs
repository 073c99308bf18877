//! Tells the program which commit it is built from, so that a benchmark can say what was measured.

use std::path::Path;
use std::process::Command;

fn main() {
    if std::env::var_os("CARGO_FEATURE_CLI").is_some()
        && let Some(commit) = commit(Path::new(env!("CARGO_MANIFEST_DIR")))
    {
        println!("cargo::rustc-env=DELTALLM_COMMIT={commit}");
    }
}

/// The commit of a source tree, `+` for one with changes; nothing where it has no repository, or there
/// is no git.
fn commit(tree: &Path) -> Option<String> {
    let git = |args: &[&str]| {
        let output = Command::new("git").arg("-C").arg(tree).args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    // A tree without a repository may lie within another one.
    let top = std::fs::canonicalize(git(&["rev-parse", "--show-toplevel"])?).ok()?;
    if top != std::fs::canonicalize(tree).ok()? {
        return None;
    }
    let commit = git(&["rev-parse", "--short", "HEAD"])?;
    let changed = !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    Some(if changed { commit + "+" } else { commit })
}
