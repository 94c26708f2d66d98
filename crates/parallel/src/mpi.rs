//! Ranks that are processes, by MPI: tensors in host memory. MPI itself ends all processes when one of them dies.

#![expect(
    unsafe_code,
    reason = "handles of communicators may be used by one thread at a time, which a lock ensures"
)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::mpi::Threading;
use ::mpi::collective::{CommunicatorCollectives, Root, SystemOperation};
use ::mpi::point_to_point::{Destination, Source, send_receive_into};
use ::mpi::topology::{Communicator, SimpleCommunicator};
use specforge_tensor::{Combine, DType, Device, Error, Group, Result, Tensor, pieces};

use crate::watch::{Alarm, Watch};

/// Calls of MPI, one at a time.
static CALLS: Mutex<()> = Mutex::new(());

/// One rank of a communicator.
#[derive(Debug)]
struct Process {
    communicator: Shared,
    watch: Watch,
}

struct Shared(SimpleCommunicator);

// SAFETY: MPI was started with serialised threads, and every use of the handle holds `CALLS`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Communicator")
    }
}

/// Starts MPI in this process: everyone that `mpirun` has started. Once per process. `alarm` is told where a call takes
/// longer than `patience`.
pub fn start(patience: Duration, alarm: Alarm) -> Result<Arc<dyn Group>> {
    let failed = |why: &str| Error::Group { op: "start of MPI", rank: 0, size: 0, why: why.to_owned() };
    let started = ::mpi::initialize_with_threading(Threading::Serialized);
    let (universe, threading) = started.ok_or_else(|| failed("it was started before"))?;
    if threading < Threading::Serialized {
        return Err(failed("this MPI was built without threads (MPI_THREAD_SERIALIZED is needed)"));
    }
    let world = universe.world();
    let place = (world.rank() as usize, world.size() as usize);
    // Ended by `finish` alone: on the way out of an error it would wait for ranks that never come.
    std::mem::forget(universe);
    Ok(Arc::new(Process { communicator: Shared(world), watch: Watch::start(place, patience, alarm) }))
}

/// Ends MPI where every rank is done; waits for all of them.
pub fn finish() {
    let _calls = lock();
    // SAFETY: it was started, and nothing is asked of it afterwards.
    unsafe { ::mpi::ffi::MPI_Finalize() };
}

/// Ends the processes of all ranks.
pub fn abort() {
    // Not under the lock: another thread of this process may be stuck in a call.
    // SAFETY: it was started; the call does not come back.
    unsafe { ::mpi::ffi::MPI_Abort(::mpi::ffi::RSMPI_COMM_WORLD, 1) };
}

fn lock() -> MutexGuard<'static, ()> {
    CALLS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    fn call<T>(&self, op: &'static str, f: impl FnOnce(&SimpleCommunicator) -> T) -> T {
        let _calls = lock();
        self.watch.during(op, || f(&self.communicator.0))
    }

    fn error(&self, op: &'static str, why: String) -> Error {
        Error::Group { op, rank: self.rank(), size: self.size(), why }
    }

    /// The elements on the host; MPI counts them in 32 bits.
    fn host(&self, op: &'static str, x: &Tensor) -> Result<Tensor> {
        if x.len() * x.dtype().size() > i32::MAX as usize {
            return Err(self.error(op, format!("{x:?} is larger than the 2 GiB that MPI takes at once")));
        }
        x.to_device(Device::Cpu)
    }

    fn check(&self, op: &'static str, other: usize) -> Result<i32> {
        if other < self.size() {
            Ok(other as i32)
        } else {
            Err(self.error(op, format!("there is no rank {other}")))
        }
    }

    /// Elements summed (or the largest taken) into as many, or into this rank's piece of them.
    fn reduce(&self, op: &'static str, x: &Tensor, how: Combine, shape: &[usize]) -> Result<Tensor> {
        let host = self.host(op, x)?;
        // bfloat16 is not a type of MPI's: summed in float32 and rounded once.
        let host = if x.dtype() == DType::Bf16 { host.cast(DType::F32)? } else { host };
        let mut sum = host.zeros_like(shape)?;
        match host.dtype() {
            DType::F32 => self.reduce_as::<f32>(op, &host, &mut sum, how),
            DType::F64 => self.reduce_as::<f64>(op, &host, &mut sum, how),
            DType::U32 => self.reduce_as::<u32>(op, &host, &mut sum, how),
            got => return Err(Error::DType { op, what: "x", expected: "F32, Bf16, F64 or U32", got }),
        }
        if x.dtype() == DType::Bf16 {
            sum.cast(DType::Bf16)?.to_device(x.device())
        } else {
            sum.to_device(x.device())
        }
    }

    fn reduce_as<T: bytemuck::Pod + ::mpi::traits::Equivalence>(
        &self,
        op: &'static str,
        x: &Tensor,
        sum: &mut Tensor,
        how: Combine,
    ) {
        let how = if how == Combine::Sum { SystemOperation::sum() } else { SystemOperation::max() };
        let from: &[T] = bytemuck::cast_slice(x.host_bytes().unwrap_or_default());
        let to: &mut [T] = bytemuck::cast_slice_mut(sum.host_bytes_mut().unwrap_or_default());
        let whole = from.len() == to.len();
        self.call(op, |c| {
            if whole { c.all_reduce_into(from, to, how) } else { c.reduce_scatter_block_into(from, to, how) }
        });
    }

    /// A call that writes over the bytes of a tensor.
    fn overwrite(
        &self,
        op: &'static str,
        x: &mut Tensor,
        f: impl FnOnce(&SimpleCommunicator, &mut [u8]),
    ) -> Result<()> {
        let mut host = self.host(op, x)?;
        let bytes = host.host_bytes_mut().unwrap_or_default();
        self.call(op, |c| f(c, bytes));
        *x = host.to_device(x.device())?;
        Ok(())
    }

    /// A call that moves bytes from a tensor into another one of this shape.
    fn moved(
        &self,
        op: &'static str,
        x: &Tensor,
        shape: &[usize],
        f: impl FnOnce(&SimpleCommunicator, &[u8], &mut [u8]),
    ) -> Result<Tensor> {
        let host = self.host(op, x)?;
        let mut came = self.host(op, &host.zeros_like(shape)?)?;
        let (from, to) = (host.host_bytes().unwrap_or_default(), came.host_bytes_mut().unwrap_or_default());
        self.call(op, |c| f(c, from, to));
        came.to_device(x.device())
    }
}

impl Group for Process {
    fn rank(&self) -> usize {
        self.communicator.0.rank() as usize
    }

    fn size(&self) -> usize {
        self.communicator.0.size() as usize
    }

    fn all_reduce(&self, x: &mut Tensor, how: Combine) -> Result<()> {
        let shape = x.shape().to_vec();
        *x = self.reduce("all-reduce", x, how, &shape)?;
        Ok(())
    }

    fn reduce_scatter(&self, x: &Tensor) -> Result<Tensor> {
        let op = "reduce-scatter";
        self.reduce(op, x, Combine::Sum, &pieces(op, x, self.size())?)
    }

    fn all_gather(&self, x: &Tensor) -> Result<Tensor> {
        let mut shape = x.shape().to_vec();
        shape[0] *= self.size();
        self.moved("all-gather", x, &shape, CommunicatorCollectives::all_gather_into)
    }

    fn all_to_all(&self, x: &Tensor) -> Result<Tensor> {
        pieces("all-to-all", x, self.size())?;
        self.moved("all-to-all", x, x.shape(), CommunicatorCollectives::all_to_all_into)
    }

    fn broadcast(&self, x: &mut Tensor, root: usize) -> Result<()> {
        let root = self.check("broadcast", root)?;
        self.overwrite("broadcast", x, |c, bytes| c.process_at_rank(root).broadcast_into(bytes))
    }

    fn send(&self, x: &Tensor, to: usize) -> Result<()> {
        let (op, to) = ("send", self.check("send", to)?);
        let host = self.host(op, x)?;
        let bytes = host.host_bytes().unwrap_or_default();
        self.call(op, |c| c.process_at_rank(to).send(bytes));
        Ok(())
    }

    fn receive(&self, x: &mut Tensor, from: usize) -> Result<()> {
        let from = self.check("receive", from)?;
        self.overwrite("receive", x, |c, bytes| {
            c.process_at_rank(from).receive_into(bytes);
        })
    }

    fn exchange(&self, x: &Tensor, to: usize, from: usize) -> Result<Tensor> {
        let (op, shape) = ("exchange", x.shape());
        let (to, from) = (self.check(op, to)?, self.check(op, from)?);
        self.moved(op, x, shape, |c, sent, came| {
            send_receive_into(sent, &c.process_at_rank(to), came, &c.process_at_rank(from));
        })
    }

    fn barrier(&self) -> Result<()> {
        self.call("barrier", SimpleCommunicator::barrier);
        Ok(())
    }

    fn split(&self, colour: usize) -> Result<Arc<dyn Group>> {
        let colour = ::mpi::topology::Color::with_value(colour as i32);
        let part = self.call("split", |c| c.split_by_color(colour));
        let part = part.ok_or_else(|| self.error("split", "MPI made no communicator".to_owned()))?;
        Ok(Arc::new(Self { communicator: Shared(part), watch: self.watch.clone() }))
    }
}
