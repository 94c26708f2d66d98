//! The gated delta rule.

use specforge_cuda::Launch;

use super::launch::{at, at_mut, gpu_of, in_bf16, output};
use super::units::{DELTA, DELTA_DIMS};
use crate::kernels::{Columns, DeltaInputs};
use crate::{DType, Error, Result, Tensor};

/// `MOST` of delta.cu.
const MOST: usize = 256;

pub(super) fn rule(inputs: &DeltaInputs<'_>, states: &mut Tensor) -> Result<Tensor> {
    let s = inputs.shape;
    let known = DELTA_DIMS.iter().find(|(dim, _)| *dim == s.key_dim);
    let Some(&(_, defines)) = known.filter(|_| s.value_dim <= MOST) else {
        let (keys, values) = (s.key_dim, s.value_dim);
        let why =
            format!("keys of {keys} and values of {values} elements; there are kernels for 16, 64, 128");
        return Err(Error::Unsupported { op: "delta_rule", why });
    };
    let qkv = in_bf16(inputs.qkv)?;
    let [b, a] = [part(&inputs.b)?, part(&inputs.a)?];
    let [a_log, dt_bias] = [inputs.a_log.cast(DType::F32)?, inputs.dt_bias.cast(DType::F32)?];
    let rows = qkv.rows_cols().0;
    let out = output(&qkv, DType::Bf16, &[rows, s.value_heads * s.value_dim])?;
    if out.is_empty() {
        return Ok(out);
    }
    let bounds = pieces(&inputs.from.to_u32());
    let grid = [s.value_heads, bounds.len() - 1, 1];
    let bounds = Tensor::from_u32(qkv.device(), bounds);
    let args = args![
        at(&out)?,
        at_mut(states)?,
        at(&qkv)?,
        b.1,
        a.1,
        at(&a_log)?,
        at(&dt_bias)?,
        at(inputs.from)?,
        at(inputs.to)?,
        at(&bounds)?,
        s.key_heads as i32,
        s.value_heads as i32,
        s.value_dim as i32,
        b.2,
        a.2,
    ];
    let block = s.value_dim.next_multiple_of(32);
    let launch = Launch { unit: &DELTA, defines, kernel: "delta_rule", grid, block, shared: 0 };
    gpu_of(&qkv).launch(&launch, args)?;
    Ok(out)
}

/// A matrix in bfloat16, the address of its first column that is meant, and its width.
fn part(columns: &Columns<'_>) -> Result<(Tensor, u64, i64)> {
    let of = in_bf16(columns.of)?;
    let (first, width) = (at(&of)? + 2 * columns.first as u64, of.rows_cols().1 as i64);
    Ok((of, first, width))
}

/// Where pieces of rows begin that know nothing of each other, and the end: only state 0, which no row changes, is
/// taken up. Where rows take up states of other rows all are one piece.
fn pieces(from: &[u32]) -> Vec<u32> {
    let is_apart = from.iter().all(|&f| f == 0 || f == u32::MAX);
    let begins = (1..from.len()).filter(|&r| is_apart && from[r] == 0).map(|r| r as u32);
    std::iter::once(0).chain(begins).chain([from.len() as u32]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_pieces_and_trees_are_not() {
        assert_eq!(pieces(&[0, u32::MAX, 0, 0, u32::MAX]), [0, 2, 3, 5]);
        assert_eq!(pieces(&[0, u32::MAX, 1, 0]), [0, 4]);
        assert_eq!(pieces(&[u32::MAX, 0]), [0, 1, 2]);
    }
}
