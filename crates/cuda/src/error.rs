//! What can be wrong with a machine's CUDA, and what to do about it.

use cudarc::cublaslt::result::CublasError;
use cudarc::driver::result::DriverError;

/// An error of the CUDA layer.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A library is missing.
    #[error("CUDA: {library} was not found ({why}); {remedy}, or use device = \"cpu\"")]
    Library {
        /// Its name.
        library: &'static str,
        /// What the loader said last.
        why: String,
        /// How to get it.
        remedy: &'static str,
    },
    /// The driver is there and no device.
    #[error(
        "CUDA: the driver is installed but sees no device {ordinal} ({why}); check nvidia-smi and CUDA_VISIBLE_DEVICES, or use device = \"cpu\""
    )]
    NoDevice {
        /// The device asked for.
        ordinal: usize,
        /// What the driver said.
        why: String,
    },
    /// Something is older than this program needs.
    #[error("CUDA: {what} is {got}, at least {needed} is needed; {remedy}")]
    TooOld {
        /// The driver, a library or a device.
        what: String,
        /// Its version.
        got: String,
        /// The oldest that will do.
        needed: &'static str,
        /// How to get there.
        remedy: &'static str,
    },
    /// Device memory is used up.
    #[error(
        "out of device memory: {} asked for, {} free of {}; this process holds {} (most so far {})",
        mib(*asked), mib(*free), mib(*total), mib(*held), mib(*peak)
    )]
    OutOfMemory {
        /// Bytes of the allocation that failed.
        asked: usize,
        /// Bytes free on the device.
        free: usize,
        /// Bytes of the device.
        total: usize,
        /// Bytes this process has in use.
        held: usize,
        /// The most it had in use.
        peak: usize,
    },
    /// A call of the driver failed: the device was lost, or a kernel is faulty.
    #[error("CUDA: {call} failed: {why}")]
    Driver {
        /// What was called.
        call: &'static str,
        /// The driver's name and text for it.
        why: String,
    },
    /// NVRTC refused a kernel source.
    #[error("CUDA: kernels {unit} do not compile for {arch}:\n{log}")]
    Compile {
        /// The source's name.
        unit: String,
        /// The architecture.
        arch: String,
        /// The compiler's log.
        log: String,
    },
    /// A call between devices failed.
    #[error("NCCL: {call} failed: {why}")]
    Nccl {
        /// What was called.
        call: &'static str,
        /// NCCL's words.
        why: String,
    },
    /// cuBLASLt refused a matrix product.
    #[error("cuBLASLt: {0}")]
    Blas(String),
}

/// The result of a CUDA call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Adds the name of the call to an error of the driver.
pub(crate) trait Called<T> {
    fn called(self, call: &'static str) -> Result<T>;
}

impl<T> Called<T> for Result<T, DriverError> {
    fn called(self, call: &'static str) -> Result<T> {
        self.map_err(|e| Error::Driver { call, why: driver_text(e) })
    }
}

impl<T> Called<T> for Result<T, CublasError> {
    fn called(self, call: &'static str) -> Result<T> {
        self.map_err(|e| Error::Blas(format!("{call}: {e:?}")))
    }
}

/// The driver's own words for an error.
pub(crate) fn driver_text(error: DriverError) -> String {
    let text =
        |t: Result<&std::ffi::CStr, DriverError>| t.map_or(String::new(), |t| t.to_string_lossy().into());
    let (name, words) = (text(error.error_name()), text(error.error_string()));
    if name.is_empty() { format!("{error:?}") } else { format!("{name}: {words}") }
}
