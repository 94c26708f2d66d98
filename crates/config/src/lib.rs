//! What the user wrote, and what it resolves to.
//!
//! A recipe is a TOML file, read into a [`RunConfig`]; `--set path=value` arguments replace what it says. It resolves
//! to a [`RunPlan`], or to *all* of its problems at once, each with file, line, column and the way out. The tables of
//! methods, optimizer, schedule and templates belong to the crates that act on them; this one composes them.
//!
//! This crate reads the recipe file and looks whether inputs exist; it knows nothing about what a run does.

mod error;
mod identity;
mod inputs;
mod plan;
mod provenance;
mod read;
mod recipe;
pub mod reference;
mod resolve;
mod run;
mod text;

pub use error::{Error, Place, Problem, Result};
pub use plan::{DataPlan, EvalPlan, ExportPlan, Length, RunPlan, StorePlan, TargetPlan, TrainPlan};
pub use provenance::{Origin, Provenance};
pub use recipe::{Recipe, Setting};
pub use run::{
    CaptureConfig, CaptureDType, DataConfig, DataFormat, DeviceChoice, EvalConfig, Exchange, ExportConfig,
    Fsdp, Mode, OnOom, ParallelConfig, ReduceDType, RunConfig, StoreConfig, TargetConfig, TargetDType,
    TrainConfig,
};
