//! Checkpoints whose weights are kept in fewer bits: what `quantization_config` says.

use serde_json::Value;

use crate::{Result, TargetInfo};

/// How the matrices of a checkpoint are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quantization {
    /// As floats of 16 or 32 bits.
    None,
    /// As 8-bit floats with a factor for each block of so many rows and columns.
    Fp8([usize; 2]),
    /// Those of experts as 4-bit floats, 32 of which share a factor (gpt-oss).
    Mxfp4,
}

impl Quantization {
    /// What a configuration says; fails for a kind that is not read.
    pub(crate) fn of(info: &TargetInfo) -> Result<Self> {
        let config = &info.raw["quantization_config"];
        if config.is_null() {
            return Ok(Self::None);
        }
        let wrong = |why: &str| info.wrong("quantization_config", why);
        match config["quant_method"].as_str() {
            Some("mxfp4") => Ok(Self::Mxfp4),
            Some("fp8") if config["fmt"].as_str().is_none_or(|fmt| fmt == "e4m3") => {
                let block = config["weight_block_size"].as_array().map(Vec::as_slice).unwrap_or_default();
                let sizes: Vec<usize> = block.iter().filter_map(Value::as_u64).map(|n| n as usize).collect();
                match sizes[..] {
                    [rows, columns] if rows > 0 && columns > 0 => Ok(Self::Fp8([rows, columns])),
                    _ => Err(wrong("expected weight_block_size, the rows and columns that share a factor")),
                }
            }
            _ => Err(wrong(
                "of quantised weights only fp8 (e4m3, in blocks) and mxfp4 are read; use the unquantised checkpoint of the model",
            )),
        }
    }
}
