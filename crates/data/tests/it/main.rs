//! Tests of the crate: golden cases, the steps of a row, prepared sets, and bad input.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod agree;
mod arrow;
mod bad_input;
mod datasets;
mod fixture;
mod formats;
mod golden_mask;
mod golden_vocab;
mod interrupted;
mod prepared;
mod prompts;
mod sources;
mod template;
mod tokenizer;
mod turns;
mod vocab;
