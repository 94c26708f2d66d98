//! Pieces, joins and sums of tensors in host memory.

use half::bf16;
use specforge_tensor::{Combine, DType, Device, Error, Result, Tensor};

/// The `index`-th of `size` equal pieces along the first dimension.
pub(crate) fn piece(x: &Tensor, index: usize, size: usize, shape: &[usize]) -> Result<Tensor> {
    x.reshape(&[size, x.len() / size])?.rows(index..index + 1)?.reshape(shape)
}

/// Tensors of one shape, one after the other along the first dimension.
pub(crate) fn join(parts: &[Tensor]) -> Result<Tensor> {
    let mut shape = parts[0].shape().to_vec();
    shape[0] *= parts.len();
    let mut joined = parts[0].zeros_like(&shape)?;
    let bytes = joined.host_bytes_mut().unwrap_or_default();
    for (to, part) in bytes.chunks_exact_mut((bytes_of(&parts[0])).max(1)).zip(parts) {
        to.copy_from_slice(part.host_bytes().unwrap_or_default());
    }
    Ok(joined)
}

/// Bytes of a tensor's elements.
pub(crate) fn bytes_of(x: &Tensor) -> usize {
    x.len() * x.dtype().size()
}

/// The combination of tensors of one shape and type, in their order; bfloat16 is rounded once.
pub(crate) fn combine(parts: &[Tensor], how: Combine) -> Result<Tensor> {
    let shape = parts[0].shape();
    match parts[0].dtype() {
        DType::F32 => Tensor::from_f32(Device::Cpu, floats(parts, how), shape),
        DType::Bf16 => {
            let sums = floats(parts, how).into_iter().map(bf16::from_f32).collect();
            Tensor::from_bf16(Device::Cpu, sums, shape)
        }
        DType::F64 => {
            let add = |a: f64, b: f64| if how == Combine::Sum { a + b } else { a.max(b) };
            Tensor::from_f64(Device::Cpu, fold(parts, add))?.reshape(shape)
        }
        DType::U32 => {
            let add = |a: u32, b: u32| if how == Combine::Sum { a.wrapping_add(b) } else { a.max(b) };
            Tensor::from_u32(Device::Cpu, fold(parts, add)).reshape(shape)
        }
        got => Err(Error::DType { op: "combine", what: "x", expected: "F32, Bf16, F64 or U32", got }),
    }
}

fn floats(parts: &[Tensor], how: Combine) -> Vec<f32> {
    let mut sums = parts[0].to_f32();
    for part in &parts[1..] {
        let more = part.f32s();
        let pairs = sums.iter_mut().zip(more.iter());
        match how {
            Combine::Sum => pairs.for_each(|(sum, x)| *sum += x),
            Combine::Max => pairs.for_each(|(most, x)| *most = most.max(*x)),
        }
    }
    sums
}

fn fold<T: bytemuck::Pod>(parts: &[Tensor], add: impl Fn(T, T) -> T) -> Vec<T> {
    let values = |part: &Tensor| bytemuck::pod_collect_to_vec::<u8, T>(part.host_bytes().unwrap_or_default());
    let mut sums = values(&parts[0]);
    for part in &parts[1..] {
        sums.iter_mut().zip(values(part)).for_each(|(sum, x)| *sum = add(*sum, x));
    }
    sums
}
