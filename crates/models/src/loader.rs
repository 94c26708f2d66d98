//! Declares a target's parameters under their checkpoint names and fills them from the mapped files.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use specforge_nn::weights::{Dtype, View, Weights};
use specforge_tensor::{DType, Device, Group, ParamId, Params, Split, Tensor, Weight};

use crate::pass::{Layer, Layers};
use crate::{Error, Result};

/// Where weights come from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Files.
    Files(&'a Weights),
    /// Nowhere: the device draws them, for measuring.
    Random,
}

/// Where weights come from and go to; `at` a part of the model, named as in the checkpoint.
#[derive(Debug)]
pub(crate) struct Loader<'a> {
    pub folder: &'a Path,
    pub source: Source<'a>,
    pub params: &'a mut Params,
    pub device: Device,
    /// The storage type; absent: as in the file.
    pub storage: Option<DType>,
    /// Whether the matrices of linear layers are rounded to 8-bit floats.
    pub fp8: bool,
    /// What the weights of norms are stored minus.
    pub norm_offset: f32,
    pub prefix: String,
    /// Ranks that share the matrices of layers, the embedding and the head (tensor parallel).
    pub ranks: Option<&'a Arc<dyn Group>>,
}

impl Loader<'_> {
    /// The same loader inside the part `name`.
    pub(crate) fn at(&mut self, name: &str) -> Loader<'_> {
        Loader {
            folder: self.folder,
            source: self.source,
            params: self.params,
            device: self.device,
            storage: self.storage,
            fp8: self.fp8,
            norm_offset: self.norm_offset,
            prefix: format!("{}{name}.", self.prefix),
            ranks: self.ranks,
        }
    }

    /// The decoder layers, each made of what is its own and of a loader inside it.
    pub(crate) fn layers<T, L: Layer + 'static>(
        &mut self,
        each: impl IntoIterator<Item = T>,
        new: impl Fn(T, &mut Loader<'_>) -> Result<L>,
    ) -> Result<Layers> {
        let layer = |(i, own): (usize, T)| -> Result<Box<dyn Layer>> {
            Ok(Box::new(new(own, &mut self.at(&i.to_string()))?))
        };
        each.into_iter().enumerate().map(layer).collect()
    }

    /// A linear layer `[n_out, n_in]`, with a bias `[n_out]` or without.
    pub(crate) fn linear(&mut self, name: &str, n_in: usize, n_out: usize, bias: bool) -> Result<Weight> {
        self.linear_in_order(name, n_in, n_out, bias, None)
    }

    /// As [`Loader::linear`], with row i being row `order[i]` of the file.
    fn linear_in_order(
        &mut self,
        name: &str,
        n_in: usize,
        n_out: usize,
        bias: bool,
        order: Option<&[usize]>,
    ) -> Result<Weight> {
        self.matrix(name, [n_out, n_in], bias, order, None)
    }

    /// A linear layer; where it is split by rows, so is its bias.
    fn matrix(
        &mut self,
        name: &str,
        shape: [usize; 2],
        bias: bool,
        order: Option<&[usize]>,
        split: Option<Split>,
    ) -> Result<Weight> {
        let weight = self.tensor_in_order(&format!("{name}.weight"), &shape, order, split)?;
        if self.fp8 {
            let param = self.params.get_mut(weight);
            param.value = param.value.quantize_rows()?;
        }
        let of_bias = split.filter(|split| split.rows);
        let name = format!("{name}.bias");
        let bias = bias.then(|| self.tensor_in_order(&name, &shape[..1], order, of_bias)).transpose()?;
        Ok(Weight::of(weight).with_bias(bias))
    }

    /// As [`Loader::linear`], of which ranks that share it have some outputs each, in whole pieces of `unit`: heads, or
    /// single ones. Where there are fewer pieces than ranks, neighbouring ranks have the same.
    pub(crate) fn outputs(
        &mut self,
        name: &str,
        n_in: usize,
        n_out: usize,
        unit: usize,
        bias: bool,
    ) -> Result<Weight> {
        let split = self.ranks.map(|ranks| Split::of(ranks, true, ranks.size().min(n_out / unit)));
        Ok(self.matrix(name, [n_out, n_in], bias, None, split)?.sharing_outputs(self.ranks))
    }

    /// As [`Loader::stacked`], of which ranks that share it have some outputs each, as [`Loader::outputs`] has them.
    pub(crate) fn stacked_outputs(
        &mut self,
        layers: &[(&str, usize)],
        n_in: usize,
        unit: usize,
        bias: bool,
    ) -> Result<Weight> {
        let one = |(name, n_out): &(&str, usize)| self.outputs(name, n_in, *n_out, unit, bias);
        let layers: Vec<Weight> = layers.iter().map(one).collect::<Result<_>>()?;
        let together = Weight::stacked(&layers.iter().collect::<Vec<_>>());
        self.params.stack(together.params())?;
        Ok(together)
    }

    /// As [`Loader::linear`], of which ranks that share it have some inputs each: those that are outputs of a layer
    /// before.
    pub(crate) fn inputs(&mut self, name: &str, n_in: usize, n_out: usize, bias: bool) -> Result<Weight> {
        let split = self.ranks.map(|ranks| Split::of(ranks, false, ranks.size()));
        Ok(self.matrix(name, [n_out, n_in], bias, None, split)?.sharing_inputs(self.ranks))
    }

    /// What one rank has of `n` that ranks share.
    pub(crate) fn own(&self, n: usize) -> usize {
        n / self.ranks.map_or(1, |ranks| ranks.size())
    }

    /// Linear layers of these names and output widths over the same input of width `n_in`, as one.
    pub(crate) fn stacked(&mut self, layers: &[(&str, usize)], n_in: usize, bias: bool) -> Result<Weight> {
        self.stacked_in_order(layers, &vec![None; layers.len()], n_in, bias)
    }

    /// As [`Loader::stacked`], with row i of a layer being row `order[i]` of the file where it has an order.
    pub(crate) fn stacked_in_order(
        &mut self,
        layers: &[(&str, usize)],
        orders: &[Option<&[usize]>],
        n_in: usize,
        bias: bool,
    ) -> Result<Weight> {
        let layers: Vec<Weight> = layers
            .iter()
            .zip(orders)
            .map(|((name, n_out), order)| self.linear_in_order(name, n_in, *n_out, bias, *order))
            .collect::<Result<_>>()?;
        let together = Weight::stacked(&layers.iter().collect::<Vec<_>>());
        self.params.stack(together.params())?;
        Ok(together)
    }

    /// The weight of a norm over `n` elements.
    pub(crate) fn norm(&mut self, name: &str, n: usize) -> Result<ParamId> {
        let id = self.tensor(&format!("{name}.weight"), &[n])?;
        if self.norm_offset != 0.0 {
            // Added in float32, and kept as the device computes: on the CPU no digit is lost.
            let param = self.params.get_mut(id);
            let weight = param.value.to_f32().iter().map(|w| w + self.norm_offset).collect();
            param.value = Tensor::from_f32(self.device, weight, &[n])?.cast(self.device.storage())?;
        }
        Ok(id)
    }

    /// A table, or any other tensor of a given shape, by its full name below the prefix.
    pub(crate) fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<ParamId> {
        self.tensor_in_order(name, shape, None, None)
    }

    /// As [`Loader::tensor`], of which ranks that share it have some rows each.
    pub(crate) fn table(&mut self, name: &str, shape: &[usize]) -> Result<ParamId> {
        let split = self.ranks.map(|ranks| Split::of(ranks, true, ranks.size()));
        self.tensor_in_order(name, shape, None, split)
    }

    fn tensor_in_order(
        &mut self,
        name: &str,
        shape: &[usize],
        order: Option<&[usize]>,
        split: Option<Split>,
    ) -> Result<ParamId> {
        let name = format!("{}{name}", self.prefix);
        let own = split.map_or_else(|| shape.to_vec(), |split| piece_shape(shape, split));
        let tensor = match self.source {
            Source::Files(weights) => {
                let view = weights.require(&name, shape)?;
                let moved = order.map(|order| rows_in_order(&view, order));
                let view = View { bytes: moved.as_deref().unwrap_or(view.bytes), ..view };
                // Only this rank's piece is ever read.
                let bytes = split.map_or(Cow::Borrowed(view.bytes), |split| piece(&view, split));
                self.convert(&name, &View { bytes: &bytes, shape: &own, ..view })?
            }
            Source::Random => self.draw(&own)?,
        };
        let id = self.params.add(name, tensor, false);
        self.params.get_mut(id).split = split;
        Ok(id)
    }

    /// Values that keep a forward pass in a sane range: norms near 1, matrices that keep the size of what they multiply.
    fn draw(&self, shape: &[usize]) -> Result<Tensor> {
        let seed = self.params.len() as u64;
        let std = shape.get(1).map_or(1.0, |n| (*n as f32).powf(-0.5));
        Ok(Tensor::random(self.device, shape, std, seed)?)
    }

    /// Straight from the mapped bytes to the storage type.
    fn convert(&self, name: &str, view: &View<'_>) -> Result<Tensor> {
        let stored = match view.dtype {
            Dtype::F32 | Dtype::F64 => DType::F32,
            Dtype::BF16 => DType::Bf16,
            Dtype::F16 => DType::F16,
            other => {
                let (path, tensor) = (self.folder.to_path_buf(), name.to_owned());
                return Err(Error::WeightType { path, tensor, got: other.to_string() });
            }
        };
        let storage = self.storage.unwrap_or(stored);
        let halves = || view.bytes.as_chunks::<2>().0.iter();
        Ok(match (storage, view.dtype) {
            (DType::Bf16, Dtype::BF16) => {
                let values = halves().map(|&b| bf16::from_le_bytes(b)).collect();
                Tensor::from_bf16(self.device, values, view.shape)?
            }
            (DType::F16, Dtype::F16) => {
                let values = halves().map(|&b| f16::from_le_bytes(b)).collect();
                Tensor::from_f16(self.device, values, view.shape)?
            }
            _ => Tensor::from_f32(self.device, view.to_f32(), view.shape)?.cast(storage)?,
        })
    }
}

/// The bytes of a tensor with other rows in the place of each.
fn rows_in_order(view: &View<'_>, order: &[usize]) -> Vec<u8> {
    let row = view.bytes.len() / view.shape[0];
    order.iter().flat_map(|&from| view.bytes[from * row..][..row].iter().copied()).collect()
}

/// The shape of one piece.
fn piece_shape(shape: &[usize], split: Split) -> Vec<usize> {
    let mut shape = shape.to_vec();
    let cut = if split.rows { shape.first_mut() } else { shape.last_mut() };
    if let Some(n) = cut {
        *n /= split.pieces;
    }
    shape
}

/// The bytes of one piece.
fn piece<'a>(view: &View<'a>, split: Split) -> Cow<'a, [u8]> {
    let n = view.bytes.len() / split.pieces;
    if split.rows {
        return Cow::Borrowed(&view.bytes[split.piece * n..][..n]);
    }
    let row = view.bytes.len() / view.shape[0];
    let part = row / split.pieces;
    let rows = view.bytes.chunks_exact(row);
    Cow::Owned(rows.flat_map(|row| row[split.piece * part..][..part].iter().copied()).collect())
}
