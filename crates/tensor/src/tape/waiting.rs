//! Weight gradients that wait for more rows. A weight that is used again and again on few rows (test-time training) gets
//! one product over all of them instead of several that each read and write the whole float32 gradient.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Sink, Slot};
use crate::{Device, ParamId, Result, Tensor};

/// The matrices (one below the other) and the columns of them that a product multiplies by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Product {
    pub(crate) params: Vec<ParamId>,
    /// First column and end.
    pub(crate) cols: (usize, usize),
}

impl Product {
    fn columns(&self) -> Range<usize> {
        self.cols.0..self.cols.1
    }
}

/// What was multiplied by what while a tape was recorded.
#[derive(Debug, Default)]
pub(crate) struct Products {
    /// The product that made a node's value.
    of_node: BTreeMap<usize, Product>,
    /// Rows that the backward has yet to come to.
    rows: BTreeMap<Product, usize>,
}

impl Products {
    pub(super) fn add(&mut self, node: usize, product: Product, rows: usize) {
        *self.rows.entry(product.clone()).or_default() += rows;
        self.of_node.insert(node, product);
    }
}

/// Rows `[R, width]` gathered in one piece of memory.
struct Gathered {
    all: Tensor,
    used: usize,
}

impl Gathered {
    fn new(device: Device, rows: usize, width: usize) -> Result<Self> {
        Ok(Self { all: Tensor::unwritten(device, &[rows, width])?, used: 0 })
    }

    /// The next `n` rows of memory.
    fn next(&self, n: usize) -> Result<Tensor> {
        self.all.rows(self.used..self.used + n)
    }

    /// Takes rows in; those that were computed in [`Gathered::next`] are there already.
    fn take(&mut self, rows: &Tensor) -> Result<()> {
        let n = rows.rows_cols().0;
        self.next(n)?.overwrite_elsewhere(rows)?;
        self.used += n;
        Ok(())
    }

    fn rows(&self) -> Result<Tensor> {
        self.all.rows(0..self.used)
    }
}

/// A product's output gradients and inputs so far.
pub(super) struct Waiting {
    product: Product,
    capacity: usize,
    dy: Gathered,
    x: Gathered,
}

impl Sink<'_> {
    /// Adds `dyᵀ · x` to the gradients of the matrices of a product: at once, or together with later rows.
    pub(crate) fn add_wgrad(&mut self, product: &Product, dy: &Tensor, x: &Tensor) -> Result<()> {
        let n = dy.rows_cols().0;
        let place = if x.dtype() == dy.dtype() { self.waiting_for(product, n, dy)? } else { None };
        if let Some(left) = self.products.rows.get_mut(product) {
            *left = left.saturating_sub(n);
        }
        let Some(place) = place else { return self.wgrad(product, dy, x) };
        let waiting = &mut self.waiting[place];
        waiting.dy.take(dy)?;
        waiting.x.take(x)?;
        if waiting.dy.used == waiting.capacity { self.settle(place) } else { Ok(()) }
    }

    /// Where the gradient of a value should be computed so that it need not be moved to wait, if that value is the
    /// output of a product.
    pub(crate) fn room_for_gradient(&mut self, of: impl Into<Slot>, like: &Tensor) -> Result<Option<Tensor>> {
        let slot = of.into();
        let Some(product) = slot.node.and_then(|node| self.products.of_node.get(&node)).cloned() else {
            return Ok(None);
        };
        let n = slot.rows_cols.0;
        let place = self.waiting_for(&product, n, like)?;
        place.map(|place| self.waiting[place].dy.next(n)).transpose()
    }

    /// Where the next input of a product should be computed so that it need not be moved to wait.
    pub(crate) fn room_for_input(
        &mut self,
        product: &Product,
        n: usize,
        like: &Tensor,
    ) -> Result<Option<Tensor>> {
        let place = self.waiting_for(product, n, like)?;
        place.map(|place| self.waiting[place].x.next(n)).transpose()
    }

    /// The place among those waiting with room for `n` more rows; `None` where nothing is gained by waiting.
    fn waiting_for(&mut self, product: &Product, n: usize, like: &Tensor) -> Result<Option<usize>> {
        let most = like.device().kernels().wgrad_rows();
        if n == 0 || 2 * n > most || like.dtype() != like.device().storage() {
            return Ok(None);
        }
        if let Some(place) = self.waiting.iter().position(|w| w.product == *product) {
            let waiting = &self.waiting[place];
            if waiting.dy.used + n <= waiting.capacity {
                return Ok(Some(place));
            }
            self.settle(place)?;
        }
        let left = self.products.rows.get(product).copied().unwrap_or(n);
        let capacity = left.min(most / n * n);
        if capacity <= n {
            return Ok(None);
        }
        let (device, of) = (like.device(), |id: &ParamId| self.params.get(*id).value.rows_cols().0);
        let (outputs, inputs) = (product.params.iter().map(of).sum(), product.columns().len());
        let (dy, x) = (Gathered::new(device, capacity, outputs)?, Gathered::new(device, capacity, inputs)?);
        self.waiting.push(Waiting { product: product.clone(), capacity, dy, x });
        Ok(Some(self.waiting.len() - 1))
    }

    /// Computes the product that waits at a place.
    fn settle(&mut self, place: usize) -> Result<()> {
        let Waiting { product, dy, x, .. } = self.waiting.remove(place);
        self.wgrad(&product, &dy.rows()?, &x.rows()?)
    }

    /// Computes all products that still wait for one of these matrices, the first to wait first.
    pub(super) fn settle_all_of(&mut self, ids: &[ParamId]) -> Result<()> {
        let is_of = |w: &Waiting| w.product.params.iter().any(|id| ids.contains(id));
        while let Some(place) = self.waiting.iter().position(is_of) {
            self.settle(place)?;
        }
        Ok(())
    }

    fn wgrad(&mut self, product: &Product, dy: &Tensor, x: &Tensor) -> Result<()> {
        let (kernels, cols) = (dy.device().kernels(), product.columns());
        let width = self.params.get(product.params[0]).value.rows_cols().1;
        if cols == (0..width) {
            return self
                .fresh_params(&product.params, |dw, fresh| kernels.linear_wgrad(dy, x, dw, cols, fresh));
        }
        self.params(&product.params, |dw| kernels.linear_wgrad(dy, x, dw, cols, false))
    }
}
