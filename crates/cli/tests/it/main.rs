//! Tests of the program as users run it: the binary, a small random target, a few dozen conversations.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod apart;
mod bad_data;
mod bad_folder;
mod bad_run;
mod bad_target;
mod bench;
mod hub;
mod import;
mod kill;
mod layout;
mod left;
mod look;
mod modes;
mod parallel;
mod plan;
mod prepare;
mod regenerate;
mod regenerate_tools;
mod resume;
mod sequence;
mod store;
mod tensor;
mod train;
mod warm_start;
mod world;
