//! A tensor of a `torch.save` file: part of a storage, in any order.

use std::borrow::Cow;
use std::ops::Range;

use super::super::Dtype;

/// Where the elements of a tensor are.
#[derive(Debug, Clone)]
pub(super) struct Strided {
    dtype: Dtype,
    shape: Vec<usize>,
    /// In elements.
    strides: Vec<usize>,
    /// Bytes of the whole file from the first element to the end of the last.
    range: Range<usize>,
}

/// One tensor, still in its file.
#[derive(Debug, Clone, Copy)]
pub struct TorchTensor<'a> {
    pub(super) layout: &'a Strided,
    /// All bytes of the file.
    pub(super) file: &'a [u8],
}

impl Strided {
    /// Fails unless every element lies in the storage, and no more elements are claimed than it has.
    pub(super) fn new(
        dtype: Dtype,
        storage: Range<usize>,
        offset: usize,
        shape: Vec<usize>,
        strides: Vec<usize>,
    ) -> Result<Self, String> {
        let elements = storage.len() / dtype.size();
        let count = shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
        let last = || {
            shape.iter().zip(&strides).try_fold(offset, |at, (&extent, &stride)| {
                at.checked_add(extent.saturating_sub(1).checked_mul(stride)?)
            })
        };
        let wrong = || format!("a tensor {shape:?} at element {offset} of a storage of {elements}");
        if shape.len() != strides.len() || count.is_none_or(|count| count > elements) {
            return Err(wrong());
        }
        if count == Some(0) {
            return Ok(Self { dtype, shape, strides, range: storage.start..storage.start });
        }
        let last = last().filter(|&last| last < elements).ok_or_else(wrong)?;
        let (start, end) = (offset * dtype.size(), (last + 1) * dtype.size());
        Ok(Self { dtype, shape, strides, range: storage.start + start..storage.start + end })
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(&extent, &stride)| {
            let fits = extent == 1 || stride == expected;
            expected *= extent;
            fits
        }) || self.shape.contains(&0)
    }
}

impl<'a> TorchTensor<'a> {
    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.layout.dtype
    }

    /// Extents, outermost first; empty for a scalar.
    pub fn shape(&self) -> &'a [usize] {
        &self.layout.shape
    }

    /// Bytes of the file that are exactly the elements, if they lie in order.
    pub(in super::super) fn range(&self) -> Option<Range<usize>> {
        self.layout.is_contiguous().then(|| self.layout.range.clone())
    }

    /// The elements, row-major, little-endian; copied only if they lie in another order.
    pub fn bytes(&self) -> Cow<'a, [u8]> {
        match self.range() {
            Some(range) => Cow::Borrowed(&self.file[range]),
            None => Cow::Owned(self.gathered()),
        }
    }

    fn gathered(&self) -> Vec<u8> {
        let Strided { dtype, shape, strides, range } = self.layout;
        let (size, bytes) = (dtype.size(), &self.file[range.clone()]);
        let count: usize = shape.iter().product();
        let mut out = Vec::with_capacity(count * size);
        for element in 0..count {
            let (mut rest, mut at) = (element, 0);
            for (&extent, &stride) in shape.iter().zip(strides).rev() {
                at += rest % extent * stride;
                rest /= extent;
            }
            out.extend_from_slice(&bytes[at * size..(at + 1) * size]);
        }
        out
    }
}
