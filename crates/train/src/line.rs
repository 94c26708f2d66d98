//! What a rank that trains and one that has the target say to each other, where these are not the same: the first asks,
//! the second answers, one request at a time.

use std::sync::Arc;

use specforge_parallel::{receive_numbers, send_numbers};
use specforge_tensor::{DType, Device, Error, Group, Tensor};

use crate::Result;

/// What a rank that trains asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// The features of these rows, which may be none.
    Rows(Vec<usize>),
    /// Decoding of prompts with the draft whose weights follow: a few of them, or the `whole` measure.
    Decode { whole: bool },
    /// Nothing any more.
    End,
}

impl Request {
    fn numbers(&self) -> Vec<u32> {
        match self {
            Self::Rows(rows) => [0].into_iter().chain(rows.iter().map(|row| *row as u32)).collect(),
            Self::Decode { whole } => vec![1, u32::from(*whole)],
            Self::End => vec![2],
        }
    }

    pub(crate) fn from_numbers(numbers: &[u32]) -> Option<Self> {
        match numbers {
            [0, rows @ ..] => Some(Self::Rows(rows.iter().map(|row| *row as usize).collect())),
            [1, whole] => Some(Self::Decode { whole: *whole > 0 }),
            [2] => Some(Self::End),
            _ => None,
        }
    }
}

/// One end of the line between two ranks.
#[derive(Debug, Clone)]
pub struct Line {
    /// A group that both are in, and that is used for nothing else.
    pub group: Arc<dyn Group>,
    /// The number of the rank at the other end.
    pub other: usize,
    /// Where tensors that go over it lie.
    pub device: Device,
}

impl Line {
    /// Has the other end decode with the weights of a draft, in the order of its trained parameters: its figures.
    pub fn decode(&self, whole: bool, weights: &[Tensor]) -> Result<Vec<f64>> {
        self.ask(&Request::Decode { whole })?;
        weights.iter().try_for_each(|weight| self.send(weight))?;
        let words = receive_numbers(self.group.as_ref(), self.device, self.other)?;
        let figure = |pair: &[u32]| f64::from_bits(u64::from(pair[0]) | u64::from(pair[1]) << 32);
        Ok(words.chunks_exact(2).map(figure).collect())
    }

    /// Says that nothing will be asked for any more; returns when that has been heard.
    pub fn end(&self) -> Result<()> {
        self.ask(&Request::End)?;
        Ok(self.device.synchronize()?)
    }

    pub(crate) fn ask(&self, request: &Request) -> Result<()> {
        Ok(send_numbers(self.group.as_ref(), self.device, self.other, &request.numbers())?)
    }

    /// The numbers of a request.
    pub(crate) fn hear(&self) -> Result<Vec<u32>> {
        Ok(receive_numbers(self.group.as_ref(), self.device, self.other)?)
    }

    /// What decoding gave.
    pub(crate) fn tell(&self, figures: &[f64]) -> Result<()> {
        let words = figures.iter().flat_map(|figure| {
            let bits = figure.to_bits();
            [bits as u32, (bits >> 32) as u32]
        });
        let words: Vec<u32> = words.collect();
        Ok(send_numbers(self.group.as_ref(), self.device, self.other, &words)?)
    }

    pub(crate) fn send(&self, x: &Tensor) -> Result<()> {
        Ok(self.group.send(x, self.other)?)
    }

    pub(crate) fn receive(&self, x: &mut Tensor) -> Result<()> {
        Ok(self.group.receive(x, self.other)?)
    }

    /// A matrix of floats of this type that the other end sends.
    pub(crate) fn matrix(&self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let mut x = Tensor::zeros(self.device, &[1, 1])?.cast(dtype)?.unwritten_like(shape)?;
        self.receive(&mut x)?;
        Ok(x)
    }

    /// The two ranks do not do the same.
    pub(crate) fn out_of_step(&self, why: String) -> crate::Error {
        let (rank, size) = (self.group.rank(), self.group.size());
        Error::Group { op: "request", rank, size, why }.into()
    }
}
