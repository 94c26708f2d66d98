//! The norm after the last layer by itself: for last hidden states that were captured before it.

use std::path::Path;

use specforge_nn::weights::Weights;
use specforge_tensor::{Device, ParamId, Params, Tape, Tensor};

use crate::loader::{Loader, Source};
use crate::quantization::Quantization;
use crate::{Result, TargetInfo, architecture};

/// A target's final RMSNorm.
#[derive(Debug)]
pub struct FinalNorm {
    params: Params,
    weight: ParamId,
    eps: f32,
}

impl FinalNorm {
    /// Reads it from a target's folder.
    pub fn open(folder: impl AsRef<Path>, info: &TargetInfo, device: Device) -> Result<Self> {
        let (folder, mut params) = (folder.as_ref(), Params::new());
        let frame = (architecture::of(&info.path, &info.raw)?.frame)(info)?;
        let weights = Weights::open(folder)?;
        let (norm_offset, prefix) = (frame.norm_offset, frame.prefix.to_owned());
        let source = Source::Files(&weights);
        let mut loader = Loader {
            folder,
            source,
            params: &mut params,
            device,
            storage: None,
            fp8: false,
            quantization: Quantization::of(info)?,
            norm_offset,
            prefix,
            ranks: None,
        };
        let weight = loader.at(frame.body).norm(frame.norm, info.hidden_size)?;
        Ok(Self { params, weight, eps: info.rms_norm_eps as f32 })
    }

    /// Normed states of states `[T, H]`.
    pub fn apply(&self, states: &Tensor) -> Result<Tensor> {
        let tape = Tape::inference(&self.params);
        let input = tape.input(states.clone());
        Ok(tape.rms_norm(&input, self.weight, self.eps)?.value().clone())
    }
}
