//! The mask viewer: a row as runs of text, supervised or not.

use crate::error::Result;
use crate::set::RowRef;
use crate::tokenizer::Tokenizer;

/// A piece of a row's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The text; the pieces of a row in order are exactly its decoded text.
    pub text: String,
    /// Whether it is supervised.
    pub supervised: bool,
}

/// The runs of a row. A character whose tokens are partly supervised counts as its last token does.
pub fn runs(tokenizer: &Tokenizer, row: RowRef<'_>) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    let mut stream = tokenizer.stream();
    let mut supervised = false;
    for (&id, &bit) in row.ids.iter().zip(row.loss_mask) {
        supervised = bit == 1;
        append(&mut runs, stream.push(id)?, supervised);
    }
    append(&mut runs, stream.finish()?, supervised);
    Ok(runs)
}

fn append(runs: &mut Vec<Run>, text: String, supervised: bool) {
    match runs.last_mut() {
        _ if text.is_empty() => {}
        Some(last) if last.supervised == supervised => last.text.push_str(&text),
        _ => runs.push(Run { text, supervised }),
    }
}
