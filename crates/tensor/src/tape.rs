//! The tape: records each operation's backward while the forward runs, and replays them in reverse.

mod finals;
mod waiting;

use std::cell::RefCell;
use std::fmt;

use finals::Finals;
pub(crate) use waiting::Product;
use waiting::{Products, Waiting};

use crate::{Grads, ParamId, Params, Result, Tensor};

/// A value on a tape: a tensor, and the node that produced it if a gradient can flow there.
#[derive(Debug, Clone)]
pub struct Var {
    value: Tensor,
    node: Option<usize>,
}

impl Var {
    /// A value that no gradient flows into.
    pub(crate) fn constant(value: Tensor) -> Self {
        Self { value, node: None }
    }

    /// The tensor.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Whether a gradient can flow into it.
    pub(crate) fn is_needed(&self) -> bool {
        self.node.is_some()
    }

    /// Rows and row width.
    pub fn rows_cols(&self) -> (usize, usize) {
        self.value.rows_cols()
    }
}

/// Where the gradient of a value goes. An operation whose backward does not read the value keeps this alone, and the
/// value may be gone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    node: Option<usize>,
    rows_cols: (usize, usize),
}

impl From<&Var> for Slot {
    fn from(var: &Var) -> Self {
        Self { node: var.node, rows_cols: var.rows_cols() }
    }
}

impl Slot {
    /// The shape of the value, seen as a matrix.
    pub(crate) fn shape(self) -> [usize; 2] {
        [self.rows_cols.0, self.rows_cols.1]
    }
}

/// The backward half of one operation; it owns what the forward saved and is used once.
pub(crate) trait Backward {
    /// Adds the gradients of the operation's inputs and parameters, given that of its output.
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()>;

    /// The parameters to whose gradients it adds.
    fn params(&self) -> Vec<ParamId> {
        Vec::new()
    }
}

/// Where a backward puts its gradients.
pub(crate) struct Sink<'p> {
    params: &'p Params,
    by_node: Vec<Option<Tensor>>,
    grads: Grads,
    products: Products,
    waiting: Vec<Waiting>,
    /// Parameters whose gradients are final: nothing may be added any more.
    closed: Vec<ParamId>,
}

impl Sink<'_> {
    /// Adds `d` to the gradient of a value; nothing where no gradient flows.
    pub(crate) fn add(&mut self, to: impl Into<Slot>, d: Tensor) -> Result<()> {
        let Some(node) = to.into().node else { return Ok(()) };
        match &mut self.by_node[node] {
            Some(sum) => sum.device().kernels().add_assign(sum, &d)?,
            empty => *empty = Some(d),
        }
        Ok(())
    }

    /// As [`Sink::add`], by an operation that can add to the gradient so far while it computes its own.
    pub(crate) fn add_onto(
        &mut self,
        to: impl Into<Slot>,
        f: impl FnOnce(Option<Tensor>) -> Result<Tensor>,
    ) -> Result<()> {
        let to = to.into();
        if to.node.is_some() {
            let sum = f(self.take(to))?;
            self.put(to, sum);
        }
        Ok(())
    }

    /// The gradient of a value so far, to be put back.
    pub(crate) fn take(&mut self, of: impl Into<Slot>) -> Option<Tensor> {
        of.into().node.and_then(|node| self.by_node[node].take())
    }

    /// Puts back what was taken, with more added to it; nothing where no gradient flows.
    pub(crate) fn put(&mut self, of: impl Into<Slot>, sum: Tensor) {
        if let Some(node) = of.into().node {
            self.by_node[node] = Some(sum);
        }
    }

    /// Adds `d` to the gradient of some columns of a value.
    pub(crate) fn add_columns(&mut self, to: impl Into<Slot>, first: usize, d: Tensor) -> Result<()> {
        let (to, width) = (to.into(), d.rows_cols().1);
        if width == to.rows_cols.1 {
            return self.add(to, d);
        }
        self.add_onto(to, |sum| {
            let mut sum = sum.map_or_else(|| Tensor::activations(d.device(), &to.shape()), Ok)?;
            d.device().kernels().add_columns(&mut sum, first..first + width, &d)?;
            Ok(sum)
        })
    }

    /// The gradient of a parameter for adding to; `None` for a frozen one.
    pub(crate) fn with_param<T>(
        &mut self,
        id: ParamId,
        f: impl FnOnce(Option<&mut Tensor>) -> Result<T>,
    ) -> Result<T> {
        if !self.params.get(id).trainable {
            return f(None);
        }
        self.expect_open(&[id]);
        self.grads.with(self.params, &[id], |grads| f(grads.first_mut()))
    }

    /// As [`Sink::params`], for an operation that writes every element where the gradients are fresh.
    pub(crate) fn fresh_params(
        &mut self,
        ids: &[ParamId],
        f: impl FnOnce(&mut [Tensor], bool) -> Result<()>,
    ) -> Result<()> {
        if ids.iter().all(|id| self.params.get(*id).trainable) {
            self.expect_open(ids);
            self.grads.with_fresh(self.params, ids, f)?;
        }
        Ok(())
    }

    /// The gradients of parameters for adding to; `f` is not called for frozen ones.
    pub(crate) fn params(
        &mut self,
        ids: &[ParamId],
        f: impl FnOnce(&mut [Tensor]) -> Result<()>,
    ) -> Result<()> {
        if ids.iter().all(|id| self.params.get(*id).trainable) && !ids.is_empty() {
            self.expect_open(ids);
            self.grads.with(self.params, ids, f)?;
        }
        Ok(())
    }
}

/// Who is told of final gradients; see [`Tape::backward_telling`].
type Told<'a> = &'a mut dyn FnMut(&[ParamId], &mut Grads) -> Result<()>;

/// A recording of operations over the parameters of one model.
pub struct Tape<'p> {
    params: &'p Params,
    /// `None` while nothing is recorded: the tape of a frozen model.
    nodes: Option<RefCell<Vec<Box<dyn Backward + 'p>>>>,
    /// Gradients so far, taken up from earlier micro-batches.
    grads: RefCell<Grads>,
    /// Gradients that terminal operations have left for their inputs.
    seeds: RefCell<Vec<(Var, Tensor)>>,
    products: RefCell<Products>,
}

impl fmt::Debug for Tape<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.nodes.as_ref().map_or(0, |n| n.borrow().len());
        write!(f, "Tape({n} operations)")
    }
}

impl<'p> Tape<'p> {
    /// A tape that records, for training.
    pub fn recording(params: &'p Params) -> Self {
        Self::accumulating(params, Grads::new())
    }

    /// A tape that records and adds to gradients of earlier micro-batches.
    pub fn accumulating(params: &'p Params, grads: Grads) -> Self {
        Self {
            params,
            nodes: Some(RefCell::default()),
            grads: RefCell::new(grads),
            seeds: RefCell::default(),
            products: RefCell::default(),
        }
    }

    /// A tape that only computes: nothing is kept alive for a backward.
    pub fn inference(params: &'p Params) -> Self {
        let (grads, seeds, products) = Default::default();
        Self { params, nodes: None, grads, seeds, products }
    }

    /// The parameters that the tape reads.
    pub fn params(&self) -> &'p Params {
        self.params
    }

    /// Whether gradients will be asked for.
    pub fn is_recording(&self) -> bool {
        self.nodes.is_some()
    }

    /// A constant: no gradient flows into it.
    pub fn input(&self, value: Tensor) -> Var {
        Var::constant(value)
    }

    /// A value whose gradient is wanted though nothing on the tape produced it; read by finite-difference tests.
    #[cfg(test)]
    pub(crate) fn leaf(&self, value: Tensor) -> Var {
        struct Leaf;
        impl Backward for Leaf {
            fn backward(self: Box<Self>, _: Tensor, _: &mut Sink<'_>) -> Result<()> {
                Ok(())
            }
        }
        self.record(value, true, || Box::new(Leaf))
    }

    /// Puts an operation's output on the tape; `backward` is built only if a gradient can flow through it.
    pub(crate) fn record(
        &self,
        value: Tensor,
        needed: bool,
        backward: impl FnOnce() -> Box<dyn Backward + 'p>,
    ) -> Var {
        let Some(nodes) = self.nodes.as_ref().filter(|_| needed) else {
            return Var { value, node: None };
        };
        let mut nodes = nodes.borrow_mut();
        nodes.push(backward());
        Var { value, node: Some(nodes.len() - 1) }
    }

    /// As [`Tape::record`], of the output of a product; `trained`: one whose weights are trained.
    pub(crate) fn record_product(
        &self,
        value: Tensor,
        needed: bool,
        trained: Option<Product>,
        backward: impl FnOnce() -> Box<dyn Backward + 'p>,
    ) -> Var {
        let output = self.record(value, needed, backward);
        if let (Some(node), Some(product)) = (output.node, trained) {
            self.products.borrow_mut().add(node, product, output.rows_cols().0);
        }
        output
    }

    /// Whether a gradient is wanted for any of these values.
    pub(crate) fn any_needed(&self, vars: &[&Var]) -> bool {
        self.is_recording() && vars.iter().any(|v| v.node.is_some())
    }

    /// Whether a gradient is wanted for a parameter.
    pub(crate) fn is_trained(&self, id: ParamId) -> bool {
        self.is_recording() && self.params.get(id).trainable
    }

    /// Lets a terminal operation write parameter gradients during the forward: it is told whether they are fresh, and
    /// then writes every element.
    pub(crate) fn with_param_grad<T>(
        &self,
        id: ParamId,
        f: impl FnOnce(Option<(&mut Tensor, bool)>) -> Result<T>,
    ) -> Result<T> {
        if !self.is_trained(id) {
            return f(None);
        }
        let mut all = self.grads.borrow_mut();
        all.with_fresh(self.params, &[id], |grads, fresh| f(grads.first_mut().map(|grad| (grad, fresh))))
    }

    /// Leaves the gradient of a terminal operation's input for [`Tape::backward`].
    pub(crate) fn seed(&self, var: &Var, d: Tensor) {
        self.seeds.borrow_mut().push((var.clone(), d));
    }

    /// Runs all recorded operations in reverse from the losses on the tape; returns the parameters' gradients.
    pub fn backward(self) -> Result<Grads> {
        self.backward_telling(|_, _| Ok(()))
    }

    /// As [`Tape::backward`], and tells of trainable parameters whose gradients are final: no operation that is left adds
    /// to them. `told` may take them out. Parameters that only the loss reads come first, before any operation, then in
    /// the reverse of the order in which operations first used them; those that nothing used are told of too.
    pub fn backward_telling(
        self,
        mut told: impl FnMut(&[ParamId], &mut Grads) -> Result<()>,
    ) -> Result<Grads> {
        let seeds = self.seeds.take();
        Ok(self.replay(seeds, &mut told)?.grads)
    }

    /// As [`Tape::backward`], from given gradients of given values.
    pub fn backward_from(self, seeds: Vec<(Var, Tensor)>) -> Result<Grads> {
        Ok(self.replay(seeds, &mut |_, _| Ok(()))?.grads)
    }

    /// The gradients that terminal operations have left, for [`Tape::backward_to`].
    #[cfg(test)]
    pub(crate) fn take_seeds(&self) -> Vec<(Var, Tensor)> {
        self.seeds.take()
    }

    /// As [`Tape::backward_from`]; also the gradients of `leaves`.
    #[cfg(test)]
    pub(crate) fn backward_to(
        self,
        seeds: Vec<(Var, Tensor)>,
        leaves: &[Var],
    ) -> Result<(Grads, Vec<Tensor>)> {
        let Sink { by_node, grads, .. } = self.replay(seeds, &mut |_, _| Ok(()))?;
        let of = |v: &Var| by_node[v.node.expect("a leaf")].clone();
        let zeros = |v: &Var| Tensor::zeros(v.value.device(), v.value.shape());
        let d = leaves.iter().map(|v| of(v).map_or_else(|| zeros(v), Ok)).collect::<Result<_>>()?;
        Ok((grads, d))
    }

    fn replay(self, seeds: Vec<(Var, Tensor)>, told: Told<'_>) -> Result<Sink<'p>> {
        let nodes = self.nodes.map(RefCell::into_inner).unwrap_or_default();
        let by_node = (0..nodes.len()).map(|_| None).collect();
        let (grads, products) = (self.grads.into_inner(), self.products.into_inner());
        let (waiting, closed) = Default::default();
        let mut sink = Sink { params: self.params, by_node, grads, products, waiting, closed };
        let finals = Finals::of(&nodes, self.params);
        sink.close(finals.at_start(), told)?;
        for (var, d) in seeds {
            sink.add(&var, d)?;
        }
        for (i, node) in nodes.into_iter().enumerate().rev() {
            let keep = cfg!(test);
            let d = if keep { sink.by_node[i].clone() } else { sink.by_node[i].take() };
            if let Some(d) = d {
                node.backward(d, &mut sink)?;
            }
            sink.close(finals.after(i), told)?;
        }
        Ok(sink)
    }
}
