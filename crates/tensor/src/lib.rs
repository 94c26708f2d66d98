//! Tensors, the tape, and its coarse operations.
//!
//! The engine is built for one job: the training step of a draft model, and the forward pass of the frozen
//! target beside it. An operation is coarse (an RMSNorm, a whole attention, a head with its loss), has a
//! forward and a backward, and runs on the device of its tensors through one seam, [`Kernels`].
//! This crate knows no model and no file, and of ranks only what a [`Group`] of them can be asked.
//!
//! ```
//! use specforge_tensor::{Device, Params, Tape, Tensor, Weight};
//! let mut params = Params::new();
//! let w = params.add("w", Tensor::from_f32(Device::Cpu, vec![1.0, 2.0, 3.0, 4.0], &[2, 2])?, true);
//! let tape = Tape::recording(&params);
//! let x = tape.input(Tensor::from_f32(Device::Cpu, vec![1.0, -1.0], &[1, 2])?);
//! let y = tape.linear(&x, &Weight::of(w))?;
//! assert_eq!(y.value().to_f32(), [-1.0, -1.0]);
//! let grads = tape.backward_from(vec![(y, Tensor::from_f32(Device::Cpu, vec![1.0, 0.0], &[1, 2])?)])?;
//! assert_eq!(grads.get(w).expect("w has a gradient").to_f32(), [1.0, -1.0, 0.0, 0.0]);
//! # Ok::<(), specforge_tensor::Error>(())
//! ```

mod cpu;
mod cuda;
mod device;
mod error;
mod grads;
mod group;
mod kernels;
mod later;
mod ops;
mod params;
mod raw;
mod split;
mod tape;
mod tensor;
#[cfg(test)]
mod tests;

pub use cuda::units;
pub use device::Device;
pub use error::{Error, Result};
pub use grads::Grads;
pub use group::{Across, Combine, Group, pieces};
pub use kernels::{
    Activation, AdamStep, AdamTensor, AddedRows, AttentionInputs, AttentionShape, Columns, DeltaInputs,
    DeltaShape, Extra, Groups, Kernels, Rotation, Router, Routes, Routing, RowFigures, RowLoss, Scoring,
    SoftTargets, Spans, TeacherRows, VocabStats,
};
pub use later::Later;
pub use ops::{
    Attention, Collected, Delta, Experts, GroupLoss, KeyValue, LossFigures, LossRanks, LossRows, Objective,
    Part, RingAttention, Rope, RouterParams, SoftTargetLoss, Teacher, Weight,
};
pub use params::{Param, ParamId, Params};
pub use split::Split;
pub use tape::{Tape, Var};
pub use tensor::{DType, Tensor};
