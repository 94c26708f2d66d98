//! The draft's vocabulary: the tokens of the target that are supervised most often.
//!
//! Two tables go with a draft (EAGLE-3, section 3; the names are those of SGLang's checkpoints): `d2t` has for each
//! draft id the distance to its target id, `t2d` says for each target id whether the draft has it.

use std::cmp::Reverse;

use crate::error::{Error, Result};
use crate::set::RowRef;

/// Draft vocabulary of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VocabMap {
    /// For each draft id the offset to its target id: `target = draft + d2t[draft]`.
    pub d2t: Vec<i64>,
    /// For each target id whether it is in the draft vocabulary.
    pub t2d: Vec<bool>,
}

/// How often each token is supervised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenCounts {
    /// Count by token id.
    counts: Vec<u64>,
    /// Ids with a count, in the order in which they were first seen (ascending inside one row).
    seen: Vec<u32>,
    rows: usize,
}

/// What to do when the draft vocabulary has more entries than tokens were seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Unseen {
    /// Fill it with the smallest ids that were not seen, as SpecForge does.
    #[default]
    Fill,
    /// Refuse with [`Error::DraftVocabularyUnseen`].
    Refuse,
}

impl TokenCounts {
    /// No token seen yet, of a vocabulary of `vocab_size` ids.
    pub fn new(vocab_size: usize) -> Self {
        Self { counts: vec![0; vocab_size], seen: Vec::new(), rows: 0 }
    }

    /// Counts the supervised tokens of all rows.
    pub fn of<'a>(vocab_size: usize, rows: impl IntoIterator<Item = RowRef<'a>>) -> Result<Self> {
        let mut counts = Self::new(vocab_size);
        rows.into_iter().try_for_each(|row| counts.add(row))?;
        Ok(counts)
    }

    /// Counts the supervised tokens of one row.
    pub fn add(&mut self, row: RowRef<'_>) -> Result<()> {
        let first_new = self.seen.len();
        for (&id, _) in row.ids.iter().zip(row.loss_mask).filter(|(_, bit)| **bit == 1) {
            let vocabulary = self.counts.len();
            let count = self.counts.get_mut(id as usize);
            let count = count.ok_or(Error::OutsideVocabulary { id, row: self.rows, vocabulary })?;
            if *count == 0 {
                self.seen.push(id);
            }
            *count += 1;
        }
        self.seen[first_new..].sort_unstable();
        self.rows += 1;
        Ok(())
    }

    /// Different tokens seen.
    pub fn distinct(&self) -> usize {
        self.seen.len()
    }

    /// Supervised tokens in all.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Seen ids with their counts, in the order in which they were first seen.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u64)> {
        self.seen.iter().map(|&id| (id, self.counts[id as usize]))
    }
}

impl VocabMap {
    /// The `draft_vocab_size` most frequent tokens; of equally frequent ones those seen first.
    pub fn build(counts: &TokenCounts, draft_vocab_size: usize, unseen: Unseen) -> Result<Self> {
        let (draft, target, seen) = (draft_vocab_size, counts.counts.len(), counts.distinct());
        if draft > target {
            return Err(Error::DraftVocabularyTooLarge { draft, target });
        }
        if draft > seen && unseen == Unseen::Refuse {
            return Err(Error::DraftVocabularyUnseen { draft, seen });
        }
        let mut t2d = vec![false; target];
        for id in most_frequent(counts, draft) {
            t2d[id as usize] = true;
        }
        // The smallest free ids; there are enough of them below `draft`.
        let missing = draft.saturating_sub(seen);
        t2d.iter_mut().filter(|taken| !**taken).take(missing).for_each(|taken| *taken = true);
        Ok(Self { d2t: offsets(&t2d), t2d })
    }

    /// Reads the two tables of a checkpoint; they must describe the same tokens.
    pub fn from_tables(d2t: Vec<i64>, t2d: Vec<bool>) -> Result<Self> {
        if d2t == offsets(&t2d) {
            return Ok(Self { d2t, t2d });
        }
        let expected = t2d.iter().filter(|taken| **taken).count();
        let message =
            format!("d2t of {} entries does not list the {expected} tokens of t2d in order", d2t.len());
        Err(Error::VocabMap { message })
    }

    /// Number of draft ids.
    pub fn draft_vocab_size(&self) -> usize {
        self.d2t.len()
    }

    /// Number of target ids.
    pub fn target_vocab_size(&self) -> usize {
        self.t2d.len()
    }

    /// Target ids of the draft ids, ascending.
    pub fn target_ids(&self) -> impl Iterator<Item = u32> {
        self.d2t.iter().enumerate().map(|(draft, offset)| (draft as i64 + offset) as u32)
    }

    /// Share of the supervised tokens that the draft vocabulary has; 1 when there are none.
    pub fn coverage(&self, counts: &TokenCounts) -> f64 {
        let covered: u64 = self.target_ids().map(|id| counts.counts[id as usize]).sum();
        let total = counts.total();
        if total == 0 { 1.0 } else { covered as f64 / total as f64 }
    }
}

/// The `number` most frequent ids, in no particular order: a selection, not a sort.
fn most_frequent(counts: &TokenCounts, number: usize) -> Vec<u32> {
    let mut ranked: Vec<(Reverse<u64>, usize, u32)> =
        counts.iter().enumerate().map(|(order, (id, count))| (Reverse(count), order, id)).collect();
    if (1..ranked.len()).contains(&number) {
        ranked.select_nth_unstable(number - 1);
    }
    ranked.into_iter().take(number).map(|(_, _, id)| id).collect()
}

fn offsets(t2d: &[bool]) -> Vec<i64> {
    let taken = t2d.iter().enumerate().filter(|(_, taken)| **taken);
    taken.enumerate().map(|(draft, (target, _))| target as i64 - draft as i64).collect()
}
