//! A model inside an application: open it once, keep a session a conversation, stream the text.
//!
//! ```sh
//! cargo run --release --example embed -- /path/to/model "The capital of France is"
//! ```

use std::io::Write;

use deltallm::{GenerateOptions, Model, ModelOptions, Sampling, Session, SessionOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(dir), Some(prompt)) = (args.next(), args.next()) else {
        return Err("usage: embed MODEL_DIR PROMPT".into());
    };

    // The weights go to the GPU, or to the CPU where there is none. Clones share them.
    let model = Model::open(dir, &ModelOptions::default())?;
    println!("running on {}", model.device().name);

    // A session reserves its cache; it belongs to one conversation.
    let mut session = Session::new(&model, &SessionOptions::default())?;
    let options = GenerateOptions {
        sampling: Sampling { temperature: 0.7, seed: 1, ..Sampling::default() },
        max_tokens: 64,
        ..GenerateOptions::default()
    };
    let ids = model.tokenizer().encode(&prompt)?;
    let mark = ids.len();
    for piece in session.generate(&ids, &options)? {
        print!("{}", piece?.text);
        std::io::stdout().flush()?;
    }
    println!();

    // Another answer to the same prompt: only what follows it is computed again.
    session.truncate(mark);
    let another = GenerateOptions { sampling: Sampling { seed: 2, ..options.sampling }, ..options };
    for piece in session.generate(&[], &another)? {
        print!("{}", piece?.text);
        std::io::stdout().flush()?;
    }
    println!();
    Ok(())
}
