//! The values that a pickle builds.

use std::ops::Range;

use super::super::Dtype;
use super::names::Callable;
use super::tensor::Strided;

/// A value of a pickle; numbers are places in the list of all.
#[derive(Debug, Clone)]
pub(super) enum Node {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    Tuple(Vec<usize>),
    List(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    Callable(Callable),
    Storage(Storage),
    Tensor(Strided),
}

/// The bytes of one or more tensors.
#[derive(Debug, Clone)]
pub(super) struct Storage {
    pub(super) dtype: Dtype,
    /// Bytes of the whole file.
    pub(super) range: Range<usize>,
}
