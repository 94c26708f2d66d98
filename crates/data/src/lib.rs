//! Conversations to token ids and loss masks.
//!
//! The way of a row: read its bytes, parse a [`Conversation`], render it with the [`ChatTemplate`], encode the
//! text once with the [`Tokenizer`], turn the supervised bytes into a [`loss_mask`], and append both to a
//! [`Prepared`] set on disk. [`prepare`] does this for whole files; the other public functions are its steps, the
//! mask viewer ([`runs`]), the draft's vocabulary ([`VocabMap`]) and the prompts of an evaluation ([`read_prompts`]).

mod columns;
mod conversation;
mod date;
mod encode;
mod error;
mod harmony;
mod jinja;
mod mask;
mod named;
mod prepare;
mod prompts;
mod python_json;
mod read;
mod report;
mod rows;
mod set;
mod source;
mod spans;
mod specforge;
mod special;
mod split;
mod template;
mod tokenizer;
mod view;
mod vocab;

pub use columns::Columns;
pub use conversation::{Conversation, Message};
pub use encode::RowFormat;
pub use error::{Error, Result};
pub use mask::loss_mask;
pub use named::{NamedTemplate, Spans, SpecforgeStrings, named_templates};
pub use prepare::{MaskCompat, OnError, PrepareConfig, prepare};
pub use prompts::{Prompt, read_prompts};
pub use report::{DropReason, Dropped, Report, SpanSource, Warning};
pub use rows::{RawRow, RawRows};
pub use set::{Prepared, RowRef};
pub use source::Source;
pub use special::SpecialTokens;
pub use template::{ChatTemplate, Rendered, TemplateOptions};
pub use tokenizer::{Encoded, TextStream, Tokenizer};
pub use view::{Run, runs};
pub use vocab::{TokenCounts, Unseen, VocabMap};
