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
    /// What ranks that train on other rows share (`parallel.fsdp`; ZeRO, Rajbhandari et al., 2020): 1: the optimizer,
    /// 2: the gradients too, 3: the weights too.
    pub(super) zero: u8,
    /// Ranks that share one copy of the target (`parallel.target-tensor`).
    pub(super) target: u64,
    /// Ranks that have the target and train nothing (`parallel.target-ranks`).
    pub(super) apart: u64,
}

impl Layout {
    /// One rank.
    #[cfg(test)]
    pub(super) const ALONE: Self = Self { data: 1, tensor: 1, sequence: 1, zero: 0, target: 1, apart: 0 };

    /// All ranks.
    pub(super) fn ranks(self) -> u64 {
        self.data * self.of_batch() + self.apart
    }

    /// Ranks that share a batch.
    pub(super) fn of_batch(self) -> u64 {
        self.tensor * self.sequence
    }

    /// Ranks whose rows one copy of the target computes, one after the other.
    pub(super) fn peers(self) -> u64 {
        match self.apart {
            0 => (self.target / self.of_batch()).max(1),
            apart => self.data / (apart / self.target),
        }
    }

    /// Ranks over which the state of an optimizer is spread.
    pub(super) fn shards(self) -> u64 {
        if self.zero > 0 { self.data * self.sequence } else { 1 }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { data, tensor, sequence, zero, target, apart } = self;
        let parts = [(*data, "data"), (*tensor, "tensor"), (*sequence, "sequence")];
        let shown: Vec<String> =
            parts.iter().filter(|(n, _)| *n > 1).map(|(n, name)| format!("{n} {name}")).collect();
        let shown = if shown.is_empty() { "1 rank".to_owned() } else { shown.join(" x ") };
        f.write_str(&shown)?;
        if *zero > 0 {
            write!(f, ", ZeRO {zero}")?;
        }
        match (*apart, *target) {
            (0, target) if target == *tensor => Ok(()),
            (0, target) => write!(f, ", target over {target}"),
            (apart, target) if target == apart => write!(f, " + {apart} for the target"),
            (apart, target) => write!(f, " + {apart} for the target, over {target}"),
        }
    }
}

/// Layouts of so many ranks with at most `most` of them sharing a batch or the target, those that communicate least first.
pub(super) fn of_ranks(ranks: u64, most: u64) -> Vec<Layout> {
    let powers = |from: u64, top: u64| (0..).map(move |p| from << p).take_while(move |&n| n <= top);
    let most = most.min(ranks);
    let mut all = Vec::new();
    for tensor in powers(1, most) {
        for sequence in powers(1, most / tensor) {
            let data = ranks / (tensor * sequence);
            if data * tensor * sequence != ranks {
                continue;
            }
            for target in powers(tensor, most).filter(|target| ranks.is_multiple_of(*target)) {
                // Higher levels need no less while a step runs, which is when most is needed.
                let zero = 0..=u8::from(data > 1);
                all.extend(zero.map(|zero| Layout { data, tensor, sequence, zero, target, apart: 0 }));
            }
        }
    }
    all.sort_by_key(|l| (l.of_batch(), l.target, l.tensor, l.zero));
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
        // The target is shared before the draft is.
        let place = |wanted: &dyn Fn(&Layout) -> bool| all.iter().position(wanted).unwrap();
        let (target, draft) = (place(&|l| l.target == 8), place(&|l| l.tensor == 2));
        assert!(target < draft);
        assert_eq!(all[target].to_string(), "8 data, target over 8");
        let apart = Layout { data: 4, apart: 4, target: 2, ..Layout::ALONE };
        assert_eq!((apart.ranks(), apart.peers()), (8, 2));
        assert_eq!(apart.to_string(), "4 data + 4 for the target, over 2");
    }
}
