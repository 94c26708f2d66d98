//! How ranks share the work, and what of a draft each of them holds.

use std::fmt;

use serde::Serialize;

/// Ranks in each dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Layout {
    /// Ranks that train on batches of their own.
    pub(super) data: u64,
    /// Ranks that share every matrix.
    pub(super) tensor: u64,
    /// Ranks that share the rows of a batch.
    pub(super) sequence: u64,
    /// What ranks that train on other batches share (`parallel.fsdp`; ZeRO, Rajbhandari et al., 2020): 1: the optimizer,
    /// 2: the gradients too, 3: the weights too.
    pub(super) zero: u8,
}

impl Layout {
    /// One rank.
    #[cfg(test)]
    pub(super) const ALONE: Self = Self { data: 1, tensor: 1, sequence: 1, zero: 0 };

    /// All ranks.
    pub(super) fn ranks(self) -> u64 {
        self.data * self.tensor * self.sequence
    }

    /// Ranks over which the state of an optimizer is spread.
    pub(super) fn shards(self) -> u64 {
        if self.zero > 0 { self.data } else { 1 }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { data, tensor, sequence, zero } = self;
        let parts = [(*data, "data"), (*tensor, "tensor"), (*sequence, "sequence")];
        let shown: Vec<String> =
            parts.iter().filter(|(n, _)| *n > 1).map(|(n, name)| format!("{n} {name}")).collect();
        let shown = if shown.is_empty() { "1 rank".to_owned() } else { shown.join(" x ") };
        if *zero > 0 { write!(f, "{shown}, ZeRO {zero}") } else { f.write_str(&shown) }
    }
}

/// Layouts of so many ranks with at most `most` of them sharing a batch, those that communicate least first.
pub(super) fn of_ranks(ranks: u64, most: u64) -> Vec<Layout> {
    let powers = |top: u64| (0..).map(|p| 1 << p).take_while(move |&n| n <= top);
    let mut all = Vec::new();
    for tensor in powers(most.min(ranks)) {
        for sequence in powers(most / tensor) {
            let data = ranks / (tensor * sequence);
            if data * tensor * sequence == ranks {
                // Higher levels need no less while a step runs, which is when most is needed.
                let zero = 0..=u8::from(data > 1);
                all.extend(zero.map(|zero| Layout { data, tensor, sequence, zero }));
            }
        }
    }
    all.sort_by_key(|l| (l.tensor * l.sequence, l.tensor, l.zero));
    all
}

#[cfg(test)]
mod tests {
    use super::{Layout, of_ranks};

    #[test]
    fn layouts_have_all_ranks_and_the_least_talkative_come_first() {
        let all = of_ranks(8, 8);
        assert!(all.iter().all(|l| l.ranks() == 8));
        assert_eq!(all[0], Layout { data: 8, ..Layout::ALONE });
        assert_eq!(all[1].to_string(), "8 data, ZeRO 1");
        assert_eq!(of_ranks(1, 8), [Layout::ALONE]);
        assert!(of_ranks(6, 8).iter().any(|l| l.data == 3 && l.tensor == 2));
    }
}
