//! Figures since the last line of the log.

use std::time::Instant;

use crate::log::HeldRecord;
use crate::{Figures, Held, Position, Record};

/// Figures since the last record.
#[derive(Debug)]
pub(crate) struct Window {
    pub figures: Figures,
    lr: f64,
    grad_norm: f64,
    started: Instant,
    /// When the last step's figures came.
    pub settled: Option<Instant>,
}

impl Window {
    pub(crate) fn new() -> Self {
        Self { figures: Figures::default(), lr: 0.0, grad_norm: 0.0, started: Instant::now(), settled: None }
    }

    pub(crate) fn add(&mut self, figures: &Figures, lr: f64, grad_norm: f64) {
        self.figures.merge(figures);
        (self.lr, self.grad_norm) = (lr, grad_norm);
    }

    pub(crate) fn record(self, position: &Position, held: Option<&Held>) -> Record {
        let Self { figures, lr, grad_norm, started, .. } = self;
        Record {
            step: position.step,
            epoch: position.epoch,
            loss: figures.objective.value(),
            accuracy: figures.values("accuracy"),
            acceptance: figures.values("acceptance"),
            lr,
            grad_norm,
            tokens_per_second: figures.tokens as f64 / started.elapsed().as_secs_f64().max(1e-9),
            held_out: held.map(|held| {
                let (figures, values) = (held.figures.as_ref(), |name: &str| {
                    held.figures.as_ref().map_or_else(Vec::new, |figures| figures.values(name))
                });
                HeldRecord {
                    loss: figures.map(|figures| figures.objective.value()),
                    accuracy: values("accuracy"),
                    acceptance: values("acceptance"),
                    estimated_acceptance_length: figures.map(Figures::estimated_acceptance_length),
                    acceptance_length: held.acceptance_length,
                }
            }),
        }
    }
}
