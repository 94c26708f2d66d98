//! Finds CUDA's libraries by their sonames: where the loader looks, then in the folders of the configuration (pip's
//! `nvidia/*/lib`, `CUDA_HOME`), then in the usual places. A library found is loaded by its full path and stays
//! loaded, so that the bindings get it by its soname.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library as Handle, RTLD_GLOBAL, RTLD_NOW};

use crate::{Error, Result, config};

/// A library of CUDA on this machine.
#[derive(Debug, Clone)]
pub struct Library {
    /// Short name: `cuda`, `nvrtc`, `cublasLt`, `nccl`.
    pub name: &'static str,
    /// The file, if it was found.
    pub path: Option<PathBuf>,
    /// Why it was not.
    pub why: Option<String>,
    /// How to get it.
    pub remedy: &'static str,
}

impl Library {
    /// Fails with the remedy if the library is missing.
    pub(crate) fn require(&self) -> Result<()> {
        match &self.path {
            Some(_) => Ok(()),
            None => Err(Error::Library {
                library: self.name,
                why: self.why.clone().unwrap_or_else(|| "no folder has it".to_owned()),
                remedy: self.remedy,
            }),
        }
    }
}

const DRIVER: [&str; 1] = ["libcuda.so.1"];
const NVRTC: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so.12"];
const CUBLAS_LT: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];
const NCCL: [&str; 1] = ["libnccl.so.2"];
const NCCL_REMEDY: &str = "several ranks on GPUs need it: install it with `pip install nvidia-nccl-cu13` (or -cu12), or name its folder in LD_LIBRARY_PATH";
const DRIVER_REMEDY: &str = "install NVIDIA's driver";
const NVRTC_REMEDY: &str = "install it with `pip install nvidia-cuda-nvrtc` or the CUDA toolkit (12 or 13), or name its folder in LD_LIBRARY_PATH";
const BLAS_REMEDY: &str = "install it with `pip install nvidia-cublas` or the CUDA toolkit (12 or 13), or name its folder in LD_LIBRARY_PATH";

/// Folders that CUDA is usually installed to.
const USUAL: [&str; 4] =
    ["/usr/local/cuda/lib64", "/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"];

/// The driver, NVRTC and cuBLASLt, loaded once per process.
pub fn libraries() -> &'static [Library; 3] {
    static FOUND: OnceLock<[Library; 3]> = OnceLock::new();
    FOUND.get_or_init(|| {
        let driver = load("cuda", &DRIVER, DRIVER_REMEDY);
        // A compiler newer than the driver makes code that the driver cannot load: the driver's own generation first.
        let newest_first = driver.path.is_none() || driver_version().is_none_or(|version| version >= 13_000);
        let order = |names: [&'static str; 2]| if newest_first { names } else { [names[1], names[0]] };
        let nvrtc = load("nvrtc", &order(NVRTC), NVRTC_REMEDY);
        nvrtc.path.as_deref().and_then(Path::parent).into_iter().for_each(load_builtins);
        [driver, nvrtc, load("cublasLt", &order(CUBLAS_LT), BLAS_REMEDY)]
    })
}

/// NCCL, which only several ranks need; loaded once per process.
pub fn nccl_library() -> &'static Library {
    static FOUND: OnceLock<Library> = OnceLock::new();
    FOUND.get_or_init(|| load("nccl", &NCCL, NCCL_REMEDY))
}

/// The CUDA version of the driver, 13000 for 13.0; only after the driver was found.
pub(crate) fn driver_version() -> Option<i32> {
    let mut version = 0;
    // SAFETY: the driver is loaded, and the call writes one integer.
    let code = unsafe { cudarc::driver::sys::cuDriverGetVersion(&raw mut version) };
    code.result().is_ok().then_some(version)
}

fn load(name: &'static str, sonames: &[&'static str], remedy: &'static str) -> Library {
    let folders = config().library_folders.iter().cloned().chain(USUAL.iter().map(PathBuf::from));
    let files = folders.flat_map(|folder| sonames.iter().map(move |soname| folder.join(soname)));
    let candidates = sonames.iter().map(PathBuf::from).chain(files.filter(|file| file.exists()));
    let mut why = None;
    for candidate in candidates {
        match open(&candidate) {
            Ok(()) => {
                let path = Some(mapped(sonames).unwrap_or(candidate));
                return Library { name, path, why: None, remedy };
            }
            Err(error) => why = Some(error),
        }
    }
    Library { name, path: None, why, remedy }
}

/// Loads a library for the rest of the process.
fn open(path: &Path) -> Result<(), String> {
    // SAFETY: these are NVIDIA's libraries; their initialisers need nothing of us.
    match unsafe { Handle::open(Some(path), RTLD_NOW | RTLD_GLOBAL) } {
        Ok(handle) => {
            std::mem::forget(handle);
            Ok(())
        }
        Err(error) => {
            Err(std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string))
        }
    }
}

/// The file that the loader chose, which a soname alone does not tell.
fn mapped(sonames: &[&str]) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| {
        let file = path.rsplit('/').next().unwrap_or_default();
        sonames.iter().any(|soname| {
            file.starts_with(soname.split(".so").next().unwrap_or(soname)) && file.contains(".so")
        })
    })?;
    Some(PathBuf::from(path))
}

/// NVRTC opens its builtins by a bare name; a pip wheel does not tell the loader where they are.
fn load_builtins(folder: &Path) {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let builtins = files.filter(|f| f.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so"));
    for file in builtins {
        // Missing ones are reported by the compiler when it needs them.
        let _ = open(&file.path());
    }
}
