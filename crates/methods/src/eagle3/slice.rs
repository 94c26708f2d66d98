//! The share of a batch's rows that one of several ranks computes.

use std::ops::Range;

use specforge_tensor::{Device, Tape, Tensor, Var};

use crate::{Batch, Exchange, Result};

/// Rows of a batch, ascending, in one piece or several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pieces(Vec<Range<usize>>);

impl Pieces {
    /// The rows of rank `rank` of `size`, of `n`. Keys that pass around or are gathered: one piece of the first half and one
    /// of the last, so that all ranks see as many keys, though later rows see more of them. Heads for rows: one piece.
    pub(super) fn dealt(n: usize, (rank, size): (usize, usize), exchange: Exchange) -> Self {
        let (each, own) = match exchange {
            Exchange::Heads => (n.div_ceil(size), vec![rank]),
            Exchange::Ring | Exchange::Gather => (n.div_ceil(2 * size), vec![rank, 2 * size - 1 - rank]),
        };
        let piece = |i: usize| (i * each).min(n)..((i + 1) * each).min(n);
        Self(own.into_iter().map(piece).filter(|piece| !piece.is_empty()).collect())
    }

    pub(super) fn len(&self) -> usize {
        self.0.iter().map(Range::len).sum()
    }

    pub(super) fn contains(&self, row: usize) -> bool {
        self.0.iter().any(|piece| piece.contains(&row))
    }

    /// How many of its rows come before `row`, which is the place of `row` among them; never decreases.
    pub(super) fn before(&self, row: usize) -> usize {
        self.0.iter().map(|piece| row.clamp(piece.start, piece.end) - piece.start).sum()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = usize> {
        self.0.iter().cloned().flatten()
    }
}

/// The share of a batch's rows that one rank computes.
pub(super) struct Slice {
    /// The rows. A rank that would have none stands in with the last row, which then is nobody's key and has no loss.
    pub(super) rows: Pieces,
    /// The keys of every rank, each rank's rows; of one that stands in none.
    pub(super) keys: Vec<Pieces>,
    /// Keys of this rank, and of a rank at most.
    pub(super) n_keys: usize,
    pub(super) each: usize,
    /// The keys that the live rows of every rank see, where ranks exchange heads for rows; empty elsewhere.
    pub(super) sights: Vec<Vec<Range<u32>>>,
    /// Rows beyond the end of a piece whose tokens it reads.
    ahead: usize,
    /// Rows of the batch.
    n: usize,
}

impl Slice {
    /// All rows.
    pub(super) fn whole(n: usize) -> Self {
        let rows = Pieces(std::iter::once(0..n).collect());
        Self { keys: vec![rows.clone()], rows, n_keys: n, each: n, sights: Vec::new(), ahead: 0, n }
    }

    /// The share of rank `rank` of `size`, of `n` rows, `ahead` rows being read beyond each piece.
    pub(super) fn dealt(n: usize, (rank, size): (usize, usize), exchange: Exchange, ahead: usize) -> Self {
        let keys: Vec<Pieces> = (0..size).map(|rank| Pieces::dealt(n, (rank, size), exchange)).collect();
        let n_keys = keys[rank].len();
        let rows = if n_keys == 0 { Pieces(std::iter::once(n - 1..n).collect()) } else { keys[rank].clone() };
        let each = keys.iter().map(Pieces::len).max().unwrap_or(0);
        Self { rows, keys, n_keys, each, sights: Vec::new(), ahead, n }
    }

    /// The tokens that its rows read at some step, piece by piece.
    pub(super) fn tokens(&self, batch: &Batch) -> Vec<u32> {
        self.rows.0.iter().flat_map(|piece| &batch.input_ids[self.reach(piece)]).copied().collect()
    }

    /// The place among [`Slice::tokens`] of the token `ahead` rows after row `row`.
    pub(super) fn token(&self, row: usize, ahead: usize) -> u32 {
        let pieces = &self.rows.0;
        let own = pieces.iter().position(|piece| piece.contains(&row)).expect("a row of this rank");
        let before: usize = pieces[..own].iter().map(|piece| self.reach(piece).len()).sum();
        (before + row - pieces[own].start + ahead) as u32
    }

    fn reach(&self, piece: &Range<usize>) -> Range<usize> {
        piece.start..(piece.end + self.ahead).min(self.n)
    }

    /// The captured states of its rows.
    pub(super) fn hidden_states(&self, tape: &Tape<'_>, batch: &Batch) -> Result<Var> {
        let of = &batch.hidden_states;
        match &self.rows.0[..] {
            [all] if all.len() == self.n => Ok(tape.input(of.clone())),
            [piece] => Ok(tape.input(of.rows(piece.clone())?)),
            _ => {
                let rows = self.rows.iter().map(|row| row as u32).collect();
                Ok(tape.gather_rows(&tape.input(of.clone()), &Tensor::from_u32(of.device(), rows))?)
            }
        }
    }

    /// Where every row of the batch is among the keys of all ranks, each filled up to [`Slice::each`]. `[n]`
    pub(super) fn places_of_keys(&self, device: Device) -> Tensor {
        let mut places = vec![0; self.n];
        for (rank, keys) in self.keys.iter().enumerate() {
            keys.iter().enumerate().for_each(|(i, row)| places[row] = (rank * self.each + i) as u32);
        }
        Tensor::from_u32(device, places)
    }
}

#[cfg(test)]
mod tests {
    use super::{Exchange, Pieces};

    /// Every row is one rank's, and ranks whose keys come to all see about as many.
    #[test]
    fn every_row_is_dealt_once_and_evenly() {
        for (n, size) in [(1, 2), (9, 4), (64, 4), (1000, 3), (5, 7)] {
            for exchange in [Exchange::Heads, Exchange::Ring, Exchange::Gather] {
                let all: Vec<Pieces> =
                    (0..size).map(|rank| Pieces::dealt(n, (rank, size), exchange)).collect();
                let mut rows: Vec<usize> = all.iter().flat_map(Pieces::iter).collect();
                rows.sort_unstable();
                assert_eq!(rows, (0..n).collect::<Vec<_>>(), "{n} rows, {size} ranks, {exchange:?}");
                for pieces in &all {
                    let places: Vec<usize> = pieces.iter().map(|row| pieces.before(row)).collect();
                    assert_eq!(places, (0..pieces.len()).collect::<Vec<_>>());
                    assert!((0..n).all(|row| pieces.contains(row) == pieces.iter().any(|own| own == row)));
                }
            }
        }
        let seen =
            |rank| Pieces::dealt(4096, (rank, 4), Exchange::Ring).iter().map(|row| row + 1).sum::<usize>();
        assert!((1..4).all(|rank| seen(rank) == seen(0)));
    }
}
