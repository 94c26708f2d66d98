//! AdamW over the parameters of one model: averaging, clipping, the update, and the state that a checkpoint keeps.

mod config;
#[cfg(test)]
mod tests;

use specforge_tensor::{AdamStep, DType, Grads, Param, ParamId, Params, Tensor};

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
    /// The exact value, where the parameter's storage rounds it.
    master: Option<Tensor>,
    /// Steps this parameter took: a parameter without a gradient is passed over, its bias correction too.
    steps: u64,
}

impl AdamW {
    /// An optimizer at its start for the trainable parameters as they are now.
    pub fn new(config: AdamWConfig, params: &Params) -> Result<Self> {
        config.check()?;
        let states = params.iter().map(|(_, p)| p.trainable.then(|| State::new(p))).collect();
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
    /// nothing to learn from: weight 0): the report says so, and the step does not count.
    pub fn step(&mut self, params: &mut Params, grads: &Grads, weight: f64, lr: f64) -> StepReport {
        let stepped: Vec<(usize, ParamId)> = params
            .iter()
            .enumerate()
            .filter(|(_, (id, p))| p.trainable && grads.get(*id).is_some())
            .map(|(index, (id, _))| (index, id))
            .collect();
        let grad_norm = global_norm(&stepped, grads) / weight;
        if !grad_norm.is_finite() {
            return StepReport { grad_norm, clipped: false };
        }
        let clip = self.config.clip(grad_norm);
        for (index, id) in stepped {
            let state =
                self.states[index].as_mut().expect("no parameter is unfrozen after the optimizer is made");
            let grad = grads.get(id).expect("only parameters with a gradient are stepped");
            state.update(&mut params.get_mut(id).value, grad, self.config.adam_step(lr, clip / weight));
        }
        self.steps += 1;
        StepReport { grad_norm, clipped: clip < 1.0 }
    }

    /// Everything a checkpoint keeps besides the parameters and [`AdamW::steps`], all float32 and exact:
    /// `exp_avg.<name>`, `exp_avg_sq.<name>` (shaped like the parameter), `step.<name>` (`[1]`, the steps this
    /// parameter took) and, where its storage is not float32, `master.<name>`.
    pub fn state(&self, params: &Params) -> Vec<(String, Tensor)> {
        let with_state = params.iter().zip(&self.states).filter_map(|((_, p), s)| Some((p, s.as_ref()?)));
        with_state.flat_map(|(param, state)| state.named(param)).collect()
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

/// The root of the sum of squares over all gradients, in declaration order.
fn global_norm(stepped: &[(usize, ParamId)], grads: &Grads) -> f64 {
    let squares =
        stepped.iter().filter_map(|(_, id)| grads.get(*id)).map(|g| g.device().kernels().sum_squares(g));
    squares.sum::<f64>().sqrt()
}

impl State {
    fn new(param: &Param) -> Self {
        let value = &param.value;
        let zeros = || Tensor::zeros(value.device(), value.shape());
        let exact = || value.cast(DType::F32).expect("a float tensor can be widened");
        let master = (value.dtype() != DType::F32).then(exact);
        Self { exp_avg: zeros(), exp_avg_sq: zeros(), master, steps: 0 }
    }

    fn update(&mut self, param: &mut Tensor, grad: &Tensor, step: AdamStep) {
        self.steps += 1;
        let (kernels, moments) = (param.device().kernels(), [&mut self.exp_avg, &mut self.exp_avg_sq]);
        kernels.adam_step(param, self.master.as_mut(), moments, grad, AdamStep { step: self.steps, ..step });
    }

    fn named(&self, param: &Param) -> Vec<(String, Tensor)> {
        let named = |kind: &str, tensor: &Tensor| (format!("{kind}.{}", param.name), tensor.clone());
        let steps =
            Tensor::from_f32(param.value.device(), vec![self.steps as f32], &[1]).expect("one element");
        let mut all = vec![
            named("exp_avg", &self.exp_avg),
            named("exp_avg_sq", &self.exp_avg_sq),
            named("step", &steps),
        ];
        all.extend(self.master.as_ref().map(|master| named("master", master)));
        all
    }

    fn restore(&mut self, param: &mut Param, find: &impl Fn(&str) -> Option<Tensor>) -> Result<()> {
        let shape = param.value.shape().to_vec();
        self.exp_avg = saved("exp_avg", &param.name, &shape, find)?;
        self.exp_avg_sq = saved("exp_avg_sq", &param.name, &shape, find)?;
        self.steps = saved("step", &param.name, &[1], find)?.f32s()[0] as u64;
        if let Some(master) = &mut self.master {
            *master = saved("master", &param.name, &shape, find)?;
            param.value = master.cast(param.value.dtype()).expect("a parameter's storage is a float type");
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
