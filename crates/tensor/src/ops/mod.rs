//! The operations of the tape: shape checks, the call of the device's kernel, and what the backward keeps.

mod attention;
mod delta;
mod linear;
mod loss;
mod mixture;
mod mlp;
mod norm;
mod ranks;
mod rope;
mod rows;

pub use attention::{Attention, KeyValue};
pub use delta::Delta;
pub use linear::Weight;
pub(crate) use loss::teacher_chunks;
pub use loss::{GroupLoss, LossFigures, LossRanks, LossRows, Objective, SoftTargetLoss, Teacher};
pub use mixture::{Experts, RouterParams};
pub use ranks::RingAttention;
pub use rope::{Part, Rope};
pub use rows::Collected;

use crate::{DType, Error, Result, Tensor};

/// Fails unless `t` is a matrix (or vector) of `cols` columns.
fn expect_cols(op: &'static str, what: &str, t: &Tensor, cols: usize) -> Result<()> {
    if t.rows_cols().1 == cols {
        return Ok(());
    }
    Err(Error::shape(op, what, format!("[.., {cols}]"), t.shape()))
}

/// Fails unless `t` has `cols` columns from its column `first` on.
fn expect_cols_from(op: &'static str, what: &str, t: &Tensor, first: usize, cols: usize) -> Result<()> {
    if t.rows_cols().1 >= first + cols {
        return Ok(());
    }
    Err(Error::shape(op, what, format!("[.., {} or more]", first + cols), t.shape()))
}

/// Fails unless `t` has exactly this shape.
fn expect_shape(op: &'static str, what: &str, t: &Tensor, shape: &[usize]) -> Result<()> {
    if t.shape() == shape {
        return Ok(());
    }
    Err(Error::shape(op, what, format!("{shape:?}"), t.shape()))
}

/// Fails unless `index` holds row numbers below `bound` (or `u32::MAX`, where a row may be absent).
fn expect_rows(
    op: &'static str,
    what: &'static str,
    index: &Tensor,
    bound: usize,
    may_miss: bool,
) -> Result<()> {
    if index.dtype() != DType::U32 {
        return Err(Error::DType { op, what, expected: "U32", got: index.dtype() });
    }
    // Row numbers that a device computed are within bounds by construction.
    let rows = index.u32s().unwrap_or_default();
    let bad = rows.iter().find(|&&i| i as usize >= bound && !(may_miss && i == u32::MAX));
    bad.map_or(Ok(()), |&index| Err(Error::Index { op, what, index, bound }))
}
