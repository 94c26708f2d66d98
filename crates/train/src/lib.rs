//! The training loop: an order of rows, a source of features, the step, and checkpoints.
//!
//! The loop knows no method by name and cannot tell where features come from: online (a target in memory), offline
//! (a store) and cache (online in the first pass, the store afterwards) are three [`FeatureSource`]s.

mod checkpoint;
mod error;
pub mod features;
mod log;
mod order;
mod step;
mod trainer;

pub use checkpoint::{Checkpoint, Checkpoints, Position, State};
pub use error::{Error, Result};
pub use features::{Cache, FeatureSource, Offline, Online};
pub use log::{Figures, Record};
pub use order::{MicroBatch, Order};
pub use trainer::{Event, Held, Hooks, Outcome, Settings, Trainer};
