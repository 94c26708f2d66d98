//! Serving folders: what SGLang loads.
//!
//! [`Eagle3Export`] writes the folder of an EAGLE3 or EAGLE3.1 draft, [`read_eagle3`] reads one back
//! (ours or anybody's), and [`check()`] says what a serving engine would trip over, or silently ignore.
//! All three follow one description of the format: [`Eagle3Config`] for `config.json`, and the list of
//! tensors that belongs to it. This crate knows files and names, not how a draft is computed.

mod check;
mod eagle3;
mod error;
mod folder;
mod json;
mod safetensors;
mod target;
mod tensor;

pub use check::{Problem, Report, Severity, check};
pub use eagle3::{
    Eagle3Config, Eagle3Export, Eagle3Folder, WriteOptions, is_earlier_export, read_eagle3,
    read_eagle3_weights,
};
pub use error::{Error, Result};
pub use json::to_json_text;
pub use safetensors::write_safetensors;
pub use target::{TargetConfig, rope_parameters};
pub use tensor::Tensor;
