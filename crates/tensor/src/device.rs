//! Where a tensor lives. The rest of the engine reaches a device only through [`Device::kernels`].

use crate::{Error, Kernels, Result, cpu::Cpu};

/// A compute device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The host processor: float32 arithmetic, the reference for every other device.
    Cpu,
}

impl Device {
    /// The device a recipe names: `auto` and `cpu` are the host processor.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "auto" | "cpu" => Ok(Self::Cpu),
            _ => Err(Error::UnknownDevice(name.to_owned())),
        }
    }

    /// The implementation of every operation on this device.
    pub fn kernels(self) -> &'static dyn Kernels {
        match self {
            Self::Cpu => &Cpu,
        }
    }
}
