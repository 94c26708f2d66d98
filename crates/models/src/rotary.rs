//! The rotary tables of a target, grown with the longest sequence seen, and the rows of them that a pass reads.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use specforge_nn::rope::RopeConfig;
use specforge_tensor::{Device, Tensor};

use crate::Result;

/// Cosines and sines of a pass: row r of the pass reads table row `rows[r]`.
#[derive(Debug)]
pub(crate) struct Rotary {
    pub cos: Tensor,
    pub sin: Tensor,
    /// `u32 [R]`.
    pub rows: Tensor,
}

/// One sequence of a pass.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Positions of its rows in the pass.
    pub positions: Vec<u32>,
    /// Its length: the frequencies of some kinds depend on it.
    pub len: usize,
}

/// The bits of the frequencies: two lengths that share them share a table.
type Key = Vec<u32>;

/// Tables by frequencies. What a length gets never depends on which lengths came before.
#[derive(Debug)]
pub(crate) struct RotaryTables {
    rope: RopeConfig,
    device: Device,
    grown: RwLock<BTreeMap<Key, (Tensor, Tensor)>>,
}

impl RotaryTables {
    pub(crate) fn new(rope: RopeConfig, device: Device) -> Self {
        Self { rope, device, grown: RwLock::default() }
    }

    /// The tables of the sequences of one pass, in the order of its rows.
    pub(crate) fn of(&self, sequences: &[Sequence]) -> Result<Rotary> {
        let longest = sequences.iter().map(|s| s.len).max().unwrap_or(0);
        let mut offsets: BTreeMap<Key, u32> = BTreeMap::new();
        let mut tables: Option<(Tensor, Tensor)> = None;
        let mut rows = Vec::new();
        for sequence in sequences {
            let key = self.key(sequence.len);
            let offset = if let Some(&offset) = offsets.get(&key) {
                offset
            } else {
                let offset = tables.as_ref().map_or(0, |(cos, _)| cos.rows_cols().0 as u32);
                append(&mut tables, self.table(&key, sequence.len, longest))?;
                offsets.insert(key, offset);
                offset
            };
            rows.extend(sequence.positions.iter().map(|position| position + offset));
        }
        let (cos, sin) = tables.unwrap_or_else(|| self.rope.tables(self.device, 0, 0));
        Ok(Rotary { cos, sin, rows: Tensor::from_u32(self.device, rows) })
    }

    fn key(&self, len: usize) -> Key {
        self.rope.inverse_frequencies(len).into_iter().map(f32::to_bits).collect()
    }

    /// A table of at least `n` rows with the frequencies of a sequence of `len`.
    fn table(&self, key: &Key, len: usize, n: usize) -> (Tensor, Tensor) {
        let known = self.grown.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned();
        if let Some(tables) = known.filter(|(cos, _)| cos.rows_cols().0 >= n) {
            return tables;
        }
        let tables = self.rope.tables(self.device, n.next_power_of_two(), len);
        self.grown.write().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), tables.clone());
        tables
    }
}

fn append(tables: &mut Option<(Tensor, Tensor)>, more: (Tensor, Tensor)) -> Result<()> {
    match tables {
        None => *tables = Some(more),
        Some((cos, sin)) => {
            cos.append_rows(&more.0)?;
            sin.append_rows(&more.1)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(rotary: &Rotary, r: usize) -> Vec<f32> {
        let at = rotary.rows.u32s().expect("rows")[r] as usize;
        let half = rotary.cos.rows_cols().1;
        rotary.cos.f32s()[at * half..(at + 1) * half].to_vec()
    }

    #[test]
    fn each_length_has_its_frequencies_whatever_came_before() {
        let scaling = json!({ "rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [4.0, 2.0],
                              "original_max_position_embeddings": 8 });
        let rope =
            RopeConfig::from_json(&json!({ "rope_scaling": scaling, "max_position_embeddings": 32 }), 4)
                .expect("settings");
        let sequence = |len: usize| Sequence { positions: (0..len as u32).collect(), len };
        let alone = |len| RotaryTables::new(rope.clone(), Device::Cpu).of(&[sequence(len)]).expect("tables");
        let tables = RotaryTables::new(rope.clone(), Device::Cpu);
        let mixed = tables.of(&[sequence(5), sequence(9), sequence(3)]).expect("tables");
        assert_eq!(row(&mixed, 4), row(&alone(5), 4));
        assert_eq!(row(&mixed, 5 + 4), row(&alone(9), 4));
        assert_ne!(row(&mixed, 4), row(&mixed, 5 + 4));
        assert_eq!(row(&mixed, 5 + 9 + 2), row(&alone(3), 2));
        assert_eq!(row(&tables.of(&[sequence(5)]).expect("tables"), 4), row(&alone(5), 4));
    }
}
