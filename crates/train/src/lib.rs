//! The training loop: an order of rows, a source of features, the step, and checkpoints.
//!
//! The loop knows no method by name and cannot tell where features come from: online (a target in memory), offline
//! (a store), cache (online in the first pass, the store afterwards) and received (from ranks that have the target, where
//! a [`Server`] computes them) are four [`FeatureSource`]s.

mod checkpoint;
mod error;
pub mod features;
mod hooks;
mod line;
mod log;
mod optimizer;
mod order;
mod round;
mod saving;
mod sending;
mod sent;
mod server;
mod step;
mod tally;
mod trainer;
mod window;

pub use checkpoint::{Checkpoint, Checkpoints, Position, State};
pub use error::{Error, Result};
pub use features::{Cache, FeatureSource, Offline, Online, Received, Writers};
pub use hooks::{Event, Held, Hooks, Outcome};
pub use line::Line;
pub use log::{Figures, Record};
pub use optimizer::{Optimizer, Ranks};
pub use order::{MicroBatch, Order};
pub use sending::backward;
pub use sent::Sent;
pub use server::{Decode, Server};
pub use trainer::{Settings, Trainer};
