//! Tests of the crate: golden cases, the steps of a row, prepared sets, and bad input.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bad_input;
mod fixture;
mod formats;
mod golden_mask;
mod golden_vocab;
mod prepared;
mod prompts;
mod sources;
mod template;
mod tokenizer;
mod vocab;
