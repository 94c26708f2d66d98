//! What to record of a target's forward pass, and what was recorded.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use specforge_tensor::Tensor;

use crate::{Error, Result};

/// What to record: the single source of truth for taps, the feature store's schema, and batch checks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capture {
    /// Layers whose output is recorded: 0-based, ascending; the residual stream after the layer's last addition.
    pub layers: Vec<usize>,
    /// Whether the last hidden state after the final norm is recorded.
    pub last_hidden: bool,
}

/// What a forward pass recorded of T packed tokens.
#[derive(Debug, Clone)]
pub struct Captured {
    /// The layers' outputs side by side in ascending order, float32 `[T, n · H]`.
    pub hidden_states: Tensor,
    /// The last hidden state after the final norm, float32 `[T, H]`, if asked for.
    pub last_hidden: Option<Tensor>,
    /// The rows of each document.
    pub bounds: Vec<Range<usize>>,
}

impl Capture {
    /// EAGLE3's default of SpecForge, SGLang and vLLM: an early, a middle and a late layer, `[1, n/2 - 1, n - 4]`,
    /// and the last hidden state.
    ///
    /// Serving engines number the same states by the layer they enter: `[2, n/2, n - 3]`.
    pub fn eagle3_default(n_layers: usize) -> Result<Self> {
        let layers = vec![1, (n_layers / 2).saturating_sub(1), n_layers.saturating_sub(4)];
        let capture = Self { layers, last_hidden: true };
        capture.check(n_layers).map_err(|_| Error::Capture {
            layers: capture.layers.clone(),
            n_layers,
            why: "the default layers are three different ones from 7 layers on; name three layers",
        })?;
        Ok(capture)
    }

    /// Fails unless the layers are ascending and exist.
    pub fn check(&self, n_layers: usize) -> Result<()> {
        let wrong = |why| Err(Error::Capture { layers: self.layers.clone(), n_layers, why });
        if !self.layers.is_sorted_by(|a, b| a < b) {
            return wrong("expected ascending layers, each once");
        }
        if self.layers.last().is_some_and(|&last| last >= n_layers) {
            return wrong("expected layers counted from 0, below the number of layers");
        }
        Ok(())
    }

    /// How many layers have to run for it.
    pub(crate) fn depth(&self, n_layers: usize) -> usize {
        if self.last_hidden { n_layers } else { self.layers.last().map_or(0, |last| last + 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_needs_three_different_layers() {
        let layers = |n| Capture::eagle3_default(n).map(|capture| capture.layers);
        assert_eq!(layers(7).unwrap(), [1, 2, 3]);
        assert_eq!(layers(8).unwrap(), [1, 3, 4]);
        assert_eq!(layers(32).unwrap(), [1, 15, 28]);
        for n in 0..7 {
            assert!(layers(n).unwrap_err().to_string().contains("name three layers"), "{n}");
        }
    }

    #[test]
    fn wrong_layers_are_refused() {
        let check = |layers: &[usize], expected: &str| {
            let message =
                Capture { layers: layers.to_vec(), last_hidden: false }.check(4).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        check(&[1, 4], "below the number of layers");
        check(&[2, 1], "ascending");
        check(&[1, 1], "each once");
    }

    #[test]
    fn only_the_layers_needed_run() {
        let depth = |layers: &[usize], last_hidden| Capture { layers: layers.to_vec(), last_hidden }.depth(9);
        assert_eq!([depth(&[1, 3], false), depth(&[1, 3], true), depth(&[], false)], [4, 9, 0]);
    }
}
