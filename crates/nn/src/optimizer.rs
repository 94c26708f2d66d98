//! AdamW over the parameters of one model: averaging, clipping, the update, and the state that a checkpoint keeps.

mod config;
#[cfg(test)]
mod tests;

use specforge_tensor::{Across, AdamTensor, DType, Grads, Later, Param, ParamId, Params, Tensor};

pub use config::AdamWConfig;

/// The result of optimizer and schedule calls.
pub type Result<T> = std::result::Result<T, Error>;

/// What is wrong with the settings or with the saved state of an optimizer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting outside its range, or one that contradicts another.
    #[error("{key} = {got}: {why}")]
    Setting {
        /// The setting as the recipe names it.
        key: &'static str,
        /// Its value.
        got: String,
        /// The range, or what it contradicts and what to do.
        why: &'static str,
    },

    /// A saved state without a tensor that a trained parameter needs.
    #[error(
        "optimizer state: tensor {tensor} is missing; the checkpoint is of another model or other frozen parts"
    )]
    Missing {
        /// The tensor.
        tensor: String,
    },

    /// A saved tensor that does not fit its parameter.
    #[error(
        "optimizer state: tensor {tensor} is {got}, expected {expected}; the checkpoint is of another model"
    )]
    Mismatch {
        /// The tensor.
        tensor: String,
        /// Element type and shape that the parameter needs.
        expected: String,
        /// Element type and shape that came.
        got: String,
    },

    /// The engine.
    #[error(transparent)]
    Tensor(#[from] specforge_tensor::Error),
}

/// What one optimizer step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// The norm of all gradients together, after division by the weight and before clipping.
    pub grad_norm: f64,
    /// Whether the gradients were scaled down to the largest allowed norm.
    pub clipped: bool,
}

/// AdamW (Loshchilov and Hutter, 2019) as PyTorch computes it: bias-corrected moments, epsilon after the root,
/// decay decoupled and applied to every stepped parameter alike, norms and biases too.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    /// By parameter id; nothing for frozen parameters.
    states: Vec<Option<State>>,
    steps: u64,
}

/// What is kept of one parameter.
#[derive(Debug)]
struct State {
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    /// What the parameter's storage loses of its master weight.
    remainder: Option<Tensor>,
    /// Steps this parameter took: a parameter without a gradient is passed over, its bias correction too.
    steps: u64,
}

impl AdamW {
    /// An optimizer at its start for the trainable parameters as they are now.
    pub fn new(config: AdamWConfig, params: &Params) -> Result<Self> {
        config.check()?;
        let state = |p: &Param| p.trainable.then(|| State::new(p)).transpose();
        let states = params.iter().map(|(_, p)| state(p)).collect::<Result<_>>()?;
        Ok(Self { config, states, steps: 0 })
    }

    /// The settings.
    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One step with the learning rate `lr`. `grads` are sums; their mean is what they give divided by `weight`.
    ///
    /// Parameters without a gradient stay as they are. So does everything if the norm is not finite (overflow, or
    /// nothing to learn from: weight 0): the report says so, and whoever reads it must stop. A device reports when it
    /// has got there, so that nothing has to wait.
    pub fn step(
        &mut self,
        params: &mut Params,
        grads: &Grads,
        weight: f64,
        lr: f64,
    ) -> Result<Later<StepReport>> {
        self.step_across(params, grads, (weight, lr), &Across::default())
    }

    /// As [`AdamW::step`] with this weight and learning rate, on several ranks.
    pub fn step_across(
        &mut self,
        params: &mut Params,
        grads: &Grads,
        (weight, lr): (f64, f64),
        across: &Across<'_>,
    ) -> Result<Later<StepReport>> {
        let step = self.config.adam_step(lr, weight);
        let mut tensors = Vec::new();
        for ((id, param), state) in params.iter_mut().zip(&mut self.states) {
            if let (Some(state), Some(grad)) = (state, grads.get(id)) {
                tensors.push(state.tensor(&mut param.value, grad, across.share(param.split)));
            }
        }
        let norm = match tensors.first() {
            Some(first) => first.grad.device().kernels().adamw(&mut tensors, &step, across)?,
            None => Later::ready(0.0 / weight),
        };
        let is_skipped = norm.peek().is_some_and(|norm| !norm.is_finite());
        if !is_skipped {
            self.steps += 1;
            let stepped =
                self.states.iter_mut().zip(params.iter()).filter(|(_, (id, _))| grads.get(*id).is_some());
            stepped.filter_map(|(state, _)| state.as_mut()).for_each(|state| state.steps += 1);
        }
        let max_norm = self.config.max_grad_norm;
        Ok(norm.map(move |grad_norm| StepReport {
            grad_norm,
            clipped: max_norm > 0.0 && grad_norm.is_finite() && grad_norm + 1e-6 > max_norm,
        }))
    }

    /// Everything a checkpoint keeps besides the parameters and [`AdamW::steps`], all float32 and exact:
    /// `exp_avg.<name>`, `exp_avg_sq.<name>` (shaped like the parameter), `step.<name>` (`[1]`, the steps this
    /// parameter took) and, where its storage is not float32, `master.<name>`.
    pub fn state(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        let with_state = params.iter().zip(&self.states).filter_map(|((_, p), s)| Some((p, s.as_ref()?)));
        let named = with_state.map(|(param, state)| state.named(param)).collect::<Result<Vec<_>>>()?;
        Ok(named.into_iter().flatten().collect())
    }

    /// An optimizer that goes on from a saved state: bit for bit as if it had never stopped. `find` gives the
    /// tensors of [`AdamW::state`] by name. A parameter with a master gets the master's rounded value.
    pub fn restore(
        config: AdamWConfig,
        params: &mut Params,
        steps: u64,
        find: impl Fn(&str) -> Option<Tensor>,
    ) -> Result<Self> {
        let mut restored = Self { steps, ..Self::new(config, params)? };
        let ids: Vec<ParamId> = params.iter().map(|(id, _)| id).collect();
        for (id, state) in ids.into_iter().zip(&mut restored.states) {
            if let Some(state) = state {
                state.restore(params.get_mut(id), &find)?;
            }
        }
        Ok(restored)
    }
}

impl State {
    fn new(param: &Param) -> Result<Self> {
        let value = &param.value;
        let zeros = || Tensor::zeros(value.device(), value.shape());
        let remainder = value.device().kernels().remainder(value)?;
        Ok(Self { exp_avg: zeros()?, exp_avg_sq: zeros()?, remainder, steps: 0 })
    }

    /// The arguments of the parameter's next step.
    fn tensor<'a>(&'a mut self, param: &'a mut Tensor, grad: &'a Tensor, share: f64) -> AdamTensor<'a> {
        let Self { exp_avg, exp_avg_sq, remainder, steps } = self;
        AdamTensor {
            param,
            remainder: remainder.as_mut(),
            exp_avg,
            exp_avg_sq,
            grad,
            step: *steps + 1,
            share,
        }
    }

    fn named(&self, param: &Param) -> Result<Vec<(String, Tensor)>> {
        let named = |kind: &str, tensor: &Tensor| (format!("{kind}.{}", param.name), tensor.clone());
        let steps = Tensor::from_f32(param.value.device(), vec![self.steps as f32], &[1])?;
        let mut all = vec![
            named("exp_avg", &self.exp_avg),
            named("exp_avg_sq", &self.exp_avg_sq),
            named("step", &steps),
        ];
        if let Some(remainder) = &self.remainder {
            let master = param.value.device().kernels().master(&param.value, remainder)?;
            all.push(named("master", &master));
        }
        Ok(all)
    }

    fn restore(&mut self, param: &mut Param, find: &impl Fn(&str) -> Option<Tensor>) -> Result<()> {
        let (shape, device) = (param.value.shape().to_vec(), param.value.device());
        self.exp_avg = saved("exp_avg", &param.name, &shape, find)?.to_device(device)?;
        self.exp_avg_sq = saved("exp_avg_sq", &param.name, &shape, find)?.to_device(device)?;
        self.steps = saved("step", &param.name, &[1], find)?.f32s()[0] as u64;
        if self.remainder.is_some() {
            let master = saved("master", &param.name, &shape, find)?.to_device(device)?;
            let [value, remainder] = device.kernels().split_master(&master, param.value.dtype())?;
            param.value.assign(&value)?;
            self.remainder = Some(remainder);
        }
        Ok(())
    }
}

/// The tensor `<kind>.<name>` of a saved state, checked.
fn saved(kind: &str, name: &str, shape: &[usize], find: &impl Fn(&str) -> Option<Tensor>) -> Result<Tensor> {
    let tensor = format!("{kind}.{name}");
    let Some(found) = find(&tensor) else { return Err(Error::Missing { tensor }) };
    if found.dtype() == DType::F32 && found.shape() == shape {
        return Ok(found);
    }
    let got = format!("{:?} {:?}", found.dtype(), found.shape());
    Err(Error::Mismatch { tensor, expected: format!("F32 {shape:?}"), got })
}
