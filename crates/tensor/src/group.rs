//! The seam between ranks: what a group of them can be asked for. Implementations are in the crate `parallel`.

use std::fmt::Debug;
use std::sync::Arc;

use crate::{Error, Result, Split, Tensor};

/// How the values of several ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Combine {
    /// Their sum.
    Sum,
    /// The largest.
    Max,
}

/// Some ranks that compute together, seen from one of them.
///
/// Every rank of the group makes the same calls in the same order, with tensors of the same shape and element type
/// (float32, bfloat16, float64 or row numbers). On a device a call is asked for on its compute stream and does not wait.
/// bfloat16 is added up in float32 and rounded once where the transport allows it. The values of all ranks after a call
/// are the same bits wherever it gives all ranks the same values. A rank that is gone, late or out of step is an error
/// that names it, never a call that waits for ever.
pub trait Group: Debug + Send + Sync {
    /// This rank's number in the group, from 0.
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn size(&self) -> usize;

    /// Every rank's `x` becomes the combination of all.
    fn all_reduce(&self, x: &mut Tensor, combine: Combine) -> Result<()>;

    /// The sum of all ranks' `x [size · n, ..]`, of which rank r gets the r-th piece, `[n, ..]`.
    fn reduce_scatter(&self, x: &Tensor) -> Result<Tensor>;

    /// The `x [n, ..]` of all ranks one after the other, `[size · n, ..]`.
    fn all_gather(&self, x: &Tensor) -> Result<Tensor>;

    /// Piece i of `x [size · n, ..]` goes to rank i; piece i of the result came from rank i.
    fn all_to_all(&self, x: &Tensor) -> Result<Tensor>;

    /// Every rank's `x` becomes that of the rank `root`.
    fn broadcast(&self, x: &mut Tensor, root: usize) -> Result<()>;

    /// Sends to another rank, which must [`Group::receive`].
    fn send(&self, x: &Tensor, to: usize) -> Result<()>;

    /// Overwrites `x` with what another rank sends.
    fn receive(&self, x: &mut Tensor, from: usize) -> Result<()>;

    /// Sends `x` to one rank while a tensor like it comes from another: a step of a ring, in which all ranks call this.
    fn exchange(&self, x: &Tensor, to: usize, from: usize) -> Result<Tensor>;

    /// Returns once all ranks have called it and their devices have done what was asked of them.
    fn barrier(&self) -> Result<()>;

    /// The ranks of this group that give the same `colour`, in their order here. All ranks call this.
    fn split(&self, colour: usize) -> Result<Arc<dyn Group>>;
}

/// The ranks over which the sums of an optimizer step go, besides this one.
#[derive(Debug, Clone, Copy)]
pub struct Across<'a> {
    /// Each of them has a part of the gradients: their squares, by [`Across::share`], add up to those of the whole.
    pub squares: Option<&'a dyn Group>,
    /// Each of them has a part of the weight that gradients are divided by.
    pub weight: Option<&'a dyn Group>,
    /// Of those with squares: how many share matrices.
    pub tensor: usize,
    /// Of those with squares: how many have the same part of the same piece.
    pub copies: usize,
}

impl Default for Across<'_> {
    fn default() -> Self {
        Self { squares: None, weight: None, tensor: 1, copies: 1 }
    }
}

impl Across<'_> {
    /// The share of a rank's squares in the sum, so that what several ranks have counts once: of a parameter that ranks
    /// have a piece of each, or all of them whole.
    pub fn share(&self, split: Option<Split>) -> f64 {
        split.map_or(1, |split| split.pieces) as f64 / (self.tensor * self.copies) as f64
    }
}

/// The shape of one of `size` equal pieces of a tensor, cut along its first dimension.
pub fn pieces(op: &'static str, x: &Tensor, size: usize) -> Result<Vec<usize>> {
    match x.shape() {
        [first, rest @ ..] if first.is_multiple_of(size) => Ok([&[first / size], rest].concat()),
        shape => Err(Error::shape(op, "x", format!("[a multiple of {size}, ..]"), shape)),
    }
}
