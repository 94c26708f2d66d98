//! Named parameters of one model, addressed by [`ParamId`] so that modules stay plain data.

use crate::{Result, Split, Tensor};

/// A parameter's place in its [`Params`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ParamId(pub(crate) usize);

/// One named weight.
#[derive(Debug, Clone)]
pub struct Param {
    /// The checkpoint name, for example `midlayer.mlp.up_proj.weight`.
    pub name: String,
    /// The value, in the storage type of the model.
    pub value: Tensor,
    /// Whether gradients are computed for it.
    pub trainable: bool,
    /// What of a larger tensor it is, where ranks share that; checkpoints have the whole.
    pub split: Option<Split>,
}

impl Param {
    /// The shape of the whole tensor that it is of.
    pub fn whole_shape(&self) -> Vec<usize> {
        let own = self.value.shape();
        self.split.map_or_else(|| own.to_vec(), |split| split.whole_shape(own))
    }

    /// Overwrites the value with what it is of a whole tensor.
    pub fn assign_whole(&mut self, whole: &Tensor) -> Result<()> {
        match self.split {
            Some(split) => self.value.assign(&split.cut(whole)?),
            None => self.value.assign(whole),
        }
    }
}

/// The parameters of one model in declaration order.
#[derive(Debug, Clone, Default)]
pub struct Params {
    entries: Vec<Param>,
    /// Per parameter, itself and those it is stacked with.
    stacks: Vec<Vec<ParamId>>,
}

impl Params {
    /// No parameters yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Declares a parameter.
    pub fn add(&mut self, name: impl Into<String>, value: Tensor, trainable: bool) -> ParamId {
        self.entries.push(Param { name: name.into(), value, trainable, split: None });
        let id = ParamId(self.entries.len() - 1);
        self.stacks.push(vec![id]);
        id
    }

    /// Says that these matrices of one width are multiplied by the same inputs: they (and their gradients) then lie
    /// one below the other, and a device takes them as one matrix.
    pub fn stack(&mut self, ids: &[ParamId]) -> Result<()> {
        let picked: Vec<&mut Tensor> = self
            .entries
            .iter_mut()
            .enumerate()
            .filter(|(i, _)| ids.contains(&ParamId(*i)))
            .map(|(_, p)| &mut p.value)
            .collect();
        debug_assert!(ids.is_sorted(), "a stack is in declaration order");
        let mut picked = picked;
        Tensor::lay_together(&mut picked)?;
        ids.iter().for_each(|id| self.stacks[id.0] = ids.to_vec());
        Ok(())
    }

    /// A parameter and those it is stacked with, in order.
    pub(crate) fn stack_of(&self, id: ParamId) -> &[ParamId] {
        &self.stacks[id.0]
    }

    /// The parameter behind an id of this store.
    pub fn get(&self, id: ParamId) -> &Param {
        &self.entries[id.0]
    }

    /// The parameter for writing.
    pub fn get_mut(&mut self, id: ParamId) -> &mut Param {
        &mut self.entries[id.0]
    }

    /// The id of a name.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.entries.iter().position(|p| p.name == name).map(ParamId)
    }

    /// All parameters with their ids, in declaration order.
    pub fn iter(&self) -> impl Iterator<Item = (ParamId, &Param)> {
        self.entries.iter().enumerate().map(|(i, p)| (ParamId(i), p))
    }

    /// As [`Params::iter`], for writing.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (ParamId, &mut Param)> {
        self.entries.iter_mut().enumerate().map(|(i, p)| (ParamId(i), p))
    }

    /// Gives the memory of these parameters' values back; until [`Params::fill`], they have no elements.
    pub fn release(&mut self, ids: &[ParamId]) -> Result<()> {
        for id in ids {
            let value = &mut self.entries[id.0].value;
            *value = value.zeros_like(&[0])?;
        }
        Ok(())
    }

    /// Values for parameters that were released; stacks lie together again.
    pub fn fill(&mut self, values: Vec<(ParamId, Tensor)>) -> Result<()> {
        for (id, value) in values {
            self.entries[id.0].value = value;
        }
        let first =
            |(i, stack): (usize, &Vec<ParamId>)| (stack[0].0 == i && stack.len() > 1).then(|| stack.clone());
        let stacks: Vec<_> = self.stacks.iter().enumerate().filter_map(first).collect();
        stacks.iter().try_for_each(|stack| self.stack(stack))
    }

    /// The number of parameters (tensors, not elements).
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is declared.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}
