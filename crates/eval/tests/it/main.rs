//! Speculative decoding with a tiny random target: the text is the target's own, and what is counted is what happened.

mod acceptance;
mod bad_input;
mod lossless;
mod sampled;
mod support;
