//! Gradients of parameters, accumulated in float32 over micro-batches.

use crate::{ParamId, Params, Tensor};

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

    /// The gradient for adding to; zeros at first use.
    pub(crate) fn entry(&mut self, params: &Params, id: ParamId) -> &mut Tensor {
        if self.by_param.len() <= id.0 {
            self.by_param.resize_with(params.len(), || None);
        }
        let value = &params.get(id).value;
        self.by_param[id.0].get_or_insert_with(|| Tensor::zeros(value.device(), value.shape()))
    }
}
