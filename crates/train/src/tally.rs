//! Figures that ranks add up: what every step needs at once, and what a line of the log needs now and then.

use specforge_methods::Ratio;
use specforge_parallel::Mesh;
use specforge_tensor::{Combine, Device, Group, Later, Tensor};

use crate::{Figures, Result};

/// What all ranks together say of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Tally {
    /// Tokens that went through.
    pub tokens: u64,
    /// Whether a rank was asked to stop.
    pub stop: bool,
}

impl Tally {
    /// Adds up over all ranks, when their devices have got there. All of them see the same stop at the same step; rows
    /// that several ranks share count once.
    pub(crate) fn over(self, mesh: &Mesh) -> Result<Later<Self>> {
        let counts = mesh.place.sequence + mesh.place.tensor == 0;
        let own = [if counts { self.tokens as f64 } else { 0.0 }, f64::from(u8::from(self.stop))];
        let mut sums = Tensor::from_f64(mesh.device, own.to_vec())?;
        mesh.world.all_reduce(&mut sums, Combine::Sum)?;
        Ok(sums.later_f64()?.map(|sums| Self { tokens: sums[0] as u64, stop: sums[1] > 0.0 }))
    }
}

impl Figures {
    /// Sums over the ranks that share batches: each counted the tokens of the whole batch.
    pub(crate) fn over_sequence(self, group: &dyn Group, device: Device) -> Result<Self> {
        if group.size() == 1 {
            return Ok(self);
        }
        let tokens = self.tokens;
        Ok(Self { tokens, ..self.over(group, device)? })
    }

    /// Sums over the ranks of a group. The first rank has rows whenever anybody has, so it knows which metrics there
    /// are; a rank without rows gets sums of the objective and of tokens alone.
    pub(crate) fn over(mut self, group: &dyn Group, device: Device) -> Result<Self> {
        let mut own = vec![self.objective.sum, self.objective.weight, self.tokens as f64];
        let ratios = self.metrics.iter().flat_map(|(_, values)| values);
        own.extend(ratios.flat_map(|ratio| [ratio.sum, ratio.weight]));
        let mut length = Tensor::from_u32(device, vec![own.len() as u32]);
        group.all_reduce(&mut length, Combine::Max)?;
        own.resize(length.to_u32()[0] as usize, 0.0);
        let mut sums = Tensor::from_f64(device, own)?;
        group.all_reduce(&mut sums, Combine::Sum)?;
        let sums = sums.later_f64()?.wait()?;
        self.objective = Ratio { sum: sums[0], weight: sums[1] };
        self.tokens = sums[2] as u64;
        let mut pairs = sums[3..].chunks_exact(2);
        for ratio in self.metrics.iter_mut().flat_map(|(_, values)| values) {
            if let Some(pair) = pairs.next() {
                *ratio = Ratio { sum: pair[0], weight: pair[1] };
            }
        }
        Ok(self)
    }
}

/// A number of the first rank, on all of them; `None` too.
pub(crate) fn from_first(
    group: &dyn Group,
    device: Device,
    own: [Option<f64>; 2],
) -> Result<[Option<f64>; 2]> {
    let coded = own.iter().flat_map(|x| [f64::from(u8::from(x.is_some())), x.unwrap_or(0.0)]).collect();
    let mut numbers = Tensor::from_f64(device, coded)?;
    group.broadcast(&mut numbers, 0)?;
    let numbers = numbers.later_f64()?.wait()?;
    let number = |i: usize| (numbers[2 * i] > 0.0).then(|| numbers[2 * i + 1]);
    Ok([number(0), number(1)])
}
