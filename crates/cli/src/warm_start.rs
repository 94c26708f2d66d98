//! Training that starts from the weights of a draft: an export, a checkpoint, or what other programs wrote.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use specforge_export::{Tensor as FileTensor, read_eagle3, read_eagle3_weights};
use specforge_methods::{DraftMethod, VocabMap};
use specforge_tensor::{Device, Params, Tensor};
use specforge_train::Checkpoint;

use crate::setup;
use crate::show::note;

/// The head, whose rows are those of the draft's tokens.
const HEAD: &str = "lm_head.weight";

/// Replaces fresh weights by those of a draft.
///
/// The draft vocabulary stays the run's: rows of the head go with their tokens, and tokens that the other draft could
/// not name keep fresh rows.
pub(crate) fn replace(folder: &Path, method: &dyn DraftMethod, params: &mut Params) -> Result<()> {
    let (tensors, vocab) = read(folder, method)?;
    let ids: Vec<_> = params.iter().filter(|(_, p)| p.trainable).map(|(id, _)| id).collect();
    for id in ids {
        let param = params.get_mut(id);
        let shape = param.whole_shape();
        let missing = || format!("{}: {} is missing", folder.display(), param.name);
        let tensor = tensors.get(&param.name).with_context(missing)?;
        // Rows of another vocabulary are another number of rows.
        let of_tokens = param.name == HEAD && tensor.shape.first() == Some(&vocab.len());
        let expected = if of_tokens { vec![vocab.len(), shape[1]] } else { shape.clone() };
        if tensor.shape != expected {
            bail!(
                "{}: {} has shape {:?}, this recipe's draft needs {expected:?}",
                folder.display(),
                param.name,
                tensor.shape
            );
        }
        if of_tokens {
            let fresh = param.value.to_f32();
            let rows = fresh.len() / shape[1];
            let first = param.split.map_or(0, |split| split.piece * rows);
            let ours = &method.vocab().target_ids()[first..first + rows];
            let values = rows_of(ours, &vocab, &tensor.to_f32(), fresh);
            param.value.assign(&Tensor::from_f32(Device::Cpu, values, &[rows, shape[1]])?)?;
        } else {
            param.assign_whole(&Tensor::from_f32(Device::Cpu, tensor.to_f32(), &shape)?)?;
        }
    }
    let is_new = |token: &&u32| vocab.draft_id(**token).is_none();
    let fresh_rows = method.vocab().target_ids().iter().filter(is_new).count();
    note!("warm      weights of {}", folder.display());
    if fresh_rows > 0 {
        note!(
            "          {fresh_rows} of {} draft tokens are new to it: their rows of the head start fresh",
            method.vocab().len()
        );
    }
    Ok(())
}

/// The draft's tensors by our names, and the tokens that its head names.
fn read(
    folder: &Path,
    method: &dyn DraftMethod,
) -> Result<(BTreeMap<String, FileTensor<'static>>, VocabMap)> {
    let vocab_size = method.vocab().t2d().len();
    if folder.join("state.json").exists() {
        let checkpoint = Checkpoint::open(folder)?;
        if checkpoint.state.identity["draft"] != setup::vocab_hash(method).as_str() {
            bail!(
                "{}: a checkpoint does not say which tokens its draft names, and they are not this run's; start from the \
                 run's export instead",
                folder.display()
            );
        }
        return Ok((read_eagle3_weights(&checkpoint.draft())?, method.vocab().clone()));
    }
    let tensors = if folder.join("config.json").exists() {
        let read = read_eagle3(folder)?;
        if let Some(layers) = read.config.capture_layers.as_ref().filter(|l| **l != method.capture().layers) {
            note!(
                "warning: {} was trained on layers {layers:?}, this run captures {:?}",
                folder.display(),
                method.capture().layers
            );
        }
        if read.norms_before_residual() {
            note!("warning: {} norms before the residual, this run's draft does not", folder.display());
        }
        read.tensors
    } else {
        read_eagle3_weights(folder)?
    };
    let vocab = match tensors.get("d2t") {
        // Whole numbers below the size of a vocabulary are exact in float32.
        Some(d2t) => {
            let offsets: Vec<i64> = d2t.to_f32().into_iter().map(|offset| offset as i64).collect();
            VocabMap::from_offsets(&offsets, vocab_size).with_context(|| folder.display().to_string())?
        }
        None => VocabMap::full(vocab_size),
    };
    Ok((tensors, vocab))
}

/// The head's rows for our tokens: of `theirs` where they have the token, else of `fresh`.
fn rows_of(ours: &[u32], others: &VocabMap, theirs: &[f32], mut fresh: Vec<f32>) -> Vec<f32> {
    let width = fresh.len() / ours.len().max(1);
    for (row, &token) in fresh.chunks_exact_mut(width.max(1)).zip(ours) {
        if let Some(id) = others.draft_id(token) {
            row.copy_from_slice(&theirs[id as usize * width..][..width]);
        }
    }
    fresh
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_with_their_tokens() {
        let ours = VocabMap::from_offsets(&[1, 1, 3], 8).unwrap();
        let others = VocabMap::from_offsets(&[2, 4], 8).unwrap();
        assert_eq!((ours.target_ids(), others.target_ids()), (&[1, 2, 5][..], &[2, 5][..]));
        let rows = |ours: &[u32]| rows_of(ours, &others, &[20., 21., 50., 51.], vec![1.0; 2 * ours.len()]);
        assert_eq!(rows(ours.target_ids()), [1., 1., 20., 21., 50., 51.]);
        assert_eq!(rows(&ours.target_ids()[1..]), [20., 21., 50., 51.]);
    }
}
