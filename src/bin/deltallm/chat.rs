//! `deltallm chat`: talk with a model in the template of its own, in a terminal or from a script.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use deltallm::chat::{ChatTemplate, Conversation};
use deltallm::{Cancel, Error, FinishReason, GenerateOptions, Session, SessionOptions};
use serde_json::json;

use crate::args::{ModelArgs, OpenModel, SamplingArgs};
use crate::attention_args::{Attention, AttentionArgs};
use crate::generate::describe;
use crate::output::{Failure, Outcome, say, stop_or_leave_on_interrupt, tokens};

/// Tokens of a reply, where it is not said how many.
const MAX_TOKENS: usize = 512;

const HELP: &str = "\
/clear  forget the conversation, but for --system
/help   show this
/exit   leave, as Ctrl-D does; Ctrl-C stops a reply, and leaves where there is none";

/// Options of `chat`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// Instructions at the start of the conversation, which not every model was trained for
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Tokens that the conversation may have before its oldest turns are left out, up to the model's
    /// limit [default: 4096, or the model's limit]
    #[arg(long, value_name = "N")]
    context: Option<usize>,

    /// Tokens of a reply at most
    #[arg(short = 'n', long, value_name = "N", default_value_t = MAX_TOKENS)]
    max_tokens: usize,

    #[command(flatten)]
    sampling: SamplingArgs,

    /// Print one JSON object a turn instead of the reply
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    attention: AttentionArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Outcome {
    args.sampling.check()?;
    let Attention { policy, thresholds } = args.attention.policy()?;
    let cancel = Cancel::default();
    let waiting = Arc::new(AtomicBool::new(false));
    stop_or_leave_on_interrupt(cancel.clone(), waiting.clone());
    let opened = args.model.open_quietly(&cancel)?;
    let template = ChatTemplate::of(&opened.model)?.ok_or_else(|| no_template(&opened.name))?;
    let options = SessionOptions { context: args.context, attention: policy, thresholds };
    let mut session = Session::new(&opened.model, &options)?;
    session.cancel_with(cancel.clone());
    let mut conversation = Conversation::new(session, template);
    conversation.begin(args.system.as_deref());

    let terminal = io::stdin().is_terminal();
    if terminal {
        let device = opened.model.device();
        say!("This is {}.", opened.about);
        say!(
            "It runs on {} ({}). /help shows the commands, /exit leaves.",
            device.name,
            device.backend
        );
    }
    let sampling = args.sampling.sampling(&opened.model.config().sampling)?;
    let options = GenerateOptions { sampling, max_tokens: args.max_tokens, ..Default::default() };
    let mut chat = Chat { conversation, options, opened, cancel, terminal, json: args.json };
    while let Some(line) = next_line(terminal, &waiting)? {
        if terminal {
            // A Ctrl-C that came between the end of a reply and the prompt meant that reply.
            chat.cancel.reset();
        }
        match line.trim() {
            "" => {}
            "/exit" | "/quit" if terminal => break,
            "/help" if terminal => say!("{HELP}"),
            "/clear" if terminal => {
                chat.conversation.clear();
                say!("(the conversation is forgotten)");
            }
            command if terminal && command.starts_with('/') => {
                say!("{command} is not a command\n{HELP}");
            }
            _ => chat.turn(&line)?,
        }
    }
    Ok(())
}

/// A line of standard input without its end; `None` at the end.
fn next_line(terminal: bool, waiting: &AtomicBool) -> Result<Option<String>, Failure> {
    if terminal {
        let mut err = io::stderr();
        // As everything that is for people: it does not matter whether it can be read.
        let _ = write!(err, "> ").and_then(|()| err.flush());
    }
    let mut line = String::new();
    waiting.store(true, Ordering::Relaxed);
    let read = io::stdin().lock().read_line(&mut line);
    waiting.store(false, Ordering::Relaxed);
    let length =
        read.map_err(|source| Error::Io { path: PathBuf::from("standard input"), source })?;
    if length == 0 {
        if terminal {
            say!("");
        }
        return Ok(None);
    }
    line.truncate(line.trim_end_matches(['\n', '\r']).len());
    Ok(Some(line))
}

struct Chat {
    conversation: Conversation,
    options: GenerateOptions,
    opened: OpenModel,
    cancel: Cancel,
    terminal: bool,
    json: bool,
}

impl Chat {
    /// Answers one line. In a terminal, what can go on does.
    fn turn(&mut self, text: &str) -> Outcome {
        match self.answer(text) {
            // Before the first token: nothing was said.
            Err(Failure::Interrupted) if self.terminal => {
                self.cancel.reset();
                say!("(stopped)");
                Ok(())
            }
            Err(Failure::Error(error @ Error::ContextFull { .. })) if self.terminal => {
                say!("{error}\n(nothing was said: try something shorter)");
                Ok(())
            }
            outcome => outcome,
        }
    }

    fn answer(&mut self, text: &str) -> Outcome {
        let context = self.conversation.session().context();
        let mut reply = self.conversation.ask(text, &self.options)?;
        let (dropped, reused) = (reply.dropped(), reply.reused());
        if dropped > 0 {
            say!(
                "(the context of {} is full: the {dropped} oldest messages are forgotten, and the \
                 rest is read again)",
                tokens(context)
            );
        }
        let mut out = io::stdout().lock();
        let mut ids = Vec::new();
        let mut begun = false;
        while let Some(piece) = reply.next().transpose()? {
            ids.extend(piece.token);
            // Templates that end in "Assistant:" make the model begin with a space.
            let text = if begun { &piece.text[..] } else { piece.text.trim_start() };
            begun |= !text.is_empty();
            if !self.json {
                out.write_all(text.as_bytes())?;
                out.flush()?;
            }
        }
        let finish = reply.finish_reason().cloned().unwrap_or(FinishReason::Cancelled);
        if self.json {
            let timings = reply.timings();
            let object = json!({
                "model": self.opened.name,
                "user": text,
                "reply": reply.text().trim(),
                "ids": ids,
                "finish_reason": finish.name(),
                "dropped_messages": dropped,
                "device": describe(&self.opened.model),
                "timings": {
                    "reused_tokens": reused,
                    "prompt_tokens": timings.prompt_tokens,
                    "prefill_s": timings.prefill.as_secs_f64(),
                    "new_tokens": timings.new_tokens,
                    "decode_s": timings.decode.as_secs_f64(),
                },
            });
            writeln!(out, "{object}")?;
        } else {
            writeln!(out)?;
        }
        out.flush()?;
        match finish {
            FinishReason::Cancelled if self.terminal => {
                self.cancel.reset();
                say!("(stopped)");
            }
            FinishReason::Cancelled => return Err(Failure::Interrupted),
            FinishReason::MaxTokens => {
                say!("(cut after {}: --max-tokens)", tokens(ids.len()));
            }
            FinishReason::ContextFull => say!(
                "(the context of {} is full: the reply ends here; with the next turn the oldest \
                 ones are forgotten, or /clear begins anew)",
                tokens(context)
            ),
            FinishReason::EndOfSequence(_) | FinishReason::Stop(_) => {}
        }
        Ok(())
    }
}

fn no_template(name: &str) -> Failure {
    Failure::Usage(format!(
        "{name} has no chat template (chat_template.jinja, or chat_template in \
         tokenizer_config.json): it was not made for conversations; use `deltallm generate`"
    ))
}
