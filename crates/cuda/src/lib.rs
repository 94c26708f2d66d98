//! CUDA, found at run time: nothing of it is needed to build this program or to run it on the CPU.
//!
//! [`Gpu`] is one device with its stream; [`Memory`] comes from a stream-ordered pool; a [`Unit`] is a kernel source
//! that NVRTC compiles at first use and a cache on disk keeps; [`Gemm`] is a matrix product of cuBLASLt. Everything
//! runs on one compute stream, in the order of the calls, whatever thread makes them; copies from the host have a
//! stream of their own. This crate knows no tensors.

#![expect(unsafe_code, reason = "calls of the driver, NVRTC and cuBLASLt; each block says why it is sound")]

mod blas;
mod compiler;
mod error;
mod gpu;
mod libraries;
mod memory;
mod nccl;
mod pinned;
mod tensor_map;
mod unit;

use std::path::PathBuf;
use std::sync::OnceLock;

pub use blas::{Gemm, GemmType, Operand, blas_version};
pub use compiler::{Architecture, Compiler};
pub use error::{Error, Result};
pub use gpu::{Event, Gpu, Properties};
pub use libraries::{Library, libraries, nccl_library};
pub use memory::{Memory, Usage};
pub use nccl::{Communicator, Element, Reduction, unique_id};
pub use pinned::Readback;
pub use tensor_map::TensorMap;
pub use unit::{Arg, Defines, Launch, Unit};

/// Where to look for CUDA and where to keep compiled kernels: what the command line knows and a library must not read.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Folders of CUDA libraries, searched after the system's own places.
    pub library_folders: Vec<PathBuf>,
    /// Folder of compiled kernels; absent: they are compiled by every process.
    pub kernel_cache: Option<PathBuf>,
    /// Told before a kernel source is compiled, with its name.
    pub on_compile: Option<fn(&str)>,
}

static CONFIG: OnceLock<Config> = OnceLock::new();

/// Sets the configuration; only the first call in a process counts, and only before a device is opened.
pub fn configure(config: Config) {
    // Later calls are tests in one process: they all say the same.
    let _ = CONFIG.set(config);
}

fn config() -> &'static Config {
    CONFIG.get_or_init(Config::default)
}
