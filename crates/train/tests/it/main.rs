//! Tests of the loop over a small EAGLE3 draft and features made of random numbers.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod checkpoints;
mod fixture;
mod parallel;
mod steps;
mod tensor;
