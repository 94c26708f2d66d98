//! What a method is given, and what it gives back.

use std::ops::Range;

use specforge_tensor::{Device, Later, Tensor};

use crate::{Error, Result};

/// A packed micro-batch: documents one after the other, no padding. T is the number of tokens.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The training rows the documents came from, for messages.
    pub rows: Vec<u64>,
    /// Each document's tokens, in order and without gaps.
    pub bounds: Vec<Range<usize>>,
    /// `[T]`.
    pub input_ids: Vec<u32>,
    /// 1 for supervised tokens, `[T]`.
    pub loss_mask: Vec<u8>,
    /// `[T]`; as a rule they restart at 0 in every document.
    pub positions: Vec<u32>,
    /// The target's captured states, `[T, A · Ht]`: layers ascending.
    pub hidden_states: Tensor,
    /// The target's next-token distributions.
    pub teacher: Teacher,
    /// What one position of each document weighs in the loss, if not what the method's setting gives.
    pub position_weight: Option<Vec<f32>>,
}

/// The target's next-token distributions; entry t is that for the token after t.
#[derive(Debug, Clone)]
pub enum Teacher {
    /// From the last hidden state after the final norm, `[T, Ht]`, and what was kept of the whole vocabulary.
    LastHidden {
        /// `[T, Ht]`.
        hidden: Tensor,
        /// The best token, `[T]`.
        argmax: Vec<u32>,
        /// Log-sum-exp of the logits, `[T]`.
        logsumexp: Tensor,
    },
    /// Logits over the target's vocabulary, `[T, V]`.
    Logits(Tensor),
}

/// A sum and the weight it is divided by once all micro-batches (and ranks) are added up.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Ratio {
    /// The sum.
    pub sum: f64,
    /// The weight.
    pub weight: f64,
}

impl Ratio {
    /// The quotient; 0 where nothing was weighed.
    pub fn value(self) -> f64 {
        if self.weight > 0.0 { self.sum / self.weight } else { 0.0 }
    }
}

impl std::ops::AddAssign for Ratio {
    fn add_assign(&mut self, other: Self) {
        self.sum += other.sum;
        self.weight += other.weight;
    }
}

/// A named figure, one value per draft position (test-time-training step).
#[derive(Debug, Clone, PartialEq)]
pub struct Metric {
    /// `loss`, `accuracy`, `acceptance`.
    pub name: &'static str,
    /// One ratio per position.
    pub values: Vec<Ratio>,
}

/// The loss of a micro-batch: gradients are those of the objective's sum.
#[derive(Debug, Clone, PartialEq)]
pub struct Loss {
    /// What is minimised.
    pub objective: Ratio,
    /// Figures to show.
    pub metrics: Vec<Metric>,
}

/// A loss whose gradients are on the tape and whose figures come when the device has got there.
#[derive(Debug)]
pub struct PendingLoss {
    /// The weight of the objective, which the host knows.
    pub weight: f64,
    /// The loss.
    pub loss: Later<Loss>,
}

impl Batch {
    /// The same batch with its tensors on another device.
    pub fn to_device(self, device: Device) -> Result<Self> {
        let teacher = match self.teacher {
            Teacher::LastHidden { hidden, argmax, logsumexp } => Teacher::LastHidden {
                hidden: hidden.to_device(device)?,
                argmax,
                logsumexp: logsumexp.to_device(device)?,
            },
            Teacher::Logits(logits) => Teacher::Logits(logits.to_device(device)?),
        };
        Ok(Self { hidden_states: self.hidden_states.to_device(device)?, teacher, ..self })
    }

    /// The documents of the first half and those of the second, by tokens; nothing to split in a single document.
    pub fn halves(&self) -> Result<Option<[Self; 2]>> {
        let half = self.n_tokens() / 2;
        let first = self.bounds.iter().filter(|b| b.end <= half).count().max(1);
        if first >= self.bounds.len() {
            return Ok(None);
        }
        Ok(Some([self.documents(0..first)?, self.documents(first..self.bounds.len())?]))
    }

    fn documents(&self, which: Range<usize>) -> Result<Self> {
        let bounds = &self.bounds[which.clone()];
        let tokens = bounds[0].start..bounds[bounds.len() - 1].end;
        let teacher = match &self.teacher {
            Teacher::LastHidden { hidden, argmax, logsumexp } => Teacher::LastHidden {
                hidden: hidden.rows(tokens.clone())?,
                argmax: argmax[tokens.clone()].to_vec(),
                logsumexp: logsumexp
                    .reshape(&[logsumexp.len(), 1])?
                    .rows(tokens.clone())?
                    .reshape(&[tokens.len()])?,
            },
            Teacher::Logits(logits) => Teacher::Logits(logits.rows(tokens.clone())?),
        };
        Ok(Self {
            rows: self.rows[which.clone()].to_vec(),
            bounds: bounds.iter().map(|b| b.start - tokens.start..b.end - tokens.start).collect(),
            input_ids: self.input_ids[tokens.clone()].to_vec(),
            loss_mask: self.loss_mask[tokens.clone()].to_vec(),
            positions: self.positions[tokens.clone()].to_vec(),
            hidden_states: self.hidden_states.rows(tokens)?,
            teacher,
            position_weight: self.position_weight.as_ref().map(|weight| weight[which].to_vec()),
        })
    }

    /// The number of tokens.
    pub fn n_tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Fails unless all parts have the same number of tokens and the documents cover them in order.
    pub fn check(&self, hidden_width: usize) -> Result<()> {
        let t = self.n_tokens();
        let mut end = 0;
        for bounds in &self.bounds {
            if bounds.start != end || bounds.end <= bounds.start {
                return Err(Error::Batch(format!("document {bounds:?} does not follow token {end}")));
            }
            end = bounds.end;
        }
        let parts =
            [("documents", end), ("loss mask", self.loss_mask.len()), ("positions", self.positions.len())];
        for (what, n) in parts {
            if n != t {
                return Err(Error::Batch(format!("{what} cover {n} tokens, expected {t}")));
            }
        }
        if self.hidden_states.shape() != [t, hidden_width] {
            let got = self.hidden_states.shape();
            return Err(Error::Batch(format!(
                "hidden states have shape {got:?}, expected [{t}, {hidden_width}]"
            )));
        }
        Ok(())
    }
}
