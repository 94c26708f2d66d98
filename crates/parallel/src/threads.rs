//! Ranks that are threads of one process: for tests, and for trying a mesh without a cluster. Sums are in the order of
//! the ranks. Tensors of a device go through the host.

mod board;

use std::sync::Arc;
use std::time::Duration;

use specforge_tensor::{Combine, Device, Error, Group, Result, Tensor, pieces};

use crate::host::{combine, join, piece};
use board::Board;

/// In the error of a rank that waited for another: the cause is the other one's.
pub const ENDED: &str = "has ended";

/// One rank of a group of threads.
#[derive(Debug)]
struct Thread {
    rank: usize,
    board: Arc<Board>,
}

/// A group of `size` ranks, one for each thread to be; a rank that is waited for longer than `patience` is an error.
pub fn ranks(size: usize, patience: Duration) -> Vec<Arc<dyn Group>> {
    let board = Arc::new(Board::new(size, patience));
    (0..size).map(|rank| Arc::new(Thread { rank, board: board.clone() }) as Arc<dyn Group>).collect()
}

/// Runs `f` on `size` ranks, each a thread of its own; their results in the order of the ranks.
pub fn run<T: Send>(size: usize, patience: Duration, f: impl Fn(Arc<dyn Group>) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let f = &f;
        let running: Vec<_> =
            ranks(size, patience).into_iter().map(|rank| scope.spawn(move || f(rank))).collect();
        let ended = running.into_iter().map(std::thread::ScopedJoinHandle::join);
        ended.map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

impl Thread {
    /// The tensors of all ranks, on the host.
    fn meet(&self, op: &'static str, x: &Tensor) -> Result<Vec<Tensor>> {
        let met = self.board.meet(op, self.rank, x.to_device(Device::Cpu)?);
        Ok(met.map_err(|why| self.error(op, why))?.0)
    }

    fn error(&self, op: &'static str, why: String) -> Error {
        Error::Group { op, rank: self.rank, size: self.size(), why }
    }

    fn check(&self, op: &'static str, other: usize) -> Result<()> {
        let why = || format!("there is no rank {other}");
        if other < self.size() { Ok(()) } else { Err(self.error(op, why())) }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.board.leave(self.rank);
    }
}

impl Group for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.board.size()
    }

    fn all_reduce(&self, x: &mut Tensor, how: Combine) -> Result<()> {
        let all = self.meet("all-reduce", x)?;
        *x = combine(&all, how)?.to_device(x.device())?;
        Ok(())
    }

    fn reduce_scatter(&self, x: &Tensor) -> Result<Tensor> {
        let shape = pieces("reduce-scatter", x, self.size())?;
        let all = self.meet("reduce-scatter", x)?;
        let own = |x: &Tensor| piece(x, self.rank, self.size(), &shape);
        combine(&all.iter().map(own).collect::<Result<Vec<_>>>()?, Combine::Sum)?.to_device(x.device())
    }

    fn all_gather(&self, x: &Tensor) -> Result<Tensor> {
        join(&self.meet("all-gather", x)?)?.to_device(x.device())
    }

    fn all_to_all(&self, x: &Tensor) -> Result<Tensor> {
        let shape = pieces("all-to-all", x, self.size())?;
        let all = self.meet("all-to-all", x)?;
        let for_me = |x: &Tensor| piece(x, self.rank, self.size(), &shape);
        join(&all.iter().map(for_me).collect::<Result<Vec<_>>>()?)?.to_device(x.device())
    }

    fn broadcast(&self, x: &mut Tensor, root: usize) -> Result<()> {
        self.check("broadcast", root)?;
        let all = self.meet("broadcast", x)?;
        *x = all[root].to_device(x.device())?;
        Ok(())
    }

    fn send(&self, x: &Tensor, to: usize) -> Result<()> {
        self.check("send", to)?;
        self.board.post(self.rank, to, x.to_device(Device::Cpu)?);
        Ok(())
    }

    fn receive(&self, x: &mut Tensor, from: usize) -> Result<()> {
        self.check("receive", from)?;
        let came = self.board.fetch(from, self.rank).map_err(|why| self.error("receive", why))?;
        if came.dtype() != x.dtype() || came.shape() != x.shape() {
            let why = format!("rank {from} sent {came:?} where {x:?} is expected");
            return Err(self.error("receive", why));
        }
        *x = came.to_device(x.device())?;
        Ok(())
    }

    fn exchange(&self, x: &Tensor, to: usize, from: usize) -> Result<Tensor> {
        self.send(x, to)?;
        let mut came = x.clone();
        self.receive(&mut came, from)?;
        Ok(came)
    }

    fn barrier(&self) -> Result<()> {
        self.meet("barrier", &Tensor::from_u32(Device::Cpu, Vec::new())).map(|_| ())
    }

    fn split(&self, colour: usize) -> Result<Arc<dyn Group>> {
        let own = Tensor::from_u32(Device::Cpu, vec![colour as u32]);
        let met = self.board.meet("split", self.rank, own);
        let (colours, round) = met.map_err(|why| self.error("split", why))?;
        let same = |x: &Tensor| x.to_u32() == [colour as u32];
        let rank = colours[..self.rank].iter().filter(|c| same(c)).count();
        let size = colours.iter().filter(|c| same(c)).count();
        Ok(Arc::new(Self { rank, board: self.board.part(round, colour, size) }))
    }
}
