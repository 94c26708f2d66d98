//! Golden exports byte for byte, folders written and read back, and every kind of damage named.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test, as the tests themselves do")]

mod check;
mod draft;
mod folders;
mod golden;
mod others;
mod write;
