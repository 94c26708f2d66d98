//! Mixtures of experts, and the gates around them. Only frozen targets have them: none has a gradient.

use super::{expect_cols, expect_rows, expect_shape};
use crate::kernels::{Activation, Router, Routes, Routing};
use crate::{Error, ParamId, Result, Tape, Tensor, Var};

/// The parameters of a router, and its rule.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterParams {
    /// `[E, H]`.
    pub weight: ParamId,
    /// `[E]`.
    pub bias: Option<ParamId>,
    /// `[E]`: added to the scores for picking alone.
    pub correction: Option<ParamId>,
    /// The rule.
    pub rule: Routing,
}

/// One matrix per expert, `[E, N, K]`, with biases `[E, N]` or without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// The matrices.
    pub weight: ParamId,
    /// The biases.
    pub bias: Option<ParamId>,
}

impl Tape<'_> {
    /// The experts of each row, by a router in float32.
    ///
    /// # Shapes
    /// x `[R, H]`; `R · top_k` slots.
    pub fn route(&self, x: &Var, router: &RouterParams) -> Result<Routes> {
        self.expect_frozen("route", x)?;
        let value = |id: ParamId| &self.params().get(id).value;
        let (weight, rule) = (value(router.weight), router.rule);
        expect_cols("route", "input", x.value(), weight.rows_cols().1)?;
        let n_experts = weight.rows_cols().0;
        for (what, id) in [("bias", router.bias), ("correction", router.correction)] {
            id.map_or(Ok(()), |id| expect_shape("route", what, value(id), &[n_experts]))?;
        }
        check_rule(n_experts, &rule)?;
        let (bias, correction) = (router.bias.map(value), router.correction.map(value));
        x.value().device().kernels().route(x.value(), &Router { weight, bias, correction, rule })
    }

    /// `y = x · w[e]ᵀ (+ bias[e])` of rows sorted by expert, as [`Routes::rows`] are.
    ///
    /// # Shapes
    /// x `[M, K]`, y `[M, N]`.
    pub fn linear_grouped(&self, x: &Var, experts: &Experts, routes: &Routes) -> Result<Var> {
        const OP: &str = "linear_grouped";
        self.expect_frozen(OP, x)?;
        let value = |id: ParamId| &self.params().get(id).value;
        let (w, bias) = (value(experts.weight), experts.bias.map(value));
        let &[e, n, k] = w.shape() else {
            return Err(Error::shape(OP, "weight", "[E, N, K]", w.shape()));
        };
        bias.map_or(Ok(()), |bias| expect_shape(OP, "bias", bias, &[e, n]))?;
        expect_shape(OP, "input", x.value(), &[routes.rows.len(), k])?;
        expect_shape(OP, "routes", &routes.ends, &[e])?;
        Ok(self.input(x.value().device().kernels().linear_grouped(x.value(), w, bias, &routes.ends)?))
    }

    /// `y[r] = base[r] + Σ_k weights[r, k] · x[index[r, k]]`, summed in the order of k.
    ///
    /// # Shapes
    /// x `[T, H]`, index `u32 [R·K]`, weights of `R·K` elements, base and y `[R, H]`.
    pub fn weighted_rows(
        &self,
        x: &Var,
        index: &Tensor,
        weights: &Tensor,
        k: usize,
        base: Option<&Var>,
    ) -> Result<Var> {
        const OP: &str = "weighted_rows";
        self.expect_frozen(OP, x)?;
        let (rows, h) = x.rows_cols();
        if k == 0 || !index.len().is_multiple_of(k) || weights.len() != index.len() {
            let expected = format!("{} elements, a multiple of {k}", index.len());
            return Err(Error::shape(OP, "weights", expected, weights.shape()));
        }
        expect_rows(OP, "the input", index, rows, false)?;
        if let Some(base) = base {
            self.expect_frozen(OP, base)?;
            expect_shape(OP, "base", base.value(), &[index.len() / k, h])?;
        }
        let kernels = x.value().device().kernels();
        Ok(self.input(kernels.weighted_rows(x.value(), index, weights, base.map(Var::value), k)?))
    }

    /// A function of every element.
    pub fn activated(&self, x: &Var, activation: Activation) -> Result<Var> {
        self.expect_frozen("activated", x)?;
        Ok(self.input(x.value().device().kernels().activated(x.value(), activation)?))
    }
}

fn check_rule(n_experts: usize, rule: &Routing) -> Result<()> {
    let groups = rule.groups.map_or([1, 1, 1], |g| [g.n, g.kept, g.best]);
    let [n, kept, best] = groups;
    let is_possible = n > 0 && n_experts.is_multiple_of(n) && kept <= n && best <= n_experts / n;
    if is_possible && (1..=kept * (n_experts / n)).contains(&rule.top_k) {
        return Ok(());
    }
    let expected = format!("{} of {n_experts} experts in groups of equal size", rule.top_k);
    Err(Error::shape("route", "the groups (number, kept, best)", expected, &groups))
}
