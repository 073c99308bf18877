//! A conversation with a model: the messages, and the session whose cache holds them.

use super::{ChatTemplate, Message, Role};
use crate::error::Result;
use crate::session::{FinishReason, GenerateOptions, Generation, Piece, Session, Timings};

/// A conversation. Each turn renders it anew and runs only what the session does not hold yet.
///
/// With dense attention a reply is the same as if the whole conversation had been run at once, up to
/// the order in which a device adds floats.
#[derive(Debug)]
pub struct Conversation {
    session: Session,
    template: ChatTemplate,
    messages: Vec<Message>,
}

impl Conversation {
    /// A conversation in which nothing has been said. Of a text that is in the session already, what
    /// the conversation begins with is kept.
    pub fn new(session: Session, template: ChatTemplate) -> Self {
        Self { session, template, messages: Vec::new() }
    }

    /// Begins anew, with instructions or without.
    pub fn begin(&mut self, system: Option<&str>) {
        self.messages = system.map(Message::system).into_iter().collect();
    }

    /// Forgets what was said, but for the instructions.
    pub fn clear(&mut self) {
        self.messages.truncate(self.instructions());
    }

    /// What was said so far and is still before the model.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Says `text` and lets the model answer, token by token, as the returned iterator is advanced.
    ///
    /// A conversation that leaves less room in the context than `max_tokens`, or than a quarter of
    /// it, loses its oldest turns, until it takes at most half: [`Reply::dropped`] says how many
    /// messages. Their keys and values are not those of the rest, which is run again.
    ///
    /// Dropping the iterator stops the model; what it said until then is its message. Where it said
    /// nothing, `text` is taken back too.
    ///
    /// # Errors
    /// What the template refuses; a text that alone does not fit in the context; as
    /// [`Session::generate`]. Then nothing was said.
    pub fn ask(&mut self, text: &str, options: &GenerateOptions) -> Result<Reply<'_>> {
        let mut messages = self.messages.clone();
        messages.push(Message::user(text));
        let ids = self.fit(&mut messages, options.max_tokens)?;
        let held = self.session.tokens();
        let reused = held.iter().zip(&ids).take_while(|(held, new)| held == new).count();
        self.session.truncate(reused);
        let generation = self.session.generate(&ids[reused..], options)?;
        let dropped = self.messages.len() + 1 - messages.len();
        self.messages = messages;
        let messages = &mut self.messages;
        Ok(Reply { generation, messages, text: String::new(), dropped, reused, failed: false })
    }

    /// Leaves out the oldest turns if need be; the tokens of what stays.
    fn fit(&self, messages: &mut Vec<Message>, max_tokens: usize) -> Result<Vec<u32>> {
        let context = self.session.context();
        let room = max_tokens.min(context / 4);
        let tokenizer = self.session.model().tokenizer();
        let mut ids = self.template.encode(tokenizer, messages, true)?;
        if ids.len() + room <= context {
            return Ok(ids);
        }
        let first = self.instructions();
        while ids.len() > context / 2 {
            // A turn begins with its user.
            let mut rest = messages.iter().enumerate().skip(first + 1);
            let Some((next, _)) = rest.find(|(_, message)| message.role == Role::User) else {
                break;
            };
            messages.drain(first..next);
            ids = self.template.encode(tokenizer, messages, true)?;
        }
        Ok(ids)
    }

    /// Messages at the start that stay.
    fn instructions(&self) -> usize {
        self.messages.first().map_or(0, |message| usize::from(message.role == Role::System))
    }
}

/// The model's answer: an iterator over its pieces.
#[derive(Debug)]
pub struct Reply<'a> {
    generation: Generation<'a>,
    messages: &'a mut Vec<Message>,
    text: String,
    dropped: usize,
    reused: usize,
    failed: bool,
}

impl Reply<'_> {
    /// Messages that were left out for want of room.
    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// Tokens of the conversation that did not have to be run again.
    pub fn reused(&self) -> usize {
        self.reused
    }

    /// What was said so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Why it ended, once the iterator is at its end.
    pub fn finish_reason(&self) -> Option<&FinishReason> {
        self.generation.finish_reason()
    }

    /// Where the time went so far.
    pub fn timings(&self) -> Timings {
        self.generation.timings()
    }
}

impl Iterator for Reply<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        let piece = self.generation.next();
        match &piece {
            Some(Ok(piece)) => self.text.push_str(&piece.text),
            Some(Err(_)) => self.failed = true,
            None => {}
        }
        piece
    }
}

impl Drop for Reply<'_> {
    fn drop(&mut self) {
        let ended = !matches!(self.finish_reason(), None | Some(FinishReason::Cancelled));
        if self.failed || (self.text.is_empty() && !ended) {
            self.messages.pop();
        } else {
            self.messages.push(Message::assistant(std::mem::take(&mut self.text)));
        }
    }
}
