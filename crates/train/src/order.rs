//! The order of rows: a shuffle per epoch, packed into micro-batches under a token budget, grouped into steps. It is
//! a function of the settings alone, so that a resumed run takes up where it stopped.

use std::ops::Range;

use rand_chacha::rand_core::Rng;
use specforge_nn::init::stream;

use crate::Position;

/// The rows of one micro-batch.
pub type MicroBatch = Vec<usize>;

/// Which rows every step of every epoch trains on.
#[derive(Debug, Clone, PartialEq)]
pub struct Order {
    /// The rows to train on, ascending, and their lengths in tokens.
    pub rows: Vec<(usize, usize)>,
    /// Most tokens in a micro-batch; a longer row makes one of its own.
    pub tokens_per_batch: usize,
    /// Micro-batches per step.
    pub accumulation: usize,
    /// Seed of the shuffles.
    pub seed: u64,
}

impl Order {
    /// The steps of an epoch (from 0). The last may have fewer micro-batches; sums and weights keep it honest.
    pub fn epoch(&self, epoch: u64) -> Vec<Vec<MicroBatch>> {
        let mut batches: Vec<MicroBatch> = Vec::new();
        let mut tokens = usize::MAX;
        for (row, len) in self.shuffled(epoch) {
            if tokens.saturating_add(len) > self.tokens_per_batch {
                batches.push(Vec::new());
                tokens = 0;
            }
            tokens += len;
            if let Some(batch) = batches.last_mut() {
                batch.push(row);
            }
        }
        batches.chunks(self.accumulation.max(1)).map(<[MicroBatch]>::to_vec).collect()
    }

    /// What rank `rank` of `ranks` does of a step: as many micro-batches as every other rank, some of them without a row.
    ///
    /// Micro-batches go round. Where there are fewer than ranks, several ranks share one and get its documents in
    /// pieces of about as many tokens each. So the rows of a step are the same on any number of ranks; the first rank
    /// is never without one.
    pub fn deal(&self, step: &[MicroBatch], rank: usize, ranks: usize) -> Vec<MicroBatch> {
        let n = step.len();
        if n >= ranks || n == 0 {
            let rounds = 0..n.div_ceil(ranks);
            return rounds.map(|round| step.get(round * ranks + rank).cloned().unwrap_or_default()).collect();
        }
        let (batch, piece) = (&step[rank % n], rank / n);
        let pieces = ranks / n + usize::from(rank % n < ranks % n);
        vec![self.piece(batch, piece, pieces)]
    }

    /// What the ranks `which` of `ranks` do of a step, a round at a time: one micro-batch of each.
    pub fn rounds(&self, step: &[MicroBatch], which: Range<usize>, ranks: usize) -> Vec<Vec<MicroBatch>> {
        let dealt: Vec<_> = which.map(|rank| self.deal(step, rank, ranks)).collect();
        let rounds = dealt.first().map_or(0, Vec::len);
        (0..rounds).map(|round| dealt.iter().map(|of_rank| of_rank[round].clone()).collect()).collect()
    }

    /// The steps from a position on, up to so many of the whole run.
    pub fn steps_from(&self, position: Position, total: u64) -> impl Iterator<Item = Vec<MicroBatch>> {
        let Position { step, epoch, epoch_step } = position;
        let epochs = (epoch..).map(|epoch| self.epoch(epoch)).take_while(|steps| !steps.is_empty());
        epochs.flatten().skip(epoch_step as usize).take(total.saturating_sub(step) as usize)
    }

    /// Piece `piece` of `pieces` of a micro-batch.
    fn piece(&self, batch: &[usize], piece: usize, pieces: usize) -> MicroBatch {
        let lengths: Vec<usize> = batch.iter().map(|row| self.length(*row)).collect();
        let total = lengths.iter().sum::<usize>().max(1);
        let mut start = 0;
        let of_row = lengths.iter().map(|len| {
            let of = start * pieces / total;
            start += len;
            of
        });
        batch.iter().zip(of_row).filter(|(_, of)| *of == piece).map(|(row, _)| *row).collect()
    }

    fn length(&self, row: usize) -> usize {
        let at = self.rows.binary_search_by_key(&row, |(row, _)| *row);
        at.map_or(1, |at| self.rows[at].1)
    }

    /// Steps of the first `epochs` epochs together.
    pub fn total_steps(&self, epochs: u64) -> u64 {
        (0..epochs).map(|epoch| self.epoch(epoch).len() as u64).sum()
    }

    /// Fisher-Yates over a stream of the epoch's own.
    fn shuffled(&self, epoch: u64) -> Vec<(usize, usize)> {
        let mut rows = self.rows.clone();
        let mut rng = stream(self.seed, &format!("order of epoch {epoch}"));
        for i in (1..rows.len()).rev() {
            rows.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(n: usize, tokens_per_batch: usize, accumulation: usize) -> Order {
        Order { rows: (0..n).map(|i| (i, 1 + i * 7 % 40)).collect(), tokens_per_batch, accumulation, seed: 3 }
    }

    #[test]
    fn every_row_is_seen_once_an_epoch_within_the_budget() {
        for (budget, accumulation) in [(1, 1), (50, 1), (64, 3), (100_000, 2)] {
            let order = order(101, budget, accumulation);
            let steps = order.epoch(4);
            let mut seen: Vec<usize> = steps.iter().flatten().flatten().copied().collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..101).collect::<Vec<_>>());
            for batch in steps.iter().flatten() {
                let tokens: usize = batch.iter().map(|&r| order.rows[r].1).sum();
                assert!(tokens <= budget || batch.len() == 1, "{tokens} tokens in {batch:?}");
            }
            assert!(steps.iter().rev().skip(1).all(|s| s.len() == accumulation));
            assert_eq!(order.total_steps(2), (order.epoch(0).len() + order.epoch(1).len()) as u64);
        }
    }

    #[test]
    fn parallel_ranks_have_the_rows_of_a_step_between_them() {
        for (budget, accumulation) in [(1, 1), (64, 1), (64, 3), (120, 4), (100_000, 1)] {
            let order = order(61, budget, accumulation);
            for (ranks, step) in (1..=7).flat_map(|ranks| order.epoch(1).into_iter().map(move |s| (ranks, s)))
            {
                let dealt: Vec<_> = (0..ranks).map(|rank| order.deal(&step, rank, ranks)).collect();
                assert!(dealt.iter().all(|d| d.len() == dealt[0].len()), "the same number of micro-batches");
                assert!(!dealt[0][0].is_empty(), "the first rank has a row");
                let mut rows: Vec<usize> = dealt.iter().flatten().flatten().copied().collect();
                let mut expected: Vec<usize> = step.iter().flatten().copied().collect();
                rows.sort_unstable();
                expected.sort_unstable();
                assert_eq!(rows, expected);
            }
        }
        let order = order(61, 100_000, 1);
        let tokens = |rows: &[usize]| rows.iter().map(|&r| order.rows[r].1).sum::<usize>();
        let whole = &order.epoch(0)[0];
        for rank in 0..3 {
            let own = tokens(&order.deal(whole, rank, 3)[0]);
            assert!(own.abs_diff(tokens(&whole[0]) / 3) < 60, "{own} tokens");
        }
    }

    #[test]
    fn parallel_steps_from_a_position_are_those_that_are_left() {
        let order = order(61, 64, 3);
        let lengths = [0, 1].map(|epoch| order.epoch(epoch).len() as u64);
        let total = lengths[0] + lengths[1] + 2;
        let all: Vec<_> = order.steps_from(Position::default(), total).collect();
        assert_eq!(all.len() as u64, total);
        assert_eq!(all[..lengths[0] as usize], order.epoch(0));
        assert_eq!(all[all.len() - 2..], order.epoch(2)[..2]);
        let mut position = Position::default();
        while position.step < total {
            let left: Vec<_> = order.steps_from(position, total).collect();
            assert_eq!(left, all[position.step as usize..], "{position:?}");
            position.step += 1;
            position.epoch_step += 1;
            if lengths.get(position.epoch as usize) == Some(&position.epoch_step) {
                position = Position { epoch: position.epoch + 1, epoch_step: 0, ..position };
            }
        }
        assert!(order.rounds(&all[0], 1..3, 4).iter().all(|round| round.len() == 2));
    }

    #[test]
    fn epochs_differ_and_repeat_by_seed() {
        let order = order(50, 64, 1);
        assert_ne!(order.epoch(0), order.epoch(1));
        assert_eq!(order.epoch(1), order.clone().epoch(1));
        assert!(Order { rows: vec![], ..order }.epoch(0).is_empty());
    }
}
