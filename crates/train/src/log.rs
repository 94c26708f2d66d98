//! Figures of a run: summed over micro-batches and steps, divided once, one JSON line per logged step.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use specforge_methods::{Loss, Ratio};

use crate::Result;

/// Sums of the losses and metrics of some micro-batches.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Figures {
    /// What is minimised.
    pub objective: Ratio,
    /// Metrics by name, one ratio per draft position.
    pub metrics: Vec<(&'static str, Vec<Ratio>)>,
    /// Tokens that went through.
    pub tokens: u64,
}

impl Figures {
    /// Adds a micro-batch.
    pub fn add(&mut self, loss: &Loss, tokens: usize) {
        self.objective += loss.objective;
        self.tokens += tokens as u64;
        loss.metrics.iter().for_each(|metric| self.add_metric(metric.name, &metric.values));
    }

    /// Adds other sums.
    pub fn merge(&mut self, other: &Self) {
        self.objective += other.objective;
        self.tokens += other.tokens;
        other.metrics.iter().for_each(|(name, values)| self.add_metric(name, values));
    }

    fn add_metric(&mut self, name: &'static str, values: &[Ratio]) {
        match self.metrics.iter_mut().find(|(n, _)| *n == name) {
            Some((_, sums)) => {
                for (sum, &value) in sums.iter_mut().zip(values) {
                    *sum += value;
                }
            }
            None => self.metrics.push((name, values.to_vec())),
        }
    }

    /// A metric's values per draft position; empty if there is none of this name.
    pub fn values(&self, name: &str) -> Vec<f64> {
        let metric = self.metrics.iter().find(|(n, _)| *n == name);
        metric.map_or_else(Vec::new, |(_, values)| values.iter().map(|r| r.value()).collect())
    }

    /// Tokens per target call that accuracies a0, a1, ... would give, were they independent: `1 + a0 + a0·a1 + ...`.
    /// An estimate; only decoding gives the acceptance length.
    pub fn estimated_acceptance_length(&self) -> f64 {
        let (mut product, mut length) = (1.0, 1.0);
        for accuracy in self.values("accuracy") {
            product *= accuracy;
            length += product;
        }
        length
    }
}

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The step, from 1.
    pub step: u64,
    /// The epoch, from 0.
    pub epoch: u64,
    /// Mean objective since the last record.
    pub loss: f64,
    /// Share of supervised tokens whose best token the draft named, per draft position.
    pub accuracy: Vec<f64>,
    /// Probability that a sampled token is accepted, per draft position.
    pub acceptance: Vec<f64>,
    /// Learning rate of the step.
    pub lr: f64,
    /// Gradient norm of the step, before clipping.
    pub grad_norm: f64,
    /// Tokens per second since the last record.
    pub tokens_per_second: f64,
    /// Held-out figures, where they were taken at this step.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub held_out: Option<HeldRecord>,
}

/// Held-out figures of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeldRecord {
    /// Mean objective; absent where no row is held out.
    pub loss: Option<f64>,
    /// As in [`Record`].
    pub accuracy: Vec<f64>,
    /// As in [`Record`].
    pub acceptance: Vec<f64>,
    /// See [`Figures::estimated_acceptance_length`]; absent where no row is held out.
    pub estimated_acceptance_length: Option<f64>,
    /// From decoding held-out prompts.
    pub acceptance_length: Option<f64>,
}

/// The lines of a run's `metrics.jsonl`.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
}

impl Log {
    /// Opens the log and drops the lines after `step`, which a resumed run writes again.
    pub(crate) fn resume(folder: &Path, step: u64) -> Result<Self> {
        let path = folder.join("metrics.jsonl");
        let old = fs_err::read_to_string(&path).unwrap_or_default();
        let keep = |line: &&str| serde_json::from_str::<Record>(line).is_ok_and(|r| r.step <= step);
        let kept: String = old.lines().filter(keep).flat_map(|line| [line, "\n"]).collect();
        // In one piece: a process that is killed here loses no line.
        let unfinished = path.with_extension("tmp");
        fs_err::write(&unfinished, kept)?;
        fs_err::rename(unfinished, &path)?;
        Ok(Self { path })
    }

    /// Appends one line.
    pub(crate) fn write(&self, record: &Record) -> Result<()> {
        let mut file = fs_err::OpenOptions::new().append(true).create(true).open(&self.path)?;
        let line = serde_json::to_string(record).map_err(std::io::Error::other)?;
        Ok(writeln!(file, "{line}")?)
    }
}
