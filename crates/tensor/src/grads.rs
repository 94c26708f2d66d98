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

    /// Hands out the gradients of some parameters for adding to; zeros at first use. Those of parameters that are
    /// stacked lie together, as the parameters do.
    pub(crate) fn with<T>(
        &mut self,
        params: &Params,
        ids: &[ParamId],
        f: impl FnOnce(&mut [Tensor]) -> Result<T>,
    ) -> Result<T> {
        self.by_param.resize_with(params.len(), || None);
        for id in ids {
            if self.by_param[id.0].is_none() {
                self.start(params, params.stack_of(*id))?;
            }
        }
        let mut taken: Vec<Tensor> =
            ids.iter().map(|id| self.by_param[id.0].take().expect("just started")).collect();
        let done = f(&mut taken);
        for (id, grad) in ids.iter().zip(taken) {
            self.by_param[id.0] = Some(grad);
        }
        done
    }

    fn start(&mut self, params: &Params, ids: &[ParamId]) -> Result<()> {
        let zeros = |id: &ParamId| {
            let value = &params.get(*id).value;
            Tensor::zeros(value.device(), value.shape())
        };
        let mut grads = ids.iter().map(zeros).collect::<Result<Vec<_>>>()?;
        Tensor::lay_together(&mut grads.iter_mut().collect::<Vec<_>>())?;
        for (id, grad) in ids.iter().zip(grads) {
            self.by_param[id.0] = Some(grad);
        }
        Ok(())
    }
}
