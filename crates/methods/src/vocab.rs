//! The draft vocabulary: which target tokens the draft's head can name.

use crate::{Error, Result};

/// Maps between draft and target token ids. `d2t` and `t2d` are those of the exported checkpoint: the target id of
/// draft id i is `i + d2t[i]`, and `t2d[t]` says whether target token t is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VocabMap {
    /// The target id of each draft id, ascending.
    target_ids: Vec<u32>,
    /// The draft id of each target id, `u32::MAX` for none.
    draft_ids: Vec<u32>,
}

impl VocabMap {
    /// Every token kept.
    pub fn full(vocab_size: usize) -> Self {
        let ids: Vec<u32> = (0..vocab_size as u32).collect();
        Self { target_ids: ids.clone(), draft_ids: ids }
    }

    /// From the offsets of a checkpoint; they must be ascending and inside the target's vocabulary.
    pub fn from_offsets(d2t: &[i64], vocab_size: usize) -> Result<Self> {
        let mut draft_ids = vec![u32::MAX; vocab_size];
        let mut target_ids = Vec::with_capacity(d2t.len());
        for (draft, offset) in d2t.iter().enumerate() {
            let target = draft as i64 + offset;
            let ascending = target_ids.last().is_none_or(|&last| i64::from(last) < target);
            if !ascending || target >= vocab_size as i64 || target < 0 {
                let reason = format!(
                    "entry {draft} maps to target token {target}: expected ascending ids below {vocab_size}"
                );
                return Err(Error::Weight { name: "d2t".to_owned(), reason });
            }
            draft_ids[target as usize] = draft as u32;
            target_ids.push(target as u32);
        }
        Ok(Self { target_ids, draft_ids })
    }

    /// The number of draft tokens.
    pub fn len(&self) -> usize {
        self.target_ids.len()
    }

    /// Whether the draft can name no token at all.
    pub fn is_empty(&self) -> bool {
        self.target_ids.is_empty()
    }

    /// Whether every target token is kept.
    pub fn is_full(&self) -> bool {
        self.target_ids.len() == self.draft_ids.len()
    }

    /// The target id of each draft id.
    pub fn target_ids(&self) -> &[u32] {
        &self.target_ids
    }

    /// The draft id of a target id, if the draft keeps it.
    pub fn draft_id(&self, target: u32) -> Option<u32> {
        self.draft_ids.get(target as usize).copied().filter(|&id| id != u32::MAX)
    }

    /// The checkpoint's offsets, `[Vd]`.
    pub fn d2t(&self) -> Vec<i64> {
        self.target_ids.iter().enumerate().map(|(i, &t)| i64::from(t) - i as i64).collect()
    }

    /// The checkpoint's membership mask, `[V]`.
    pub fn t2d(&self) -> Vec<bool> {
        self.draft_ids.iter().map(|&d| d != u32::MAX).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_round_trip() {
        let map = VocabMap::from_offsets(&[1, 1, 3], 8).expect("valid offsets");
        assert_eq!(map.target_ids(), [1, 2, 5]);
        assert_eq!(map.d2t(), [1, 1, 3]);
        assert_eq!(map.draft_id(5), Some(2));
        assert_eq!(map.draft_id(3), None);
        assert_eq!(map.t2d().iter().filter(|&&kept| kept).count(), 3);
    }

    #[test]
    fn damaged_offsets_are_named() {
        for d2t in [&[3, 0][..], &[0, 9], &[-1]] {
            let error = VocabMap::from_offsets(d2t, 8).expect_err("must be refused").to_string();
            assert!(error.contains("d2t") && error.contains("maps to target token"), "{error}");
        }
    }
}
