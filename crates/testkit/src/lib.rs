//! Test support that every crate may use: golden cases, tensor files, comparisons, random numbers.
//!
//! Everything here panics on failure, with a message that says what to look at: it only ever runs
//! inside tests. It depends on no other crate of the workspace, so that every one of them can use it.

mod compare;
mod golden;
mod http;
mod hub;
mod mpi;
mod random;
mod target;
mod tensors;
mod torch;

pub use compare::{assert_close, assert_close_max};
pub use golden::{
    announce_skip, case_json, golden_case, golden_cases, golden_dir, is_rank, own_case, test_device,
};
pub use http::{HttpRequest, HttpResponse, HttpServer};
pub use hub::{COMMIT, Fault, TestHub, Uploads};
pub use mpi::{mpirun, passes_on_ranks, test_on_ranks};
pub use random::Lcg;
pub use target::{CHATML, SmallTarget, TargetTensor, byte_level_tokenizer, tokenizer_config};
pub use tensors::{Tensor, Tensors, Values};
pub use torch::{TorchEntry, torch_archive, torch_file};

/// A fresh folder that is removed when the returned guard is dropped.
pub fn tempdir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("specforge-test-").tempdir().expect("a temporary folder can be made")
}
