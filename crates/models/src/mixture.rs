//! Mixtures of experts (Shazeer et al., 2017) as families have them: a router, experts, and an expert that all rows
//! share. The rows are sorted by expert, so that each expert is one product over its own.

use specforge_tensor::{
    Activation, Experts, Groups, ParamId, RouterParams, Routing, Tape, Tensor, Var, Weight,
};

use crate::config::count;
use crate::loader::Loader;
use crate::mlp::{Mlp, in_chunks};
use crate::{Result, TargetInfo};

/// The names that the number of experts has.
const COUNT_KEYS: [&str; 3] = ["num_experts", "num_local_experts", "n_routed_experts"];

/// What stands behind the attention of a layer.
#[derive(Debug)]
pub(crate) enum FeedForward {
    Dense(Mlp),
    Mixture(Box<Mixture>),
}

/// The activation of experts.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ExpertGate {
    Swiglu,
    /// SwiGLU of clamped inputs, with a gate of slope `alpha`.
    Clamped {
        alpha: f32,
        limit: f32,
    },
}

/// `Σ weight · expert(x)` over the experts that the router picks, and the shared one.
#[derive(Debug)]
pub(crate) struct Mixture {
    pub router: RouterParams,
    /// `[E, 2 I, H]`: gates, then ups.
    pub gate_up: Experts,
    pub gate: ExpertGate,
    /// `[E, H, I]`.
    pub down: Experts,
    /// Whether the weight of an expert is a factor on its input instead of its output.
    pub scales_input: bool,
    /// The expert of all rows, and a gate on what it gives.
    pub shared: Option<(Mlp, Option<Weight>)>,
    /// I.
    pub width: usize,
}

/// How many experts there are, of what width, and how they are picked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MixtureShape {
    pub n_experts: usize,
    pub width: usize,
    pub rule: Routing,
}

impl From<Mlp> for FeedForward {
    fn from(mlp: Mlp) -> Self {
        Self::Dense(mlp)
    }
}

impl From<Mixture> for FeedForward {
    fn from(mixture: Mixture) -> Self {
        Self::Mixture(Box::new(mixture))
    }
}

impl FeedForward {
    /// The normed state of `h`, in the form in which it is read: a router wants all its bits.
    pub(crate) fn norm(&self, tape: &Tape<'_>, h: &Var, norm: ParamId, eps: f32) -> Result<Var> {
        Ok(match self {
            Self::Dense(mlp) => tape.rms_norm_for(h, norm, eps, mlp.first())?,
            Self::Mixture(_) => tape.rms_norm(h, norm, eps)?,
        })
    }

    /// The residual stream `h` with what is made of its normed state `x` added.
    pub(crate) fn add_to(&self, tape: &Tape<'_>, h: &Var, x: &Var) -> Result<Var> {
        match self {
            Self::Dense(mlp) => mlp.add_to(tape, h, x),
            Self::Mixture(mixture) => mixture.add_to(tape, h, x),
        }
    }
}

impl MixtureShape {
    /// Checked against each other. The number of experts has several names; those that are given have to agree.
    pub(crate) fn new(info: &TargetInfo, width: usize, rule: Routing) -> Result<Self> {
        let (key, n_experts) = count(info, &COUNT_KEYS)?;
        let one = Groups { n: 1, kept: 1, best: 1 };
        let Groups { n, kept, best } = rule.groups.unwrap_or(one);
        if n == 0 || !n_experts.is_multiple_of(n) {
            return Err(info.wrong("n_group", format!("expected a divisor of {key} = {n_experts}")));
        }
        if kept == 0 || kept > n || best > n_experts / n {
            let why = format!("expected 1 to n_group = {n}, of {} experts each", n_experts / n);
            return Err(info.wrong("topk_group", why));
        }
        let most = kept * (n_experts / n);
        if rule.top_k == 0 || rule.top_k > most {
            let why =
                format!("expected 1 to {most}, the experts that a token may pick from ({key} = {n_experts})");
            return Err(info.wrong("num_experts_per_tok", why));
        }
        Ok(Self { n_experts, width, rule })
    }
}

impl Mixture {
    /// With the names that most families have: `gate`, and `experts.N.{gate,up,down}_proj` or all experts in one tensor.
    pub(crate) fn new(info: &TargetInfo, shape: MixtureShape, loader: &mut Loader<'_>) -> Result<Self> {
        Self::named(["gate_proj", "up_proj", "down_proj"], info, shape, loader)
    }

    /// As [`Mixture::new`], with other names of gate, up and down.
    pub(crate) fn named(
        [gate, up, down]: [&str; 3],
        info: &TargetInfo,
        shape: MixtureShape,
        loader: &mut Loader<'_>,
    ) -> Result<Self> {
        let MixtureShape { n_experts: n, width: i, rule } = shape;
        let h = info.hidden_size;
        let mut experts = loader.at("experts");
        let is_stacked = experts.has("gate_up_proj");
        if !is_stacked && experts.has(&format!("{n}.{gate}.weight")) {
            let why = format!("but {} has an expert {n}", experts.prefix.trim_end_matches('.'));
            return Err(info.wrong(count(info, &COUNT_KEYS)?.0, why));
        }
        let (gate_up, down) = if is_stacked {
            (
                experts.experts_stacked("gate_up_proj", &[n, 2 * i, h])?,
                experts.experts_stacked("down_proj", &[n, h, i])?,
            )
        } else {
            (experts.experts_apart(n, &[(gate, i), (up, i)], h)?, experts.experts_apart(n, &[(down, h)], i)?)
        };
        let weight = loader.tensor("gate.weight", &[n, h])?;
        let router = RouterParams { weight, bias: None, correction: None, rule };
        let gate = ExpertGate::Swiglu;
        Ok(Self { router, gate_up, gate, down, scales_input: false, shared: None, width: i })
    }

    fn add_to(&self, tape: &Tape<'_>, h: &Var, x: &Var) -> Result<Var> {
        let widest = (2 * self.width).max(x.rows_cols().1);
        let row = widest * self.router.rule.top_k * x.value().device().storage().size();
        in_chunks(tape, row, Some(h), x, |h, x| self.chunk(tape, h, x))
    }

    fn chunk(&self, tape: &Tape<'_>, h: Option<&Var>, x: &Var) -> Result<Var> {
        let (k, device) = (self.router.rule.top_k, x.value().device());
        // 1. The experts of each row; rows sorted by expert.
        let routes = tape.route(x, &self.router)?;
        let n = routes.rows.len();
        let (rows, weights) = if self.scales_input {
            let of_slots = device.kernels().gather_rows(&routes.weights, &routes.pairs)?;
            let ones = Tensor::from_f32(device, vec![1.0; n], &[n, 1])?;
            (tape.weighted_rows(x, &routes.rows, &of_slots, 1, None)?, ones)
        } else {
            (tape.gather_rows(x, &routes.rows)?, routes.weights.clone())
        };
        // 2. Each expert's MLP over its rows.
        let gate_up = tape.linear_grouped(&rows, &self.gate_up, &routes)?;
        let y = match self.gate {
            ExpertGate::Swiglu => tape.swiglu(&gate_up)?,
            ExpertGate::Clamped { alpha, limit } => tape.swiglu_clamped(&gate_up, alpha, limit)?,
        };
        let y = tape.linear_grouped(&y, &self.down, &routes)?;
        // 3. Back in the order of rows, weighted, on the residual stream; and what all rows share.
        let h = tape.weighted_rows(&y, &routes.slots, &weights, k, h)?;
        self.add_shared(tape, h, x)
    }

    fn add_shared(&self, tape: &Tape<'_>, h: Var, x: &Var) -> Result<Var> {
        match &self.shared {
            None => Ok(h),
            Some((mlp, None)) => mlp.add_to(tape, &h, x),
            Some((mlp, Some(gate))) => {
                let (y, n) = (mlp.of(tape, x)?, x.rows_cols().0 as u32);
                let gate = tape.activated(&tape.linear(x, gate)?, Activation::Sigmoid)?;
                let rows = Tensor::from_u32(x.value().device(), (0..n).collect());
                Ok(tape.weighted_rows(&y, &rows, gate.value(), 1, Some(&h))?)
            }
        }
    }
}
