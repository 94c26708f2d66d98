//! Where a tensor lives. The rest of the engine reaches a device only through [`Device::kernels`].

use std::fmt;

use specforge_cuda::Gpu;

use crate::cpu::Cpu;
use crate::{DType, Error, Kernels, Result, cuda};

/// A compute device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The host processor: float32 arithmetic, the reference for every other device.
    Cpu,
    /// A CUDA device by its number: bfloat16 storage, float32 accumulation.
    Cuda(usize),
}

impl Device {
    /// The device a recipe names: `cpu`, `cuda` (the first), `cuda:N`, or `auto`: the first CUDA device if there is
    /// one that works, the host processor otherwise. A named device that cannot be used is an error.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "cpu" => Ok(Self::Cpu),
            "auto" => Ok(Self::cuda(0).unwrap_or(Self::Cpu)),
            "cuda" => Self::cuda(0),
            _ => {
                let number = name.strip_prefix("cuda:").and_then(|n| n.parse().ok());
                Self::cuda(number.ok_or_else(|| Error::UnknownDevice(name.to_owned()))?)
            }
        }
    }

    /// A CUDA device, opened.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Gpu::open(ordinal)?;
        Ok(Self::Cuda(ordinal))
    }

    /// The implementation of every operation on this device.
    pub fn kernels(self) -> &'static dyn Kernels {
        match self {
            Self::Cpu => &Cpu,
            Self::Cuda(ordinal) => cuda::kernels(ordinal),
        }
    }

    /// The element type of activations, weights and their gradients between operations.
    pub fn storage(self) -> DType {
        match self {
            Self::Cpu => DType::F32,
            Self::Cuda(_) => DType::Bf16,
        }
    }

    /// The CUDA device behind it.
    pub fn gpu(self) -> Option<&'static Gpu> {
        match self {
            Self::Cpu => None,
            Self::Cuda(ordinal) => Gpu::open(ordinal).ok(),
        }
    }

    /// Lets a device do what `f` asks for, collectives and what they need, beside what it is asked for next; whatever
    /// uses the same tensors next waits for it. On the CPU it is done at once.
    pub fn beside<T>(self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.gpu() {
            Some(gpu) => gpu.beside(f),
            None => f(),
        }
    }

    /// Waits until the device has done everything asked of it.
    pub fn synchronize(self) -> Result<()> {
        self.gpu().map_or(Ok(()), |gpu| Ok(gpu.synchronize()?))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}
