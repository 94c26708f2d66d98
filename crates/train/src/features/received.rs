//! Received: features come from a rank that has the target and nothing else to do.

use std::ops::Range;
use std::sync::Arc;

use specforge_data::Prepared;
use specforge_methods::{Batch, Teacher};
use specforge_tensor::{DType, Tensor};

use super::FeatureSource;
use crate::Result;
use crate::line::{Line, Request};

/// The line to such a rank, over a prepared set that both have.
#[derive(Debug, Clone)]
pub struct Received {
    /// The line.
    pub line: Line,
    /// The rows.
    pub data: Arc<Prepared>,
    /// Widths of the captured states and of the last hidden state: A · Ht and Ht.
    pub widths: [usize; 2],
    /// What captured states are rounded to.
    pub dtype: DType,
    /// This rank's place among those that rows are dealt to.
    pub own: usize,
}

impl FeatureSource for Received {
    fn fetch(&mut self, rows: &[usize]) -> Result<Batch> {
        self.line.ask(&Request::Rows(rows.to_vec()))?;
        let (mut bounds, mut input_ids, mut loss_mask) = (Vec::new(), Vec::new(), Vec::new());
        let mut positions = Vec::new();
        for row in rows.iter().map(|&row| self.data.row(row)) {
            bounds.push(input_ids.len()..input_ids.len() + row.ids.len());
            input_ids.extend_from_slice(row.ids);
            loss_mask.extend_from_slice(row.loss_mask);
            positions.extend(0..row.ids.len() as u32);
        }
        let (n, line) = (input_ids.len(), &self.line);
        let [hidden_states, hidden] = self.widths.map(|width| line.matrix(self.dtype, &[n, width]));
        let (hidden_states, hidden) = (hidden_states?, hidden?);
        let mut argmax = Tensor::from_u32(line.device, vec![0; n]);
        line.receive(&mut argmax)?;
        let logsumexp = line.matrix(DType::F32, &[n])?;
        Ok(Batch {
            rows: rows.iter().map(|&row| row as u64).collect(),
            bounds,
            input_ids,
            loss_mask,
            positions,
            hidden_states,
            teacher: Teacher::LastHidden { hidden, argmax: argmax.to_u32(), logsumexp },
            position_weight: None,
        })
    }

    fn meets(&self) -> Option<Range<usize>> {
        Some(self.own..self.own + 1)
    }

    fn take_part(&mut self, rows: &[usize]) -> Result<()> {
        self.line.ask(&Request::Rows(rows.to_vec()))
    }
}
