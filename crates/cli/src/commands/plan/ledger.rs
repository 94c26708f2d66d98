//! What a step holds, piece by piece: bytes are taken and given back in the order of the code that does so, and the
//! most that was held at once is kept with what it was made of.

use std::collections::BTreeMap;

use serde::Serialize;

/// What memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    /// The draft's weights, in the device's storage type.
    Weights,
    /// Moments, and what the storage type rounds away.
    Optimizer,
    /// Float32.
    Gradients,
    /// What the forward keeps for the backward, and what the backward makes.
    Activations,
    /// The batch's captured states and last hidden states, and those of batches fetched ahead.
    Features,
    /// Logits of one chunk, scratch of kernels.
    Buffers,
    /// On a CPU: the program itself.
    Program,
    /// The target: all of it online; the rows of its head that the draft keeps offline.
    Target,
}

/// Bytes by what they are for.
pub(super) type Held = BTreeMap<Kind, u64>;

/// Bytes taken and not yet given back.
#[derive(Debug)]
#[must_use]
pub(super) struct Piece(Kind, u64);

#[derive(Debug, Default)]
pub(super) struct Ledger {
    held: Held,
    peak: Held,
}

impl Ledger {
    pub(super) fn take(&mut self, kind: Kind, bytes: u64) -> Piece {
        *self.held.entry(kind).or_default() += bytes;
        if total(&self.held) > total(&self.peak) {
            self.peak.clone_from(&self.held);
        }
        Piece(kind, bytes)
    }

    /// Takes what stays.
    pub(super) fn keep(&mut self, kind: Kind, bytes: u64) {
        let _ = self.take(kind, bytes);
    }

    /// Takes for a moment what is gone before anything else is taken.
    pub(super) fn pass(&mut self, kind: Kind, bytes: u64) {
        let piece = self.take(kind, bytes);
        self.give(piece);
    }

    pub(super) fn give(&mut self, Piece(kind, bytes): Piece) {
        *self.held.entry(kind).or_default() -= bytes;
    }

    pub(super) fn give_all(&mut self, pieces: impl IntoIterator<Item = Piece>) {
        pieces.into_iter().for_each(|piece| self.give(piece));
    }

    /// The most that was held at once.
    pub(super) fn peak(self) -> Held {
        self.peak
    }
}

/// All bytes together.
pub(super) fn total(held: &Held) -> u64 {
    held.values().sum()
}

#[cfg(test)]
mod tests {
    use super::{Kind, Ledger, total};

    #[test]
    fn the_peak_is_kept_with_what_it_was_made_of() {
        let mut ledger = Ledger::default();
        ledger.keep(Kind::Weights, 5);
        let a = ledger.take(Kind::Activations, 7);
        ledger.pass(Kind::Buffers, 2);
        ledger.give(a);
        ledger.keep(Kind::Gradients, 8);
        let peak = ledger.peak();
        assert_eq!(total(&peak), 14);
        assert_eq!((peak[&Kind::Activations], peak[&Kind::Buffers]), (7, 2));
        assert!(!peak.contains_key(&Kind::Gradients));
    }
}
