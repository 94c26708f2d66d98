//! A named tensor as plain data: what goes into a file and comes out of one.

use std::borrow::Cow;

use half::bf16;
use specforge_nn::weights::{Dtype, View};

/// A tensor with its name, row-major, little-endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor<'a> {
    /// The name in the file.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> Tensor<'a> {
    /// Borrows the elements of a tensor in a file.
    pub fn from_view(name: &str, view: View<'a>) -> Self {
        Self {
            name: name.to_owned(),
            dtype: view.dtype,
            shape: view.shape.to_vec(),
            bytes: Cow::Borrowed(view.bytes),
        }
    }

    /// BF16, each value rounded to the nearest, ties to even.
    pub fn bf16(name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
        Self { name: name.to_owned(), dtype: Dtype::BF16, shape: shape.to_vec(), bytes: Cow::Owned(bytes) }
    }

    /// F32, unchanged.
    pub fn f32(name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.to_owned(), dtype: Dtype::F32, shape: shape.to_vec(), bytes: Cow::Owned(bytes) }
    }

    /// I64, one-dimensional: a `d2t` for example.
    pub fn i64(name: &str, values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.to_owned(), dtype: Dtype::I64, shape: vec![values.len()], bytes: Cow::Owned(bytes) }
    }

    /// BOOL, one-dimensional: a `t2d` for example.
    pub fn bool(name: &str, values: &[bool]) -> Self {
        let bytes = values.iter().map(|&value| u8::from(value)).collect();
        Self {
            name: name.to_owned(),
            dtype: Dtype::Bool,
            shape: vec![values.len()],
            bytes: Cow::Owned(bytes),
        }
    }

    /// The same tensor, looking at its own bytes.
    pub fn view(&self) -> View<'_> {
        View { dtype: self.dtype, shape: &self.shape, bytes: &self.bytes }
    }

    /// The elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        self.view().to_f32()
    }

    /// A copy that borrows nothing.
    pub fn into_owned(self) -> Tensor<'static> {
        Tensor {
            name: self.name,
            dtype: self.dtype,
            shape: self.shape,
            bytes: Cow::Owned(self.bytes.into_owned()),
        }
    }

    /// BF16 from any type of float; BF16 and the non-floats unchanged.
    pub(crate) fn floats_to_bf16(self) -> Self {
        if !self.dtype.is_float() || self.dtype == Dtype::BF16 {
            return self;
        }
        Self::bf16(&self.name, &self.shape, &self.to_f32())
    }
}
