//! Whether imported states are the target's.

use std::sync::Arc;

use anyhow::{Result, bail};
use specforge_config::RunPlan;
use specforge_data::Prepared;
use specforge_models::Capture;
use specforge_store::Reader;
use specforge_tensor::Tensor;
use specforge_train::{Online, features};

use crate::setup;
use crate::show::note;

/// Relative distance of states above which they are not the target's: bf16 and another engine's kernels are below it,
/// another layer is near 1.
const FAR: f64 = 0.05;

/// Runs the target on some rows of the store and compares every captured layer.
pub(super) fn against_target(
    plan: &RunPlan,
    data: &Arc<Prepared>,
    capture: &Capture,
    most: usize,
) -> Result<()> {
    let reader = Reader::open(&plan.store.path)?;
    let rows: Vec<usize> = (0..data.len()).filter(|&row| reader.contains(row as u64)).take(most).collect();
    let target = setup::target(plan, None)?;
    let width = target.info().hidden_size;
    let (data, recorded, dtype) = (data.clone(), capture.clone(), setup::capture_dtype(plan));
    let online = Online { target, data, capture: recorded, dtype, peers: None };
    let computed = online.rows(&rows)?;
    let names = capture.layers.iter().map(|layer| format!("layer {layer}")).chain(["last".to_owned()]);
    let mut sums = vec![(0.0, 0.0); capture.layers.len() + 1];
    for (&row, computed) in rows.iter().zip(&computed) {
        let stored = features::record_features(&reader, row)?;
        let (layers, last) = sums.split_at_mut(capture.layers.len());
        add(&stored.hidden_states, &computed.hidden_states, width, layers);
        add(&stored.last_hidden, &computed.last_hidden, width, last);
    }
    let distances: Vec<(String, f64)> = names
        .zip(sums.iter().map(|(off, all): &(f64, f64)| (off / all.max(f64::MIN_POSITIVE)).sqrt()))
        .collect();
    let shown: Vec<String> = distances.iter().map(|(name, far)| format!("{name} {far:.1e}")).collect();
    note!("verify    relative distance over {} rows: {}", rows.len(), shown.join(", "));
    if let Some((name, far)) = distances.iter().find(|(_, far)| *far > FAR) {
        bail!(
            "{}: the states of {name} are not this target's (relative distance {far:.2}, expected below {FAR}): other \
             layers were captured (method.eagle3.capture-layers), another model, or --last-hidden is wrong; delete the \
             store and import again",
            plan.store.path.display()
        );
    }
    Ok(())
}

/// Adds squared differences and squares of every layer of `width` columns.
fn add(stored: &Tensor, computed: &Tensor, width: usize, sums: &mut [(f64, f64)]) {
    let (stored, computed) = (stored.to_f32(), computed.to_f32());
    let layers = sums.len();
    for (i, (a, b)) in stored.iter().zip(&computed).enumerate() {
        let (off, all) = &mut sums[i / width % layers];
        *off += f64::from(a - b).powi(2);
        *all += f64::from(*b).powi(2);
    }
}
