//! Writes a checkpoint with random weights in the exact layout of a real one, to measure speed and
//! memory at full size without its weights:
//!
//! ```sh
//! cargo run --release --example synthesize -- bitnet-2b bitnet-2b-random
//! cargo run --release -- generate --model bitnet-2b-random "Hello" --verbose
//! ```

use std::path::Path;
use std::process::ExitCode;

use deltallm::checkpoint::synthetic::Synthetic;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let known = match &args[..] {
        [name, dir] => Synthetic::named(name).map(|synthetic| (synthetic, dir)),
        _ => None,
    };
    let Some((synthetic, dir)) = known else {
        eprintln!("usage: synthesize {} DIR", Synthetic::NAMES.join("|"));
        return ExitCode::from(2);
    };
    match synthetic.write(Path::new(dir)) {
        Ok(()) => {
            println!("{dir}: {} with random weights", synthetic.config.architecture.name());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
