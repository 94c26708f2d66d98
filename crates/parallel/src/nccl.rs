//! Ranks that each have a GPU, by NCCL: calls are asked for on the compute stream and waited for by nobody. A thread
//! looks whether they get done, and whether NCCL reports that another rank or the network is gone.

mod watch;

use std::sync::Arc;
use std::time::Duration;

use specforge_cuda::{Communicator, Element, Reduction};
use specforge_tensor::{Combine, DType, Device, Error, Group, Result, Tensor, pieces};

use crate::watch::Alarm;
use watch::Watch;

pub use specforge_cuda::unique_id;

/// One rank of a communicator.
#[derive(Debug)]
struct Rank {
    communicator: Arc<Communicator>,
    place: (usize, usize),
    device: Device,
    watch: Watch,
}

/// Joins the ranks that were given the same id, each on its device; waits for all. `alarm` is told of errors that come
/// later, and of calls that take longer than `patience`.
pub fn join(
    device: Device,
    id: &[u8; 128],
    place: (usize, usize),
    (patience, alarm): (Duration, Alarm),
) -> Result<Arc<dyn Group>> {
    let (rank, size) = place;
    let why = || "NCCL needs a GPU for every rank".to_owned();
    let gpu = device.gpu().ok_or_else(|| Error::Group { op: "start of NCCL", rank, size, why: why() })?;
    let watch = Watch::start(gpu, place, patience, alarm);
    let joined = watch.waiting_for("start of NCCL", || Communicator::join(gpu, id, place))?;
    let communicator = Arc::new(joined);
    watch.add(communicator.clone());
    Ok(Arc::new(Rank { communicator, place, device, watch }))
}

impl Rank {
    fn error(&self, op: &'static str, why: String) -> Error {
        Error::Group { op, rank: self.place.0, size: self.place.1, why }
    }

    /// Asks for a call and lets the watch look after it.
    fn call(&self, op: &'static str, asked: specforge_cuda::Result<()>) -> Result<()> {
        asked.map_err(|e| self.error(op, e.to_string()))?;
        self.watch.asked(op)?;
        Ok(())
    }

    fn on_device(&self, op: &'static str, address: Option<u64>) -> Result<u64> {
        address.ok_or_else(|| self.error(op, format!("the tensor is on the host, expected {}", self.device)))
    }

    fn read(&self, op: &'static str, x: &Tensor) -> Result<u64> {
        self.on_device(op, x.address()?)
    }

    fn write(&self, op: &'static str, x: &mut Tensor) -> Result<u64> {
        self.on_device(op, x.address_mut()?)
    }

    fn check(&self, op: &'static str, other: usize) -> Result<()> {
        if other < self.place.1 { Ok(()) } else { Err(self.error(op, format!("there is no rank {other}"))) }
    }
}

fn element(op: &'static str, x: &Tensor) -> Result<Element> {
    Ok(match x.dtype() {
        DType::F32 => Element::F32,
        DType::F64 => Element::F64,
        DType::Bf16 => Element::Bf16,
        DType::U32 => Element::U32,
        got => return Err(Error::DType { op, what: "x", expected: "F32, Bf16, F64 or U32", got }),
    })
}

fn bytes(x: &Tensor) -> usize {
    x.len() * x.dtype().size()
}

impl Group for Rank {
    fn rank(&self) -> usize {
        self.place.0
    }

    fn size(&self) -> usize {
        self.place.1
    }

    fn all_reduce(&self, x: &mut Tensor, how: Combine) -> Result<()> {
        let (op, n, element) = ("all-reduce", x.len(), element("all-reduce", x)?);
        let how = if how == Combine::Sum { Reduction::Sum } else { Reduction::Max };
        let at = self.write(op, x)?;
        self.call(op, self.communicator.all_reduce(at, at, n, element, how))
    }

    fn reduce_scatter(&self, x: &Tensor) -> Result<Tensor> {
        let op = "reduce-scatter";
        let mut piece = x.unwritten_like(&pieces(op, x, self.size())?)?;
        let (from, to, n) = (self.read(op, x)?, self.write(op, &mut piece)?, piece.len());
        self.call(op, self.communicator.reduce_scatter(from, to, n, element(op, x)?))?;
        Ok(piece)
    }

    fn all_gather(&self, x: &Tensor) -> Result<Tensor> {
        let (op, mut shape) = ("all-gather", x.shape().to_vec());
        shape[0] *= self.size();
        let mut all = x.unwritten_like(&shape)?;
        let (from, to) = (self.read(op, x)?, self.write(op, &mut all)?);
        self.call(op, self.communicator.all_gather(from, to, bytes(x)))?;
        Ok(all)
    }

    fn all_to_all(&self, x: &Tensor) -> Result<Tensor> {
        let op = "all-to-all";
        pieces(op, x, self.size())?;
        let mut came = x.unwritten_like(x.shape())?;
        let (from, to, piece) = (self.read(op, x)?, self.write(op, &mut came)?, bytes(x) / self.size());
        let at = |start: u64| (0..self.size()).map(move |r| (start + (r * piece) as u64, piece, r)).collect();
        let (sends, receives): (Vec<_>, Vec<_>) = (at(from), at(to));
        self.call(op, self.communicator.exchange(&sends, &receives))?;
        Ok(came)
    }

    fn broadcast(&self, x: &mut Tensor, root: usize) -> Result<()> {
        let op = "broadcast";
        self.check(op, root)?;
        let (n, at) = (bytes(x), self.write(op, x)?);
        self.call(op, self.communicator.broadcast(at, n, root))
    }

    fn send(&self, x: &Tensor, to: usize) -> Result<()> {
        self.check("send", to)?;
        let from = self.read("send", x)?;
        self.call("send", self.communicator.exchange(&[(from, bytes(x), to)], &[]))
    }

    fn receive(&self, x: &mut Tensor, from: usize) -> Result<()> {
        self.check("receive", from)?;
        let (n, to) = (bytes(x), self.write("receive", x)?);
        self.call("receive", self.communicator.exchange(&[], &[(to, n, from)]))
    }

    fn exchange(&self, x: &Tensor, to: usize, from: usize) -> Result<Tensor> {
        let op = "exchange";
        self.check(op, to)?;
        self.check(op, from)?;
        let mut came = x.unwritten_like(x.shape())?;
        let (read, write, n) = (self.read(op, x)?, self.write(op, &mut came)?, bytes(x));
        self.call(op, self.communicator.exchange(&[(read, n, to)], &[(write, n, from)]))?;
        Ok(came)
    }

    fn barrier(&self) -> Result<()> {
        let mut one = Tensor::from_u32(self.device, vec![1]);
        self.all_reduce(&mut one, Combine::Sum)?;
        self.device.synchronize()
    }

    fn split(&self, colour: usize) -> Result<Arc<dyn Group>> {
        let colours = self.all_gather(&Tensor::from_u32(self.device, vec![colour as u32]))?.to_u32();
        let same = |colours: &[u32]| colours.iter().filter(|c| **c == colour as u32).count();
        let place = (same(&colours[..self.place.0]), same(&colours));
        let part = self.watch.waiting_for("split", || self.communicator.split(colour, self.place.0));
        let communicator = Arc::new(part.map_err(|e| self.error("split", e.to_string()))?);
        self.watch.add(communicator.clone());
        Ok(Arc::new(Self { communicator, place, device: self.device, watch: self.watch.clone() }))
    }
}
