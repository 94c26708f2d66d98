//! Gradients leave for other ranks as soon as they are final, while the backward goes on.
//!
//! All ranks send in one order, also those without rows: the last declared parameter first, since parameters are
//! declared in the order in which a forward comes to them. A gradient that is final before its turn waits for it.

use specforge_tensor::{Grads, ParamId, Params, Result, Tape};

use crate::Optimizer;

/// The backward of a step with one micro-batch; alone, nothing is sent. All ranks call this.
pub fn backward(tape: Tape<'_>, optimizer: &mut Optimizer, params: &Params) -> Result<Grads> {
    if !optimizer.sends_after(true) {
        return tape.backward();
    }
    let mut sending = Sending::new(optimizer, params);
    let mut grads = tape.backward_telling(|ids, grads| sending.told(ids, grads))?;
    sending.rest(&mut grads)?;
    Ok(grads)
}

/// The gradients of one micro-batch, and of those before it that were not sent.
#[derive(Debug)]
pub(crate) struct Sending<'a> {
    optimizer: &'a mut Optimizer,
    params: &'a Params,
    /// In the order in which they are sent; the first is the next.
    left: Vec<ParamId>,
    /// How many gradients are not final yet.
    open: usize,
    is_final: Vec<ParamId>,
    /// A gradient was being sent when something failed: it is not known what of it other ranks wait for.
    pub(crate) is_broken: bool,
}

impl<'a> Sending<'a> {
    pub(crate) fn new(optimizer: &'a mut Optimizer, params: &'a Params) -> Self {
        let trained = params.iter().filter(|(_, param)| param.trainable);
        // Taken from the end.
        let left: Vec<ParamId> = trained.map(|(id, _)| id).collect();
        Self { optimizer, params, open: left.len(), left, is_final: Vec::new(), is_broken: false }
    }

    /// Sends those whose turn it is, now that these are final.
    pub(crate) fn told(&mut self, ids: &[ParamId], grads: &mut Grads) -> Result<()> {
        self.is_final.extend(ids);
        self.open -= ids.len();
        while let Some(id) = self.left.pop_if(|id| self.is_final.contains(id)) {
            self.is_broken = true;
            self.optimizer.send((id, self.params.get(id)), grads.take(id), self.open > 0)?;
            self.is_broken = false;
        }
        Ok(())
    }

    /// Sends all that are left: the backward is done, or there was none.
    pub(crate) fn rest(self, grads: &mut Grads) -> Result<()> {
        for &id in self.left.iter().rev() {
            self.optimizer.send((id, self.params.get(id)), grads.take(id), false)?;
        }
        Ok(())
    }
}
