//! The storage of one tensor in a CUDA device's memory.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use half::{bf16, f16};
use rayon::prelude::*;
use specforge_cuda::{Gpu, Memory};

use super::launch::{elements, run};
use super::units::{FP8, ROWS};
use crate::tensor::Buffer;
use crate::{DType, Error, Later, Result};

/// Elements in device memory. Row numbers that the host made are kept there too, and uploaded at first use.
#[derive(Debug)]
pub(crate) struct Stored {
    gpu: &'static Gpu,
    memory: OnceLock<Arc<Memory>>,
    /// The first element, in bytes from the start of the memory.
    first: usize,
    len: usize,
    dtype: DType,
    index: Option<Vec<u32>>,
    /// Of 8-bit floats: a float32 scale per row, and where they start.
    scales: Option<(Arc<Memory>, usize)>,
}

impl Stored {
    pub(crate) fn new(gpu: &'static Gpu, dtype: DType, len: usize) -> Result<Self> {
        Ok(Self::over(gpu.alloc(len * dtype.size())?, 0, dtype, len))
    }

    pub(crate) fn zeroed(gpu: &'static Gpu, dtype: DType, len: usize) -> Result<Self> {
        Ok(Self::over(gpu.alloc_zeroed(len * dtype.size())?, 0, dtype, len))
    }

    /// Normal bfloat16 values.
    pub(crate) fn random(gpu: &'static Gpu, len: usize, std: f32, seed: u64) -> Result<Self> {
        let stored = Self::new(gpu, DType::Bf16, len)?;
        let args = args![stored.address()?, len as i64, seed, 0f32, std];
        run(gpu, &ROWS, "fill_normal_b", [elements(len), 1, 1], 256, args)?;
        Ok(stored)
    }

    fn over(memory: Arc<Memory>, first: usize, dtype: DType, len: usize) -> Self {
        Self {
            gpu: memory.gpu(),
            memory: OnceLock::from(memory),
            first,
            len,
            dtype,
            index: None,
            scales: None,
        }
    }

    /// Row numbers.
    pub(crate) fn of_index(ordinal: usize, values: Vec<u32>) -> Self {
        let gpu = Gpu::open(ordinal).expect("a device that tensors name was opened before");
        Self {
            gpu,
            memory: OnceLock::new(),
            first: 0,
            len: values.len(),
            dtype: DType::U32,
            index: Some(values),
            scales: None,
        }
    }

    pub(crate) fn upload(gpu: &'static Gpu, host: &Buffer) -> Result<Self> {
        let of = |bytes: &[u8], dtype, len| Ok(Self::over(gpu.upload(bytes)?, 0, dtype, len));
        match host {
            Buffer::F32(v) => of(bytemuck::cast_slice(v), DType::F32, v.len()),
            Buffer::Bf16(v) => of(bytemuck::cast_slice(v), DType::Bf16, v.len()),
            Buffer::F16(v) => of(bytemuck::cast_slice(v), DType::F16, v.len()),
            Buffer::I16(v) => of(bytemuck::cast_slice(v), DType::I16, v.len()),
            Buffer::F64(v) => of(bytemuck::cast_slice(v), DType::F64, v.len()),
            Buffer::U32(v) => Ok(Self::of_index(gpu.ordinal(), v.clone())),
            Buffer::Cuda(stored) => Self::upload(gpu, &stored.download()?),
        }
    }

    /// The rows of a table in host memory that `index` names. They are copied, on all threads, to where they leave from.
    pub(crate) fn upload_rows<T: bytemuck::Pod + Sync>(
        gpu: &'static Gpu,
        (table, dtype): (&[T], DType),
        width: usize,
        index: &[u32],
    ) -> Result<Self> {
        let (table, row): (&[u8], usize) = (bytemuck::cast_slice(table), width * size_of::<T>());
        let memory = gpu.upload_with(index.len() * row, row, |first, piece| {
            let rows = piece.par_chunks_mut(row.max(1)).zip(&index[first / row.max(1)..]);
            rows.for_each(|(to, &i)| to.copy_from_slice(&table[i as usize * row..][..row]));
        })?;
        Ok(Self::over(memory, 0, dtype, index.len() * width))
    }

    /// Waits for the device.
    pub(crate) fn download(&self) -> Result<Buffer> {
        if let Some(index) = &self.index {
            return Ok(Buffer::U32(index.clone()));
        }
        let read = self.gpu.read_back(self.address()?, self.bytes())?;
        let bytes = read.wait()?;
        Ok(match self.dtype {
            DType::F32 => Buffer::F32(bytemuck::allocation::pod_collect_to_vec(bytes)),
            DType::Bf16 => Buffer::Bf16(bytemuck::allocation::pod_collect_to_vec::<u8, bf16>(bytes)),
            DType::F16 => Buffer::F16(bytemuck::allocation::pod_collect_to_vec::<u8, f16>(bytes)),
            DType::U32 => Buffer::U32(bytemuck::allocation::pod_collect_to_vec(bytes)),
            DType::I16 => Buffer::I16(bytemuck::allocation::pod_collect_to_vec(bytes)),
            DType::F64 => Buffer::F64(bytemuck::allocation::pod_collect_to_vec(bytes)),
            DType::E4m3 => {
                let why = "8-bit weights stay on the device".to_owned();
                return Err(Error::Unsupported { op: "reading", why });
            }
        })
    }

    /// Row numbers that the device computed.
    pub(crate) fn later_u32(&self) -> Result<Later<Vec<u32>>> {
        let read = self.gpu.read_back(self.address()?, self.bytes())?;
        Ok(Later::new(move || Ok(bytemuck::allocation::pod_collect_to_vec(read.wait()?))))
    }

    /// 64-bit floats that the device computed.
    pub(crate) fn later_f64(&self) -> Result<Later<Vec<f64>>> {
        let read = self.gpu.read_back(self.address()?, self.bytes())?;
        Ok(Later::new(move || Ok(bytemuck::allocation::pod_collect_to_vec(read.wait()?))))
    }

    pub(crate) fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(crate) fn index(&self) -> Option<&[u32]> {
        self.index.as_deref()
    }

    fn bytes(&self) -> usize {
        self.len * self.dtype.size()
    }

    fn memory(&self) -> Result<&Arc<Memory>> {
        if let Some(memory) = self.memory.get() {
            return Ok(memory);
        }
        let values = self.index.as_deref().expect("only row numbers are uploaded late");
        let memory = self.gpu.upload(bytemuck::cast_slice(values))?;
        Ok(self.memory.get_or_init(|| memory))
    }

    /// The address of the first element.
    pub(crate) fn address(&self) -> Result<u64> {
        Ok(self.memory()?.address() + self.first as u64)
    }

    /// A copy in memory of its own.
    pub(crate) fn copied(&self) -> Result<Self> {
        let copy = Self::new(self.gpu, self.dtype, self.len)?;
        copy.overwrite(self)?;
        Ok(copy)
    }

    /// Takes the elements of another storage of the same type and length.
    pub(crate) fn overwrite(&self, from: &Self) -> Result<()> {
        Ok(self.gpu.copy(self.address()?, from.address()?, self.bytes())?)
    }

    /// Rows of bfloat16 in 8-bit floats, each with its scale.
    pub(crate) fn quantized(&self, (rows, width): (usize, usize)) -> Result<Self> {
        let to = Self::rows_of_e4m3(self.gpu, rows, width)?;
        let scales = to.scales().expect("made with scales");
        let args = args![to.address()?, scales, self.address()?, rows as i32, width as i32, width as i64];
        run(self.gpu, &FP8, "quantize_rows", [rows, 1, 1], 256, args)?;
        Ok(to)
    }

    /// Unwritten rows of 8-bit floats, each with its scale.
    pub(crate) fn rows_of_e4m3(gpu: &'static Gpu, rows: usize, width: usize) -> Result<Self> {
        let scales = Some((gpu.alloc(rows * 4)?, 0));
        Ok(Self { scales, ..Self::new(gpu, DType::E4m3, rows * width)? })
    }

    /// The address of the rows' scales.
    pub(crate) fn scales(&self) -> Option<u64> {
        self.scales.as_ref().map(|(memory, first)| memory.address() + *first as u64)
    }

    pub(crate) fn cast(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype {
            return self.copied();
        }
        let kernel = match (dtype, self.dtype) {
            (DType::Bf16, DType::F32) => "cast_bf",
            (DType::F32, DType::Bf16) => "cast_fb",
            (DType::Bf16, DType::F16) => "cast_bh",
            (DType::F32, DType::F16) => "cast_fh",
            (to, from) => {
                let why = format!("there is no conversion of {from:?} to {to:?}");
                return Err(Error::Unsupported { op: "cast", why });
            }
        };
        let to = Self::new(self.gpu, dtype, self.len)?;
        let args = args![to.address()?, self.address()?, self.len as i64];
        run(self.gpu, &ROWS, kernel, [elements(self.len), 1, 1], 256, args)?;
        Ok(to)
    }

    /// With the elements of `more` after its own: in its own memory if that is `growable` and has room.
    pub(crate) fn appended(&self, more: &Self, growable: bool) -> Result<Self> {
        let (memory, end) = (self.memory()?, self.first + self.bytes());
        let len = self.len + more.len;
        let has_room = end + more.bytes() <= memory.bytes();
        let grown = if growable && has_room && Arc::strong_count(memory) == 1 {
            Self::over(memory.clone(), self.first, self.dtype, len)
        } else {
            let room = if growable { len.next_power_of_two() } else { len };
            let memory = self.gpu.alloc(room * self.dtype.size())?;
            self.gpu.copy(memory.address(), self.address()?, self.bytes())?;
            Self::over(memory, 0, self.dtype, len)
        };
        self.gpu.copy(grown.address()? + self.bytes() as u64, more.address()?, more.bytes())?;
        let joined =
            self.index.as_ref().zip(more.index.as_ref()).map(|(a, b)| [a.clone(), b.clone()].concat());
        Ok(Self { index: joined, ..grown })
    }

    /// Its first elements, in the same memory.
    pub(crate) fn truncated(&self, len: usize) -> Self {
        let index = self.index.as_ref().map(|index| index[..len].to_vec());
        let (gpu, memory, scales) = (self.gpu, self.memory.clone(), self.scales.clone());
        Self { gpu, memory, first: self.first, len, dtype: self.dtype, index, scales }
    }

    /// Some of its rows of `width` elements, in the same memory.
    pub(crate) fn rows(&self, rows: Range<usize>, width: usize) -> Result<Self> {
        let elements = rows.start * width..rows.end * width;
        if let Some(index) = &self.index {
            return Ok(Self::of_index(self.gpu.ordinal(), index[elements].to_vec()));
        }
        let first = self.first + elements.start * self.dtype.size();
        let scales = self.scales.as_ref().map(|(memory, skip)| (memory.clone(), skip + 4 * rows.start));
        Ok(Self { scales, ..Self::over(self.memory()?.clone(), first, self.dtype, elements.len()) })
    }

    /// Copies of several storages, one after the other in one piece of memory; their scales too.
    pub(crate) fn together(all: &[&Self]) -> Result<Vec<Self>> {
        let gpu = all[0].gpu;
        let memory = gpu.alloc(all.iter().map(|s| s.bytes()).sum())?;
        let scale_bytes = |s: &Self| s.scales.as_ref().map_or(0, |(memory, _)| memory.bytes());
        let scales = gpu.alloc(all.iter().map(|s| scale_bytes(s)).sum())?;
        let (mut first, mut first_scale) = (0, 0);
        let mut copies = Vec::new();
        for stored in all {
            let mut copy = Self::over(memory.clone(), first, stored.dtype, stored.len);
            copy.overwrite(stored)?;
            if let Some(from) = stored.scales() {
                gpu.copy(scales.address() + first_scale as u64, from, scale_bytes(stored))?;
                copy.scales = Some((scales.clone(), first_scale));
            }
            first += stored.bytes();
            first_scale += scale_bytes(stored);
            copies.push(copy);
        }
        Ok(copies)
    }

    /// Float32 storages of these lengths, one behind the other: zeros, or unwritten.
    pub(crate) fn float32_together(
        gpu: &'static Gpu,
        lengths: &[usize],
        unwritten: bool,
    ) -> Result<Vec<Self>> {
        let bytes = 4 * lengths.iter().sum::<usize>();
        let memory = if unwritten { gpu.alloc(bytes)? } else { gpu.alloc_zeroed(bytes)? };
        let mut first = 0;
        let storage = |&len: &usize| {
            let stored = Self::over(memory.clone(), first, DType::F32, len);
            first += 4 * len;
            stored
        };
        Ok(lengths.iter().map(storage).collect())
    }

    /// Whether `next` was laid right behind it, in the same piece of memory. Pieces that happen to be neighbours do not
    /// count: where memory comes from must not decide how a product is computed.
    pub(crate) fn is_before(&self, next: &Self) -> Result<bool> {
        let is_behind = self.first + self.bytes() == next.first;
        Ok(self.dtype == next.dtype && is_behind && Arc::ptr_eq(self.memory()?, next.memory()?))
    }
}
