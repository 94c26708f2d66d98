//! A batch's tokens and loss mask, drawn from a seed: spans of answers between spans of prompts, as chat data has.

use std::ops::Range;

use specforge_methods::{Batch, Teacher};
use specforge_tensor::Tensor;

use super::preset::Tokens;

/// Tokens of an answer: 20 to 200.
const ANSWER: Range<usize> = 20..201;

/// What the host knows of a batch.
#[derive(Debug, Clone)]
pub(in crate::commands) struct Data {
    pub(in crate::commands) bounds: Vec<Range<usize>>,
    pub(in crate::commands) input_ids: Vec<u32>,
    pub(in crate::commands) loss_mask: Vec<u8>,
    positions: Vec<u32>,
}

impl Data {
    /// Documents of random tokens of which the share `live` is supervised: one of many such batches, by its number.
    pub(in crate::commands) fn draw(tokens: Tokens, (live, number): (f64, usize), vocab_size: usize) -> Self {
        let mut draw = Draw(1 + ((number as u64) << 32));
        let (n, t) = (tokens.documents, tokens.each);
        let input_ids = (0..n * t).map(|_| draw.below(vocab_size) as u32).collect();
        let loss_mask = (0..n).flat_map(|_| mask(t, live, &mut draw)).collect();
        let positions = (0..n).flat_map(|_| 0..t as u32).collect();
        Self { bounds: (0..n).map(|d| d * t..(d + 1) * t).collect(), input_ids, loss_mask, positions }
    }

    pub(in crate::commands) fn n_tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// A batch of these tokens with features of them.
    pub(in crate::commands) fn batch(&self, hidden_states: Tensor, teacher: Teacher) -> Batch {
        Batch {
            rows: (0..self.bounds.len() as u64).collect(),
            bounds: self.bounds.clone(),
            input_ids: self.input_ids.clone(),
            loss_mask: self.loss_mask.clone(),
            positions: self.positions.clone(),
            hidden_states,
            teacher,
            position_weight: None,
        }
    }
}

/// A document's mask: answers until the share is reached, and the rest of the tokens around them.
fn mask(n: usize, live: f64, draw: &mut Draw) -> Vec<u8> {
    let supervised = ((n as f64 * live).round() as usize).clamp(1, n);
    let mut answers = Vec::new();
    let mut left = supervised;
    while left > 0 {
        let answer = (ANSWER.start + draw.below(ANSWER.len())).min(left);
        answers.push(answer);
        left -= answer;
    }
    // Where the answers cut the unsupervised tokens.
    let mut cuts: Vec<usize> = answers.iter().map(|_| draw.below(n - supervised + 1)).collect();
    cuts.sort_unstable();
    let (mut mask, mut cut_before) = (Vec::new(), 0);
    for (answer, cut) in answers.into_iter().zip(cuts) {
        mask.resize(mask.len() + cut - cut_before, 0);
        mask.resize(mask.len() + answer, 1);
        cut_before = cut;
    }
    mask.resize(n, 0);
    mask
}

/// Random numbers of a counter (splitmix64): the same on every machine.
pub(in crate::commands) struct Draw(pub(in crate::commands) u64);

impl Draw {
    pub(in crate::commands) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number below `n`.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::{Data, Tokens};

    #[test]
    fn the_mask_has_the_share_asked_for() {
        for (live, expected) in [(1.0, 4096), (0.5, 2048), (0.25, 1024)] {
            let data = Data::draw(Tokens { documents: 2, each: 2048 }, (live, 0), 100);
            assert_eq!(data.n_tokens(), 4096);
            assert_eq!(data.loss_mask.iter().map(|&m| usize::from(m)).sum::<usize>(), expected);
            assert!(data.input_ids.iter().all(|&id| id < 100));
        }
    }
}
