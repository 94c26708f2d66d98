//! A group of one rank: what operations between ranks do must then be what they do without any.

use std::sync::Arc;

use crate::{Combine, Group, Result, Tensor};

#[derive(Debug)]
struct Alone;

/// The group.
pub(crate) fn alone() -> Arc<dyn Group> {
    Arc::new(Alone)
}

impl Group for Alone {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn all_reduce(&self, _: &mut Tensor, _: Combine) -> Result<()> {
        Ok(())
    }
    fn reduce_scatter(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }
    fn all_gather(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }
    fn all_to_all(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }
    fn broadcast(&self, _: &mut Tensor, _: usize) -> Result<()> {
        Ok(())
    }
    fn send(&self, _: &Tensor, _: usize) -> Result<()> {
        Ok(())
    }
    fn receive(&self, _: &mut Tensor, _: usize) -> Result<()> {
        Ok(())
    }
    fn exchange(&self, x: &Tensor, _: usize, _: usize) -> Result<Tensor> {
        Ok(x.clone())
    }
    fn barrier(&self) -> Result<()> {
        Ok(())
    }
    fn split(&self, _: usize) -> Result<Arc<dyn Group>> {
        Ok(alone())
    }
}
