//! The storage of tensors as bytes and addresses, for whoever moves it between ranks; and 64-bit floats, which only
//! they use.

use half::{bf16, f16};

use crate::tensor::Buffer;
use crate::{DType, Device, Error, Later, Result, Tensor};

impl Buffer {
    /// Zeros on the host.
    pub(crate) fn zeros(dtype: DType, n: usize) -> Result<Self> {
        Ok(match dtype {
            DType::F32 => Self::F32(vec![0.0; n]),
            DType::F64 => Self::F64(vec![0.0; n]),
            DType::Bf16 => Self::Bf16(vec![bf16::ZERO; n]),
            DType::F16 => Self::F16(vec![f16::ZERO; n]),
            DType::U32 => Self::U32(vec![0; n]),
            DType::I16 => Self::I16(vec![0; n]),
            DType::E4m3 => {
                let (op, what, expected) = ("zeros", "the element type", "one that the CPU has");
                return Err(Error::DType { op, what, expected, got: dtype });
            }
        })
    }
}

impl Tensor {
    /// A float64 tensor from host values.
    pub fn from_f64(device: Device, values: Vec<f64>) -> Result<Self> {
        let shape = [values.len()];
        Self::from_host(device, Buffer::F64(values), &shape)
    }

    /// The elements of a float64 tensor, when a device has got there; empty for other types.
    pub fn later_f64(&self) -> Result<Later<Vec<f64>>> {
        match (self.buffer(), self.stored()) {
            (Buffer::F64(values), _) => Ok(Later::ready(values.clone())),
            (_, Some(stored)) if stored.dtype() == DType::F64 => stored.later_f64(),
            _ => Ok(Later::ready(Vec::new())),
        }
    }

    /// The same elements in storage of their own.
    pub fn copied(&self) -> Result<Self> {
        match self.stored() {
            Some(stored) => Ok(Self::from_stored(self.device(), stored.copied()?, self.shape())),
            None => Self::from_host(self.device(), self.buffer().clone(), self.shape()),
        }
    }

    /// A tensor of zeros with the element type and device of this one.
    pub fn zeros_like(&self, shape: &[usize]) -> Result<Self> {
        Self::zeros_of(self.device(), self.dtype(), shape)
    }

    /// As [`Tensor::zeros_like`], for a call that writes every element.
    pub fn unwritten_like(&self, shape: &[usize]) -> Result<Self> {
        match self.stored() {
            None => self.zeros_like(shape),
            Some(stored) => {
                let new = crate::cuda::Stored::new(stored.gpu(), self.dtype(), shape.iter().product())?;
                Ok(Self::from_stored(self.device(), new, shape))
            }
        }
    }

    /// The elements as bytes; `None` on a device.
    pub fn host_bytes(&self) -> Option<&[u8]> {
        Some(match self.buffer() {
            Buffer::F32(v) => bytemuck::cast_slice(v),
            Buffer::F64(v) => bytemuck::cast_slice(v),
            Buffer::Bf16(v) => bytemuck::cast_slice(v),
            Buffer::F16(v) => bytemuck::cast_slice(v),
            Buffer::U32(v) => bytemuck::cast_slice(v),
            Buffer::I16(v) => bytemuck::cast_slice(v),
            Buffer::Cuda(_) => return None,
        })
    }

    /// As [`Tensor::host_bytes`], for writing; a shared storage is copied first.
    pub fn host_bytes_mut(&mut self) -> Option<&mut [u8]> {
        if self.stored().is_some() {
            return None;
        }
        Some(match self.buffer_mut() {
            Buffer::F32(v) => bytemuck::cast_slice_mut(v),
            Buffer::F64(v) => bytemuck::cast_slice_mut(v),
            Buffer::Bf16(v) => bytemuck::cast_slice_mut(v),
            Buffer::F16(v) => bytemuck::cast_slice_mut(v),
            Buffer::U32(v) => bytemuck::cast_slice_mut(v),
            Buffer::I16(v) => bytemuck::cast_slice_mut(v),
            Buffer::Cuda(_) => return None,
        })
    }

    /// Where the elements lie on a device, for reading; `None` on the host.
    pub fn address(&self) -> Result<Option<u64>> {
        self.stored().map(crate::cuda::Stored::address).transpose()
    }

    /// As [`Tensor::address`], for writing; a shared storage is copied first.
    pub fn address_mut(&mut self) -> Result<Option<u64>> {
        if self.stored().is_none() {
            return Ok(None);
        }
        self.stored_mut()?.address().map(Some)
    }
}
