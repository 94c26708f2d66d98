//! Gradients of parameters, accumulated in float32 over micro-batches.

use crate::{ParamId, Params, Result, Tensor};

/// One float32 gradient per trainable parameter that something depended on.
#[derive(Debug, Default)]
pub struct Grads {
    by_param: Vec<Option<Tensor>>,
}

impl Grads {
    /// No gradients yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The gradient of a parameter, if anything contributed to it.
    pub fn get(&self, id: ParamId) -> Option<&Tensor> {
        self.by_param.get(id.0).and_then(Option::as_ref)
    }

    /// Takes a gradient out.
    pub fn take(&mut self, id: ParamId) -> Option<Tensor> {
        self.by_param.get_mut(id.0).and_then(Option::take)
    }

    /// Puts a gradient in, instead of what is there.
    pub fn set(&mut self, id: ParamId, grad: Tensor) {
        self.by_param.resize_with(self.by_param.len().max(id.0 + 1), || None);
        self.by_param[id.0] = Some(grad);
    }

    /// Hands out the gradients of some parameters for adding to; zeros at first use.
    pub(crate) fn with<T>(
        &mut self,
        params: &Params,
        ids: &[ParamId],
        f: impl FnOnce(&mut [Tensor]) -> Result<T>,
    ) -> Result<T> {
        self.hand_out(params, ids, true, |grads, _| f(grads))
    }

    /// As [`Grads::with`], for an operation that writes every element: told that the gradients are fresh, it need not
    /// read them. Those of parameters that are stacked lie together, as the parameters do.
    pub(crate) fn with_fresh<T>(
        &mut self,
        params: &Params,
        ids: &[ParamId],
        f: impl FnOnce(&mut [Tensor], bool) -> Result<T>,
    ) -> Result<T> {
        self.hand_out(params, ids, false, f)
    }

    fn hand_out<T>(
        &mut self,
        params: &Params,
        ids: &[ParamId],
        zeroed: bool,
        f: impl FnOnce(&mut [Tensor], bool) -> Result<T>,
    ) -> Result<T> {
        self.by_param.resize_with(params.len(), || None);
        // Part of a stack gets zeros: what the others of the stack will get is not known yet.
        let is_fresh = |id: &ParamId| {
            self.by_param[id.0].is_none() && params.stack_of(*id).iter().all(|s| ids.contains(s))
        };
        let fresh = !zeroed && ids.iter().all(is_fresh);
        for id in ids {
            if self.by_param[id.0].is_none() {
                self.start(params, params.stack_of(*id), fresh)?;
            }
        }
        let mut taken: Vec<Tensor> =
            ids.iter().map(|id| self.by_param[id.0].take().expect("just started")).collect();
        let done = f(&mut taken, fresh);
        for (id, grad) in ids.iter().zip(taken) {
            self.by_param[id.0] = Some(grad);
        }
        done
    }

    fn start(&mut self, params: &Params, ids: &[ParamId], unwritten: bool) -> Result<()> {
        let shapes: Vec<&Tensor> = ids.iter().map(|id| &params.get(*id).value).collect();
        let grads = Tensor::float32_together(&shapes, unwritten)?;
        for (id, grad) in ids.iter().zip(grads) {
            self.by_param[id.0] = Some(grad);
        }
        Ok(())
    }
}
