//! A dense, row-major tensor: element type, shape, and storage shared by reference count.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use crate::cuda::Stored;
use crate::{Device, Error, Later, Result};

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
    /// 8-bit float, four bits of exponent, with a float32 scale per row: frozen weights on a CUDA device.
    E4m3,
    /// What bfloat16 weights lose of their float32 masters, see [`Kernels::remainder`](crate::Kernels::remainder).
    I16,
    /// 64-bit float: sums and weights that ranks add up.
    F64,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 | Self::U32 => 4,
            Self::Bf16 | Self::F16 | Self::I16 => 2,
            Self::E4m3 => 1,
        }
    }
}

/// Storage of one tensor.
#[derive(Debug)]
pub(crate) enum Buffer {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    U32(Vec<u32>),
    I16(Vec<i16>),
    F64(Vec<f64>),
    /// In the memory of a CUDA device.
    Cuda(Stored),
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        match self {
            Self::F32(v) => Self::F32(v.clone()),
            Self::Bf16(v) => Self::Bf16(v.clone()),
            Self::F16(v) => Self::F16(v.clone()),
            Self::U32(v) => Self::U32(v.clone()),
            Self::I16(v) => Self::I16(v.clone()),
            Self::F64(v) => Self::F64(v.clone()),
            Self::Cuda(_) => unreachable!("device memory is copied by the device"),
        }
    }
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
    /// A tensor over host values; the caller guarantees the element type fits the device.
    pub(crate) fn from_host(device: Device, buffer: Buffer, shape: &[usize]) -> Result<Self> {
        let n = match &buffer {
            Buffer::F32(v) => v.len(),
            Buffer::Bf16(v) => v.len(),
            Buffer::F16(v) => v.len(),
            Buffer::U32(v) => v.len(),
            Buffer::I16(v) => v.len(),
            Buffer::F64(v) => v.len(),
            Buffer::Cuda(stored) => stored.len(),
        };
        if n != shape.iter().product::<usize>() {
            return Err(Error::shape("tensor", "data", format!("{n} elements"), shape));
        }
        let buffer = match device.gpu() {
            None => buffer,
            Some(gpu) => Buffer::Cuda(Stored::upload(gpu, &buffer)?),
        };
        Ok(Self { shape: shape.to_vec(), buffer: Arc::new(buffer), device })
    }

    /// A tensor over device memory.
    pub(crate) fn from_stored(device: Device, stored: Stored, shape: &[usize]) -> Self {
        debug_assert_eq!(stored.len(), shape.iter().product::<usize>());
        Self { shape: shape.to_vec(), buffer: Arc::new(Buffer::Cuda(stored)), device }
    }

    /// A float32 tensor from host values.
    pub fn from_f32(device: Device, values: Vec<f32>, shape: &[usize]) -> Result<Self> {
        Self::from_host(device, Buffer::F32(values), shape)
    }

    /// A bfloat16 tensor from host values.
    pub fn from_bf16(device: Device, values: Vec<bf16>, shape: &[usize]) -> Result<Self> {
        Self::from_host(device, Buffer::Bf16(values), shape)
    }

    /// A half-precision tensor from host values.
    pub fn from_f16(device: Device, values: Vec<f16>, shape: &[usize]) -> Result<Self> {
        Self::from_host(device, Buffer::F16(values), shape)
    }

    /// What bfloat16 weights lose of their masters, on the host.
    pub(crate) fn from_i16(values: Vec<i16>, shape: &[usize]) -> Self {
        Self { shape: shape.to_vec(), buffer: Arc::new(Buffer::I16(values)), device: Device::Cpu }
    }

    /// A one-dimensional tensor of row numbers, token ids or positions. A device gets them at first use.
    pub fn from_u32(device: Device, values: Vec<u32>) -> Self {
        let shape = vec![values.len()];
        let buffer = match device {
            Device::Cpu => Buffer::U32(values),
            Device::Cuda(ordinal) => Buffer::Cuda(Stored::of_index(ordinal, values)),
        };
        Self { shape, buffer: Arc::new(buffer), device }
    }

    /// A float32 tensor of zeros.
    pub fn zeros(device: Device, shape: &[usize]) -> Result<Self> {
        Self::zeros_of(device, DType::F32, shape)
    }

    /// Zeros of the element type that the device has activations in.
    pub fn activations(device: Device, shape: &[usize]) -> Result<Self> {
        Self::zeros_of(device, device.storage(), shape)
    }

    /// A tensor of activations whose elements an operation is about to write, every one.
    pub(crate) fn unwritten(device: Device, shape: &[usize]) -> Result<Self> {
        match device.gpu() {
            None => Self::activations(device, shape),
            Some(gpu) => {
                let stored = Stored::new(gpu, device.storage(), shape.iter().product())?;
                Ok(Self::from_stored(device, stored, shape))
            }
        }
    }

    pub(crate) fn zeros_of(device: Device, dtype: DType, shape: &[usize]) -> Result<Self> {
        let n: usize = shape.iter().product();
        match device.gpu() {
            None => Self::from_host(device, Buffer::zeros(dtype, n)?, shape),
            Some(gpu) => Ok(Self::from_stored(device, Stored::zeroed(gpu, dtype, n)?, shape)),
        }
    }

    /// Normal values in the device's storage type, drawn by the device from a seed: weights and data for measuring.
    pub fn random(device: Device, shape: &[usize], std: f32, seed: u64) -> Result<Self> {
        let n = shape.iter().product();
        match device.gpu() {
            None => Self::from_f32(device, crate::cpu::normals(n, std, seed), shape),
            Some(gpu) => Ok(Self::from_stored(device, Stored::random(gpu, n, std, seed)?, shape)),
        }
    }

    /// The same values in another float type (rounded to nearest even).
    pub fn cast(&self, dtype: DType) -> Result<Self> {
        let floats = [DType::F32, DType::Bf16, DType::F16];
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        if !floats.contains(&dtype) {
            let (op, what, expected) = ("cast", "the new type", "a float type");
            return Err(Error::DType { op, what, expected, got: dtype });
        }
        if let Some(stored) = self.stored() {
            return Ok(Self::from_stored(self.device, stored.cast(dtype)?, &self.shape));
        }
        let values = self.to_f32();
        let buffer = match dtype {
            DType::Bf16 => Buffer::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
            DType::F16 => Buffer::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
            _ => Buffer::F32(values),
        };
        Self::from_host(self.device, buffer, &self.shape)
    }

    /// The weight in 8-bit floats, each row with a scale of its own, for products with rows that are rounded the same
    /// way. Only CUDA devices from compute capability 8.9 on have them.
    pub fn quantize_rows(&self) -> Result<Self> {
        let unsupported = |why: &str| Error::Unsupported { op: "fp8", why: why.to_owned() };
        let stored = self.stored().ok_or_else(|| unsupported("the CPU has no 8-bit floats; use bf16"))?;
        if stored.gpu().properties().capability < (8, 9) {
            return Err(unsupported("this card has none (compute capability 8.9 is needed); use bf16"));
        }
        Ok(Self::from_stored(
            self.device,
            stored.cast(DType::Bf16)?.quantized(self.rows_cols())?,
            &self.shape,
        ))
    }

    /// The same values on another device, of the same element type.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        if device == self.device {
            return Ok(self.clone());
        }
        match (&*self.buffer, device.gpu()) {
            (Buffer::Cuda(stored), _) => Self::from_host(device, stored.download()?, &self.shape),
            (host, None) => Self::from_host(device, host.clone(), &self.shape),
            (host, Some(gpu)) => Ok(Self::from_stored(device, Stored::upload(gpu, host)?, &self.shape)),
        }
    }

    /// The same elements under another shape.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if shape.iter().product::<usize>() != self.len() {
            return Err(Error::shape("reshape", "the new shape", format!("{} elements", self.len()), shape));
        }
        Ok(Self { shape: shape.to_vec(), ..self.clone() })
    }

    /// The rows of a tensor in host memory that `index` names on a device, in the tensor's own element type.
    pub(crate) fn rows_from_host(&self, index: &[u32], device: Device) -> Result<Self> {
        let gpu = device.gpu().expect("a CPU gathers rows of its own tensors");
        let width = self.rows_cols().1;
        let stored = match &*self.buffer {
            Buffer::F32(v) => Stored::upload_rows(gpu, (v, DType::F32), width, index)?,
            Buffer::Bf16(v) => Stored::upload_rows(gpu, (v, DType::Bf16), width, index)?,
            Buffer::F16(v) => Stored::upload_rows(gpu, (v, DType::F16), width, index)?,
            Buffer::U32(_) | Buffer::I16(_) | Buffer::F64(_) | Buffer::Cuda(_) => {
                let (op, what, got) = ("embedding", "a table on the host", self.dtype());
                return Err(Error::DType { op, what, expected: "a float type", got });
            }
        };
        Ok(Self::from_stored(device, stored, &[index.len(), width]))
    }

    /// Some rows; on a device they share the storage.
    pub fn rows(&self, range: Range<usize>) -> Result<Self> {
        let (n, width) = self.rows_cols();
        if range.start > range.end || range.end > n {
            return Err(Error::shape(
                "rows",
                "the tensor",
                format!("[{} or more, ..]", range.end),
                &self.shape,
            ));
        }
        let shape = [range.len(), width];
        if let Some(stored) = self.stored() {
            return Ok(Self::from_stored(self.device, stored.rows(range, width)?, &shape));
        }
        let elements = range.start * width..range.end * width;
        let buffer = match &*self.buffer {
            Buffer::F32(v) => Buffer::F32(v[elements].to_vec()),
            Buffer::Bf16(v) => Buffer::Bf16(v[elements].to_vec()),
            Buffer::F16(v) => Buffer::F16(v[elements].to_vec()),
            Buffer::U32(v) => Buffer::U32(v[elements].to_vec()),
            Buffer::I16(v) => Buffer::I16(v[elements].to_vec()),
            Buffer::F64(v) => Buffer::F64(v[elements].to_vec()),
            Buffer::Cuda(_) => unreachable!("handled above"),
        };
        Self::from_host(self.device, buffer, &shape)
    }

    /// Takes the elements of a tensor of the same type, length and device into the memory that it shares with others:
    /// for rows of memory that nobody reads yet. Nothing where it is that memory already.
    pub(crate) fn overwrite_elsewhere(&self, from: &Self) -> Result<()> {
        let (Some(to), Some(from)) = (self.stored(), from.stored()) else {
            unreachable!("only a device's tensors share memory")
        };
        if to.address()? == from.address()? { Ok(()) } else { to.overwrite(from) }
    }

    /// Appends the rows of a tensor of the same width and element type; storage that is not shared grows in place.
    pub fn append_rows(&mut self, rows: &Self) -> Result<()> {
        let ((n, width), (more, other)) = (self.rows_cols(), rows.rows_cols());
        if width != other {
            return Err(Error::shape("append_rows", "rows", format!("[.., {width}]"), rows.shape()));
        }
        let mismatch =
            Error::DType { op: "append_rows", what: "rows", expected: "the same type", got: rows.dtype() };
        if let (Some(own), Some(new)) = (self.stored(), rows.stored()) {
            if own.dtype() != new.dtype() {
                return Err(mismatch);
            }
            let grown = own.appended(new, Arc::strong_count(&self.buffer) == 1)?;
            self.buffer = Arc::new(Buffer::Cuda(grown));
        } else {
            match (self.buffer_mut(), rows.buffer()) {
                (Buffer::F32(a), Buffer::F32(b)) => a.extend_from_slice(b),
                (Buffer::Bf16(a), Buffer::Bf16(b)) => a.extend_from_slice(b),
                (Buffer::F16(a), Buffer::F16(b)) => a.extend_from_slice(b),
                (Buffer::U32(a), Buffer::U32(b)) => a.extend_from_slice(b),
                _ => return Err(mismatch),
            }
        }
        self.shape = vec![n + more, width];
        Ok(())
    }

    /// Drops all rows from the `n`-th on.
    pub fn truncate_rows(&mut self, n: usize) {
        let (rows, width) = self.rows_cols();
        if n >= rows {
            return;
        }
        if let Some(stored) = self.stored() {
            self.buffer = Arc::new(Buffer::Cuda(stored.truncated(n * width)));
        } else {
            match self.buffer_mut() {
                Buffer::F32(v) => v.truncate(n * width),
                Buffer::Bf16(v) => v.truncate(n * width),
                Buffer::F16(v) => v.truncate(n * width),
                Buffer::U32(v) => v.truncate(n * width),
                Buffer::I16(v) => v.truncate(n * width),
                Buffer::F64(v) => v.truncate(n * width),
                Buffer::Cuda(_) => unreachable!("handled above"),
            }
        }
        self.shape = vec![n, width];
    }

    /// Takes the values of a tensor of the same shape, in this tensor's element type and on its device; storage stays
    /// where it is, so that weights that lie side by side still do.
    pub fn assign(&mut self, values: &Self) -> Result<()> {
        if values.shape != self.shape {
            return Err(Error::shape("assign", "values", format!("{:?}", self.shape), &values.shape));
        }
        let values = values.to_device(self.device)?.cast(self.dtype())?;
        match (self.stored(), values.stored()) {
            (Some(own), Some(new)) if Arc::strong_count(&self.buffer) == 1 => own.overwrite(new)?,
            _ => *self = values,
        }
        Ok(())
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
            Buffer::I16(_) => DType::I16,
            Buffer::F64(_) => DType::F64,
            Buffer::Cuda(stored) => stored.dtype(),
        }
    }

    /// The device that holds the tensor.
    pub fn device(&self) -> Device {
        self.device
    }

    /// A host copy as float32; row numbers are converted too. Waits for a device.
    pub fn to_f32(&self) -> Vec<f32> {
        match &*self.buffer {
            Buffer::F32(v) => v.clone(),
            Buffer::Bf16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Buffer::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Buffer::U32(v) => v.iter().map(|&x| x as f32).collect(),
            Buffer::I16(v) => v.iter().map(|&x| f32::from(x)).collect(),
            Buffer::F64(v) => v.iter().map(|&x| x as f32).collect(),
            Buffer::Cuda(_) => self.on_host().to_f32(),
        }
    }

    /// A host copy as bfloat16 (rounded to nearest even). Waits for a device.
    pub fn to_bf16(&self) -> Vec<bf16> {
        match &*self.buffer {
            Buffer::Bf16(v) => v.clone(),
            Buffer::Cuda(_) => self.on_host().to_bf16(),
            _ => self.to_f32().into_iter().map(bf16::from_f32).collect(),
        }
    }

    /// A host copy of row numbers; empty for float tensors. Waits for a device that computed them.
    pub fn to_u32(&self) -> Vec<u32> {
        match (self.u32s(), self.dtype()) {
            (Some(values), _) => values.to_vec(),
            (None, DType::U32) => self.on_host().to_u32(),
            _ => Vec::new(),
        }
    }

    /// As [`Tensor::to_u32`], when a device has got there.
    pub fn later_u32(&self) -> Result<Later<Vec<u32>>> {
        match self.stored() {
            Some(stored) if stored.index().is_none() => stored.later_u32(),
            _ => Ok(Later::ready(self.to_u32())),
        }
    }

    /// The elements of a tensor of row numbers that the host knows: all that it made itself; `None` for float tensors
    /// and for row numbers that a device computed.
    pub fn u32s(&self) -> Option<&[u32]> {
        match &*self.buffer {
            Buffer::U32(v) => Some(v),
            Buffer::Cuda(stored) => stored.index(),
            _ => None,
        }
    }

    /// The elements as float32: borrowed where that is the storage, widened otherwise. Waits for a device.
    pub fn f32s(&self) -> Cow<'_, [f32]> {
        match &*self.buffer {
            Buffer::F32(v) => Cow::Borrowed(v),
            _ => Cow::Owned(self.to_f32()),
        }
    }

    /// A copy on the host. A device that is lost ends the call chain with its error: there is no value to give.
    fn on_host(&self) -> Self {
        self.to_device(Device::Cpu).unwrap_or_else(|error| std::panic::resume_unwind(Box::new(error)))
    }

    pub(crate) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// The storage on a CUDA device.
    pub(crate) fn stored(&self) -> Option<&Stored> {
        match &*self.buffer {
            Buffer::Cuda(stored) => Some(stored),
            _ => None,
        }
    }

    /// The host storage for writing; a shared storage is copied first.
    pub(crate) fn buffer_mut(&mut self) -> &mut Buffer {
        Arc::make_mut(&mut self.buffer)
    }

    /// The device storage for writing; a shared storage is copied first, and so is one whose elements the host knows.
    pub(crate) fn stored_mut(&mut self) -> Result<&Stored> {
        let is_index = self.stored().is_some_and(|stored| stored.index().is_some());
        if is_index || Arc::strong_count(&self.buffer) != 1 {
            let copy = self.stored().expect("a tensor of a CUDA device").copied()?;
            self.buffer = Arc::new(Buffer::Cuda(copy));
        }
        Ok(self.stored().expect("a tensor of a CUDA device"))
    }

    /// Float32 tensors of these shapes, one behind the other on a device: zeros, or left unwritten for an operation that
    /// writes all of them.
    pub(crate) fn float32_together(like: &[&Self], unwritten: bool) -> Result<Vec<Self>> {
        let device = like.first().map_or(Device::Cpu, |t| t.device);
        let Some(gpu) = device.gpu() else {
            return like.iter().map(|t| Self::zeros(device, &t.shape)).collect();
        };
        let lengths: Vec<usize> = like.iter().map(|t| t.len()).collect();
        let stored = Stored::float32_together(gpu, &lengths, unwritten)?;
        Ok(like.iter().zip(stored).map(|(t, stored)| Self::from_stored(device, stored, &t.shape)).collect())
    }

    /// Lets matrices of the same width lie one below the other in one piece of device memory, so that a product can
    /// read or write them as one. On the CPU there is nothing to gain.
    pub(crate) fn lay_together(tensors: &mut [&mut Self]) -> Result<()> {
        let stored: Option<Vec<&Stored>> = tensors.iter().map(|t| t.stored()).collect();
        let Some(stored) = stored.filter(|all| all.len() > 1) else { return Ok(()) };
        let together = Stored::together(&stored)?;
        for (tensor, stored) in tensors.iter_mut().zip(together) {
            tensor.buffer = Arc::new(Buffer::Cuda(stored));
        }
        Ok(())
    }
}
