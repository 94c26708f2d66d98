//! A dense, row-major tensor: element type, shape, and storage shared by reference count.

use std::borrow::Cow;
use std::sync::Arc;

use half::{bf16, f16};

use crate::{Device, Error, Result};

/// Element types of tensors. Arithmetic is float32 on the CPU whatever the storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// bfloat16: storage of weights and features.
    Bf16,
    /// IEEE half: storage of weights.
    F16,
    /// Row numbers, token ids, positions.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// Host storage of one tensor. A device of its own memory adds a variant to [`Storage`], not here.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Buffer {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    U32(Vec<u32>),
}

/// A dense row-major tensor. Cloning shares the storage; storage is written only while it is not shared.
#[derive(Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    buffer: Arc<Buffer>,
    device: Device,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({:?}, {:?}, {:?})", self.dtype(), self.shape, self.device)
    }
}

impl Tensor {
    /// A tensor over `buffer`; the caller guarantees the element count.
    pub(crate) fn from_buffer(device: Device, buffer: Buffer, shape: &[usize]) -> Result<Self> {
        let n = match &buffer {
            Buffer::F32(v) => v.len(),
            Buffer::Bf16(v) => v.len(),
            Buffer::F16(v) => v.len(),
            Buffer::U32(v) => v.len(),
        };
        if n != shape.iter().product::<usize>() {
            return Err(Error::shape("tensor", "data", format!("{n} elements"), shape));
        }
        Ok(Self { shape: shape.to_vec(), buffer: Arc::new(buffer), device })
    }

    /// A float32 tensor from host values.
    pub fn from_f32(device: Device, values: Vec<f32>, shape: &[usize]) -> Result<Self> {
        Self::from_buffer(device, Buffer::F32(values), shape)
    }

    /// A bfloat16 tensor from host values.
    pub fn from_bf16(device: Device, values: Vec<bf16>, shape: &[usize]) -> Result<Self> {
        Self::from_buffer(device, Buffer::Bf16(values), shape)
    }

    /// A half-precision tensor from host values.
    pub fn from_f16(device: Device, values: Vec<f16>, shape: &[usize]) -> Result<Self> {
        Self::from_buffer(device, Buffer::F16(values), shape)
    }

    /// A one-dimensional tensor of row numbers, token ids or positions.
    pub fn from_u32(device: Device, values: Vec<u32>) -> Self {
        let shape = vec![values.len()];
        Self { shape, buffer: Arc::new(Buffer::U32(values)), device }
    }

    /// A float32 tensor of zeros.
    pub fn zeros(device: Device, shape: &[usize]) -> Self {
        let n = shape.iter().product();
        Self { shape: shape.to_vec(), buffer: Arc::new(Buffer::F32(vec![0.0; n])), device }
    }

    /// The same values in another float type (rounded to nearest even).
    pub fn cast(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        let values = self.to_f32();
        let buffer = match dtype {
            DType::F32 => Buffer::F32(values),
            DType::Bf16 => Buffer::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
            DType::F16 => Buffer::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
            DType::U32 => {
                return Err(Error::DType {
                    op: "cast",
                    what: "the new type",
                    expected: "a float type",
                    got: dtype,
                });
            }
        };
        Self::from_buffer(self.device, buffer, &self.shape)
    }

    /// The same elements under another shape.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if shape.iter().product::<usize>() != self.len() {
            return Err(Error::shape("reshape", "the new shape", format!("{} elements", self.len()), shape));
        }
        Ok(Self { shape: shape.to_vec(), ..self.clone() })
    }

    /// Appends the rows of a tensor of the same width and element type; storage that is not shared grows in place.
    pub fn append_rows(&mut self, rows: &Self) -> Result<()> {
        let ((n, width), (more, other)) = (self.rows_cols(), rows.rows_cols());
        if width != other {
            return Err(Error::shape("append_rows", "rows", format!("[.., {width}]"), rows.shape()));
        }
        match (self.buffer_mut(), rows.buffer()) {
            (Buffer::F32(a), Buffer::F32(b)) => a.extend_from_slice(b),
            (Buffer::Bf16(a), Buffer::Bf16(b)) => a.extend_from_slice(b),
            (Buffer::F16(a), Buffer::F16(b)) => a.extend_from_slice(b),
            (Buffer::U32(a), Buffer::U32(b)) => a.extend_from_slice(b),
            _ => {
                let got = rows.dtype();
                return Err(Error::DType { op: "append_rows", what: "rows", expected: "the same type", got });
            }
        }
        self.shape = vec![n + more, width];
        Ok(())
    }

    /// Drops all rows from the `n`-th on.
    pub fn truncate_rows(&mut self, n: usize) {
        let (rows, width) = self.rows_cols();
        let n = n.min(rows);
        match self.buffer_mut() {
            Buffer::F32(v) => v.truncate(n * width),
            Buffer::Bf16(v) => v.truncate(n * width),
            Buffer::F16(v) => v.truncate(n * width),
            Buffer::U32(v) => v.truncate(n * width),
        }
        self.shape = vec![n, width];
    }

    /// The shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows and row width of a tensor seen as a matrix: the last dimension is the width.
    pub fn rows_cols(&self) -> (usize, usize) {
        let cols = self.shape.last().copied().unwrap_or(1);
        (self.shape[..self.shape.len().saturating_sub(1)].iter().product(), cols)
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match &*self.buffer {
            Buffer::F32(_) => DType::F32,
            Buffer::Bf16(_) => DType::Bf16,
            Buffer::F16(_) => DType::F16,
            Buffer::U32(_) => DType::U32,
        }
    }

    /// The device that holds the tensor.
    pub fn device(&self) -> Device {
        self.device
    }

    /// A host copy as float32; row numbers are converted too.
    pub fn to_f32(&self) -> Vec<f32> {
        match &*self.buffer {
            Buffer::F32(v) => v.clone(),
            Buffer::Bf16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Buffer::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Buffer::U32(v) => v.iter().map(|&x| x as f32).collect(),
        }
    }

    /// A host copy as bfloat16 (rounded to nearest even).
    pub fn to_bf16(&self) -> Vec<bf16> {
        match &*self.buffer {
            Buffer::Bf16(v) => v.clone(),
            _ => self.to_f32().into_iter().map(bf16::from_f32).collect(),
        }
    }

    /// The elements of a tensor of row numbers; `None` for float tensors.
    pub fn u32s(&self) -> Option<&[u32]> {
        match &*self.buffer {
            Buffer::U32(v) => Some(v),
            _ => None,
        }
    }

    /// The elements as float32: borrowed where that is the storage, widened otherwise.
    pub fn f32s(&self) -> Cow<'_, [f32]> {
        match &*self.buffer {
            Buffer::F32(v) => Cow::Borrowed(v),
            _ => Cow::Owned(self.to_f32()),
        }
    }

    pub(crate) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// The storage for writing; a shared storage is copied first.
    pub(crate) fn buffer_mut(&mut self) -> &mut Buffer {
        Arc::make_mut(&mut self.buffer)
    }
}
