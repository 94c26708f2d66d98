//! Offline: features read from a store; the target is not needed.

use std::sync::Arc;

use rayon::prelude::*;
use specforge_methods::Batch;
use specforge_models::Capture;
use specforge_store::{DType, Field, Reader, Schema};
use specforge_tensor::{Device, Tensor};

use super::{FeatureSource, RowFeatures, assemble};
use crate::{Error, Result};

/// A store of captured features.
#[derive(Debug, Clone)]
pub struct Offline {
    reader: Arc<Reader>,
}

/// The fields that a store for `capture` of a target of width Ht has.
pub fn schema(capture: &Capture, hidden_size: usize) -> Result<Schema> {
    let width = (capture.layers.len() * hidden_size) as u32;
    Ok(Schema::new(vec![
        Field::new("input_ids", DType::U32, 1),
        Field::new("loss_mask", DType::U8, 1),
        Field::new("hidden_states", DType::Bf16, width),
        Field::new("last_hidden", DType::Bf16, hidden_size as u32),
        Field::new("teacher_argmax", DType::U32, 1),
        Field::new("teacher_logsumexp", DType::F32, 1),
    ])?)
}

impl Offline {
    /// Over an open store.
    pub fn new(reader: Arc<Reader>) -> Self {
        Self { reader }
    }
}

/// One row's features from a store.
pub fn record_features(reader: &Reader, row: usize) -> Result<RowFeatures> {
    if !reader.contains(row as u64) {
        let reason =
            "is not in the store: the capture is not finished, run it again to complete it".to_owned();
        return Err(Error::Row { row: row as u64, reason });
    }
    let record = reader.record(row as u64)?;
    let states = |name: &str| -> Result<Tensor> {
        let values = record.field_bf16(name)?.into_owned();
        let width = values.len() / record.len().max(1);
        Ok(Tensor::from_bf16(Device::Cpu, values, &[record.len(), width])?)
    };
    Ok(RowFeatures {
        input_ids: record.field_u32("input_ids")?.to_vec(),
        loss_mask: record.field_u8("loss_mask")?.to_vec(),
        hidden_states: states("hidden_states")?,
        last_hidden: states("last_hidden")?,
        argmax: record.field_u32("teacher_argmax")?.to_vec(),
        logsumexp: record.field_f32("teacher_logsumexp")?.to_vec(),
    })
}

impl FeatureSource for Offline {
    fn fetch(&mut self, rows: &[usize]) -> Result<Batch> {
        let features =
            rows.par_iter().map(|&row| record_features(&self.reader, row)).collect::<Result<_>>()?;
        assemble(rows, features)
    }
}
