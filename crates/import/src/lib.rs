//! Features that other programs captured, file by file: SpecForge's and speculators'.
//!
//! ```text
//! L tokens   n captured layers   H width of the target
//! SpecForge     data_*.ckpt, .ckpt.gz   input_ids [L]  loss_mask [L]  aux_hidden_state [1, L, n*H]  hidden_state [1, L, H]
//! speculators   hs_*.safetensors        token_ids [L]  hidden_states [L, n+1, H], the last one before the final norm
//!               in 8 bits               hidden_states F8_E4M3 and hidden_states_scales [L, 1, 1]
//! speculators   data_*.pt               input_ids [L]  loss_mask [L]  hidden_states: list of n+1 tensors [L, H]
//! ```
//! Files of PyTorch are read as data, never run. This crate knows files and names, not targets or stores.

mod error;
mod file;
mod layout;
mod rows;
mod states;

pub use error::{Error, Result};
pub use file::{FeatureFile, files};
pub use layout::Features;
pub use rows::RowIndex;
pub use states::States;
