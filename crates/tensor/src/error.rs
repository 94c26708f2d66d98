//! What can go wrong in the engine: shapes, dtypes and devices that do not fit together.

use crate::tensor::DType;

/// An error of the tensor engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two shapes that an operation needs to agree do not.
    #[error("{op}: {what} has shape {got:?}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: String,
        /// What the operation needs, in words or numbers.
        expected: String,
        /// The shape that came.
        got: Vec<usize>,
    },
    /// A tensor of the wrong element type.
    #[error("{op}: {what} is {got:?}, expected {expected}")]
    DType {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// The element types that would do.
        expected: &'static str,
        /// The element type that came.
        got: DType,
    },
    /// An index outside the tensor it points into.
    #[error("{op}: index {index} is outside the {bound} rows of {what}")]
    Index {
        /// The operation.
        op: &'static str,
        /// What is indexed.
        what: &'static str,
        /// The index.
        index: u32,
        /// The number of rows.
        bound: usize,
    },
    /// A device that this machine does not have.
    #[error("device {0:?} is not known: use \"auto\", \"cpu\", \"cuda\" or \"cuda:N\"")]
    UnknownDevice(String),
    /// The device cannot do what was asked, or failed.
    #[error(transparent)]
    Cuda(#[from] specforge_cuda::Error),
    /// A call between ranks failed: another rank is gone, late, or asks for something else.
    #[error("rank {rank} of {size}, {op}: {why}")]
    Group {
        /// The operation.
        op: &'static str,
        /// The rank that tells it, within its group.
        rank: usize,
        /// Ranks of the group.
        size: usize,
        /// What happened and which rank is the cause.
        why: String,
    },
    /// A gradient through an operation that only frozen targets use.
    #[error("{op} has no gradient: only frozen targets use it")]
    NoGradient {
        /// The operation.
        op: &'static str,
    },
    /// A shape that the CPU takes and a device's kernels do not.
    #[error("{op} on a CUDA device: {why}")]
    Unsupported {
        /// The operation.
        op: &'static str,
        /// The limit and what came.
        why: String,
    },
}

/// The result of an engine call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether device memory ran out: a smaller micro-batch may fit.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Cuda(specforge_cuda::Error::OutOfMemory { .. }))
    }

    /// A shape error; `expected` says in words or numbers what was needed.
    pub(crate) fn shape(op: &'static str, what: &str, expected: impl Into<String>, got: &[usize]) -> Self {
        Self::Shape { op, what: what.to_owned(), expected: expected.into(), got: got.to_vec() }
    }
}
