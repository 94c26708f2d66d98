//! Declares a target's parameters under their checkpoint names and fills them from the mapped files.

mod experts;
mod raw;

use std::path::Path;
use std::sync::Arc;

use specforge_nn::weights::Weights;
use specforge_tensor::{DType, Device, Group, ParamId, Params, Split, Tensor, Weight};

use crate::Result;
use crate::pass::{Layer, Layers};
use crate::quantization::Quantization;

pub(crate) use raw::ZEROS;

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
    /// How the checkpoint keeps its matrices.
    pub quantization: Quantization,
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
            quantization: self.quantization,
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

    /// The same loader, with matrices in their whole precision: for gates and other small ones.
    pub(crate) fn unrounded(&mut self) -> Loader<'_> {
        let prefix = self.prefix.clone();
        Loader { fp8: false, prefix, ..self.at("") }
    }

    /// Whether the files have a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        match self.source {
            Source::Files(weights) => weights.get(&format!("{}{name}", self.prefix)).is_some(),
            Source::Random => false,
        }
    }

    /// A linear layer `[n_out, n_in]`, with a bias `[n_out]` or without.
    pub(crate) fn linear(&mut self, name: &str, n_in: usize, n_out: usize, bias: bool) -> Result<Weight> {
        self.linear_in_order(name, n_in, n_out, bias, None)
    }

    /// As [`Loader::linear`], with row i being row `order[i]` of the file, or [`ZEROS`].
    pub(crate) fn linear_in_order(
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
        self.round(weight)?;
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
        // All of a stack are of one type.
        let fp8 = self.fp8 && layers.iter().all(|(_, n_out)| has_8_bit_products(self.own(*n_out)));
        let mut loader = Loader { fp8, ..self.unrounded() };
        let mut one = |(name, n_out): &(&str, usize)| loader.outputs(name, n_in, *n_out, unit, bias);
        let layers: Vec<Weight> = layers.iter().map(&mut one).collect::<Result<_>>()?;
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

    /// As [`Loader::linear`], with column i being column `order[i]` of the file, or [`ZEROS`].
    pub(crate) fn linear_of_columns(
        &mut self,
        name: &str,
        n_in: usize,
        n_out: usize,
        bias: bool,
        order: &[usize],
    ) -> Result<Weight> {
        let full = format!("{}{name}.weight", self.prefix);
        let tensor = match self.source {
            Source::Files(weights) => {
                let raw = self.read(weights, &full, &[n_out, n_in])?.columns_in_order(n_in, order);
                self.convert(&raw, &[n_out, order.len()], None)?
            }
            Source::Random => self.draw(&[n_out, order.len()])?,
        };
        let weight = self.params.add(full, tensor, false);
        self.round(weight)?;
        let bias = bias.then(|| self.tensor(&format!("{name}.bias"), &[n_out])).transpose()?;
        Ok(Weight::of(weight).with_bias(bias))
    }

    /// In 8 bits, if matrices are and a device's products take this one.
    fn round(&mut self, weight: ParamId) -> Result<()> {
        let param = self.params.get_mut(weight);
        let [.., n_out, n_in] = *param.value.shape() else { return Ok(()) };
        if self.fp8 && has_8_bit_products(n_out) && has_8_bit_products(n_in) {
            param.value = param.value.quantize_rows()?;
        }
        Ok(())
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
        // All of a stack are of one type.
        let fp8 = self.fp8 && layers.iter().all(|(_, n_out)| has_8_bit_products(*n_out));
        let mut loader = Loader { fp8, ..self.unrounded() };
        let layers: Vec<Weight> = layers
            .iter()
            .zip(orders)
            .map(|((name, n_out), order)| loader.linear_in_order(name, n_in, *n_out, bias, *order))
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

    /// As [`Loader::tensor`], in float32 wherever it goes: for numbers that a device's storage would blur.
    pub(crate) fn exact(&mut self, name: &str, shape: &[usize]) -> Result<ParamId> {
        let name = format!("{}{name}", self.prefix);
        let tensor = match self.source {
            Source::Files(weights) => {
                self.convert(&self.read(weights, &name, shape)?, shape, Some(DType::F32))?
            }
            Source::Random => self.draw(shape)?.cast(DType::F32)?,
        };
        Ok(self.params.add(name, tensor, false))
    }

    /// A parameter that no file has.
    pub(crate) fn constant(&mut self, name: &str, values: Vec<f32>, shape: &[usize]) -> Result<ParamId> {
        let tensor = Tensor::from_f32(self.device, values, shape)?.cast(self.device.storage())?;
        Ok(self.params.add(format!("{}{name}", self.prefix), tensor, false))
    }

    fn tensor_in_order(
        &mut self,
        name: &str,
        shape: &[usize],
        order: Option<&[usize]>,
        split: Option<Split>,
    ) -> Result<ParamId> {
        let name = format!("{}{name}", self.prefix);
        let whole = [&[order.map_or(shape[0], <[usize]>::len)], &shape[1..]].concat();
        let own = split.map_or_else(|| whole.clone(), |split| piece_shape(&whole, split));
        let tensor = match self.source {
            Source::Files(weights) => {
                let raw = self.read(weights, &name, shape)?;
                let raw = match order {
                    Some(order) => raw.rows_in_order(shape[0], order),
                    None => raw,
                };
                // Only this rank's piece is ever read.
                self.convert(&split.map_or(raw.whole(), |split| raw.piece(whole[0], split)), &own, None)?
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
        let n_in = shape.last().filter(|_| shape.len() > 1);
        let std = n_in.map_or(1.0, |n| (*n as f32).powf(-0.5));
        Ok(Tensor::random(self.device, shape, std, seed)?)
    }
}

/// Whether 8-bit products take matrices with so many rows or columns.
fn has_8_bit_products(n: usize) -> bool {
    n.is_multiple_of(16)
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
