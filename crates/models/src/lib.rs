//! Frozen target models: read from Hugging Face folders, run forward, their hidden states captured.
//!
//! [`Target::forward`] runs a packed batch of documents for training, [`Target::extend`] decodes with a
//! [`KvCache`], along one sequence or a tree of proposals. [`TargetInfo`] describes a target without its weights.
//! This crate knows no draft method and no feature store: what to record is a [`Capture`].
//!
//! To add an architecture: write its file (settings, a `Layer` with a numbered forward, `new` that mirrors the
//! checkpoint's names) and one line in `architecture.rs`; what stands around the layers is its `Frame`, and `settings`
//! puts the family's keys of `config.json` into Llama's.

mod architecture;
mod cache;
mod capture;
mod config;
mod error;
mod final_norm;
mod frame;
mod info;
mod loader;
mod mixture;
mod mlp;
mod pass;
mod quantization;
mod reach;
mod recurrent;
mod rotary;
mod sandwich;
mod target;

mod deepseek;
mod gemma2;
mod gemma3;
mod glm4;
mod glm4_moe;
mod gpt_oss;
mod granite;
mod lfm2;
mod llama;
mod llama4;
mod mistral;
mod mixtral;
mod olmo2;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_5;
mod qwen3_moe;
mod qwen3_next;

pub use cache::KvCache;
pub use capture::{Capture, Captured};
pub use error::{Error, Result};
pub use final_norm::FinalNorm;
pub use info::TargetInfo;
pub use target::{Target, tables};
