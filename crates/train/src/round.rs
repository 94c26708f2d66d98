//! What one rank fetches at a time: its rows of a micro-batch, alone or together with other ranks.

use std::sync::{Mutex, MutexGuard};

use specforge_methods::Batch;
use specforge_tensor::Device;

use crate::{Error, FeatureSource, MicroBatch, Result};

/// One micro-batch of the ranks that fetch together.
#[derive(Debug)]
pub(crate) struct Round {
    /// Each rank's rows, which may be none.
    pub rows: Vec<MicroBatch>,
    /// Which are this rank's.
    pub own: usize,
}

pub(crate) type Locked<'a, 'b> = MutexGuard<'a, &'b mut dyn FeatureSource>;

pub(crate) fn locked<'a, 'b>(source: &'a Mutex<&'b mut dyn FeatureSource>) -> Result<Locked<'a, 'b>> {
    source.lock().map_err(|_| Error::Mode("the source of features failed before".to_owned()))
}

/// The batch of this rank's rows; nothing without a row. Ranks that fetch together do so in their order.
pub(crate) fn fetch(
    source: &Mutex<&mut dyn FeatureSource>,
    round: &Round,
    device: Device,
) -> Result<Option<Batch>> {
    let mut batch = None;
    for (peer, rows) in round.rows.iter().enumerate() {
        if peer == round.own && !rows.is_empty() {
            batch = Some(locked(source)?.fetch(rows)?.to_device(device)?);
        } else {
            locked(source)?.take_part(rows)?;
        }
    }
    Ok(batch)
}
