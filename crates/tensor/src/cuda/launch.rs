//! Small pieces of every launch: arguments, grids, outputs.

use specforge_cuda::{Arg, Gpu, Launch, Unit};

use super::stored::Stored;
use super::units::PLAIN;
use crate::{DType, Device, Result, Tensor};

/// Arguments of a kernel, each of the type it is written in.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &[$(specforge_cuda::Arg::from($arg)),*] };
}

/// Launches a kernel of a source without macros and without dynamic shared memory.
pub(super) fn run(
    gpu: &Gpu,
    unit: &Unit,
    kernel: &'static str,
    grid: [usize; 3],
    block: usize,
    args: &[Arg<'_>],
) -> Result<()> {
    Ok(gpu.launch(&Launch { unit, defines: PLAIN, kernel, grid, block, shared: 0 }, args)?)
}

/// Blocks for kernels that go over `n` elements.
pub(super) fn elements(n: usize) -> usize {
    n.div_ceil(2048).min(1 << 14)
}

/// Blocks for kernels that go over rows.
pub(super) fn row_blocks(rows: usize, width: usize) -> usize {
    rows.min((rows * width).div_ceil(2048)).min(1 << 16)
}

/// The device of a tensor.
pub(super) fn gpu_of(t: &Tensor) -> &'static Gpu {
    stored(t).gpu()
}

pub(super) fn stored(t: &Tensor) -> &Stored {
    t.stored()
        .expect("a device computes on tensors of its own memory: the inputs of an operation share a device")
}

/// The address of a tensor's first element.
pub(super) fn at(t: &Tensor) -> Result<u64> {
    stored(t).address()
}

/// The address for writing; storage that is shared is copied first.
pub(super) fn at_mut(t: &mut Tensor) -> Result<u64> {
    t.stored_mut()?.address()
}

/// An uninitialised tensor on the device of another.
pub(super) fn output(like: &Tensor, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    new(gpu_of(like), dtype, shape)
}

pub(super) fn new(gpu: &'static Gpu, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let stored = Stored::new(gpu, dtype, shape.iter().product())?;
    Ok(Tensor::from_stored(Device::Cuda(gpu.ordinal()), stored, shape))
}

/// The letter by which a kernel's name tells the type of an operand.
pub(super) fn letter(t: &Tensor) -> char {
    if t.dtype() == DType::F32 { 'f' } else { 'b' }
}

/// A kernel's name with the types of destination and source: only the combinations that exist.
pub(super) fn typed(names: [&'static str; 4], dst: &Tensor, src: &Tensor) -> &'static str {
    match (letter(dst), letter(src)) {
        ('b', 'b') => names[0],
        ('f', 'b') => names[1],
        ('b', _) => names[2],
        _ => names[3],
    }
}

/// The tensor itself, or its bfloat16 copy.
pub(super) fn in_bf16(t: &Tensor) -> Result<Tensor> {
    t.cast(DType::Bf16)
}
