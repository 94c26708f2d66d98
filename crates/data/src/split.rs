//! The held-out split: by content, so that copies of a row are never on both sides.

use std::collections::BTreeMap;

use crate::set::Prepared;

impl Prepared {
    /// Row numbers for training and for evaluation, both ascending.
    ///
    /// Rows are ordered by a hash of the seed and their ids; the first `eval_fraction` of them (whole groups of equal
    /// rows, at least one group if the fraction is above 0) are held out. At least one group remains for training.
    pub fn split(&self, eval_fraction: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
        let mut groups: BTreeMap<[u8; 32], Vec<usize>> = BTreeMap::new();
        for (row, content) in self.rows().enumerate() {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&seed.to_le_bytes());
            hasher.update(bytemuck::cast_slice(content.ids));
            groups.entry(*hasher.finalize().as_bytes()).or_default().push(row);
        }
        let wanted = self.len() as f64 * eval_fraction.clamp(0.0, 1.0);
        let last = groups.len().saturating_sub(1);
        let (mut train, mut eval) = (Vec::new(), Vec::new());
        for (index, rows) in groups.into_values().enumerate() {
            // A group goes where it brings the number of rows held out nearest to the one wanted.
            let held_out =
                eval.len() as f64 + rows.len() as f64 / 2.0 <= wanted || (eval.is_empty() && wanted > 0.0);
            let side = if held_out && index < last { &mut eval } else { &mut train };
            side.extend(rows);
        }
        train.sort_unstable();
        eval.sort_unstable();
        (train, eval)
    }
}
