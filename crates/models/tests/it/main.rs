//! Targets against the reference cases, against themselves, and against damaged folders.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic with what failed, as tests do")]

mod bad_input;
mod batch;
mod decode;
mod folder;
mod fp8;
mod golden;
mod mixtures;
mod parallel;
