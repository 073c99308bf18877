//! Conversations: a checkpoint's own chat template, and the turns that a session answers.
//!
//! ```no_run
//! use deltallm::chat::{ChatTemplate, Conversation};
//! use deltallm::{GenerateOptions, Model, ModelOptions, Session, SessionOptions};
//!
//! # fn main() -> deltallm::Result<()> {
//! let model = Model::open("path/to/model", &ModelOptions::default())?;
//! let Some(template) = ChatTemplate::of(&model)? else {
//!     return Ok(()); // a model for texts, not for conversations
//! };
//! let session = Session::new(&model, &SessionOptions::default())?;
//! let mut conversation = Conversation::new(session, template);
//! for piece in conversation.ask("Who are you?", &GenerateOptions::default())? {
//!     print!("{}", piece?.text);
//! }
//! # Ok(())
//! # }
//! ```

mod budget;
mod conversation;
mod counted;
mod growing;
mod jinja;
mod template;

pub use conversation::{Conversation, Reply};
pub use template::ChatTemplate;

/// Who says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Role {
    /// Instructions that hold for the whole conversation; not every template knows them.
    System,
    /// Who asks.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// The name in templates.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// What was said by one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// By whom.
    pub role: Role,
    /// What. A special token's text, such as `<|eot_id|>`, is that token here too.
    pub content: String,
}

impl Message {
    /// Instructions for the whole conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: Role::System, content: content.into() }
    }

    /// A turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: Role::User, content: content.into() }
    }

    /// A turn of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: Role::Assistant, content: content.into() }
    }
}
