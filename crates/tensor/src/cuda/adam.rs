//! The AdamW step of all parameters at once.

use std::mem::size_of;

use specforge_cuda::Gpu;

use super::launch::{at, at_mut, gpu_of, new, run};
use super::units::ADAM;
use crate::kernels::{AdamStep, AdamTensor};
use crate::{Across, Combine, DType, Device, Error, Later, Result, Tensor};

/// Elements that one block updates; `CHUNK` of adam.cu.
const CHUNK: usize = 65536;

/// `AdamTensor` of adam.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Entry {
    param: u64,
    exact: u64,
    low: u64,
    m: u64,
    v: u64,
    grad: u64,
    n: i64,
    step_size: f32,
    root_correction: f32,
    share: f64,
}

pub(super) fn step(
    tensors: &mut [AdamTensor<'_>],
    step: &AdamStep,
    across: &Across<'_>,
) -> Result<Later<f64>> {
    let Some(first) = tensors.first() else { return Ok(Later::ready(0.0)) };
    let gpu = gpu_of(first.grad);
    let entries = tensors.iter_mut().map(|t| entry(t, step)).collect::<Result<Vec<_>>>()?;
    let chunks = |e: &Entry| (e.n as usize).div_ceil(CHUNK) as u32;
    let (mut tensor_of, mut chunk_of) = (Vec::new(), Vec::new());
    for (i, e) in entries.iter().enumerate() {
        tensor_of.extend((0..chunks(e)).map(|_| i as u32));
        chunk_of.extend(0..chunks(e));
    }
    let blocks = tensor_of.len();
    let table = gpu.upload(bytemuck::cast_slice(&entries))?;
    let device = Device::Cuda(gpu.ordinal());
    let [tensor_of, chunk_of] = [tensor_of, chunk_of].map(|v| Tensor::from_u32(device, v));
    let (table, tensor_of, chunk_of) = (table.address(), at(&tensor_of)?, at(&chunk_of)?);
    let partial = gpu.alloc(blocks * size_of::<f64>())?;
    // The sum of squares and the weight, each a tensor of its own that ranks can add up.
    let sums = new(gpu, DType::F64, &[2, 1])?;
    let (mut squares, mut weight) = (sums.rows(0..1)?, sums.rows(1..2)?);
    let grid = [blocks, 1, 1];
    run(gpu, &ADAM, "sum_squares_partial", grid, 256, args![partial.address(), table, tensor_of, chunk_of])?;
    run(
        gpu,
        &ADAM,
        "sum_squares_finish",
        [1, 1, 1],
        256,
        args![at(&sums)?, partial.address(), blocks as i32, step.weight],
    )?;
    if let Some(group) = across.squares {
        group.all_reduce(&mut squares, Combine::Sum)?;
    }
    if let Some(group) = across.weight {
        group.all_reduce(&mut weight, Combine::Sum)?;
    }
    let args = args![
        table,
        tensor_of,
        chunk_of,
        step.lr,
        step.beta1,
        step.beta2,
        step.eps,
        step.weight_decay,
        at(&squares)?,
        at(&weight)?,
        step.max_norm,
    ];
    run(gpu, &ADAM, "adamw", grid, 256, args)?;
    let known = Later::ready(vec![step.weight]);
    let weight = if across.weight.is_some() { weight.later_f64()? } else { known };
    let squares = squares.later_f64()?;
    Ok(Later::new(move || Ok(squares.wait()?[0].sqrt() / weight.wait()?[0])))
}

fn entry(t: &mut AdamTensor<'_>, step: &AdamStep) -> Result<Entry> {
    let (n, t_step) = (t.param.len() as i64, t.step as f64);
    let param = at_mut(t.param)?;
    let (param, exact, low) = match &mut t.remainder {
        Some(low) => (param, 0, at_mut(low)?),
        None => (0, param, 0),
    };
    Ok(Entry {
        param,
        exact,
        low,
        m: at_mut(t.exp_avg)?,
        v: at_mut(t.exp_avg_sq)?,
        grad: at(t.grad)?,
        n,
        step_size: (step.lr / (1.0 - step.beta1.powf(t_step))) as f32,
        root_correction: (1.0 - step.beta2.powf(t_step)).sqrt() as f32,
        share: t.share,
    })
}

/// What a parameter of this type loses of its master: nothing yet.
pub(super) fn remainder(param: &Tensor) -> Result<Option<Tensor>> {
    match param.dtype() {
        DType::F32 => Ok(None),
        DType::Bf16 => Ok(Some(zeroed(gpu_of(param), param.shape())?)),
        got => Err(Error::DType {
            op: "adamw",
            what: "a trained parameter's storage",
            expected: "F32 or Bf16",
            got,
        }),
    }
}

fn zeroed(gpu: &'static Gpu, shape: &[usize]) -> Result<Tensor> {
    let rest = new(gpu, DType::I16, shape)?;
    gpu.fill_zero(at(&rest)?, 2 * rest.len())?;
    Ok(rest)
}

pub(super) fn master(param: &Tensor, remainder: &Tensor) -> Result<Tensor> {
    let (gpu, n) = (gpu_of(param), param.len());
    let master = new(gpu, DType::F32, param.shape())?;
    let args = args![at(&master)?, at(param)?, at(remainder)?, n as i64];
    run(gpu, &ADAM, "join_master", [n.div_ceil(2048), 1, 1], 256, args)?;
    Ok(master)
}

pub(super) fn split_master(master: &Tensor) -> Result<[Tensor; 2]> {
    let (gpu, n, shape) = (gpu_of(master), master.len(), master.shape());
    let (param, rest) = (new(gpu, DType::Bf16, shape)?, new(gpu, DType::I16, shape)?);
    let args = args![at(&param)?, at(&rest)?, at(master)?, n as i64];
    run(gpu, &ADAM, "split_master", [n.div_ceil(2048), 1, 1], 256, args)?;
    Ok([param, rest])
}
