//! The ranks of a command: none but this process, threads of it, or processes that someone started together.

mod layout;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow, bail};
use specforge_config::{DeviceChoice, ParallelConfig, RunPlan};
use specforge_cuda::Gpu;
use specforge_models::TargetInfo;
use specforge_parallel::launch::{Placement, placement};
use specforge_parallel::rendezvous::Meeting;
use specforge_parallel::{Alarm, nccl, rendezvous, tell, threads};
use specforge_tensor::{Combine, Device, Group, Tensor};

pub(crate) use self::layout::{Apart, Layout};
use crate::show::quiet;
use crate::{env, gpu, launch, setup};

/// What a command is told of the rank it runs on.
#[derive(Debug)]
pub(crate) struct Rank {
    /// Everyone; absent where there is one rank.
    world: Option<Arc<dyn Group>>,
    /// Where tensors that go between ranks lie.
    device: Device,
}

/// How a command ended on a rank.
#[derive(Debug)]
pub(crate) enum Ending {
    /// All done.
    Done,
    /// Stopped as it was asked to; how to go on.
    Stopped(String),
}

impl Rank {
    /// Whether this rank prints, decides and writes what there is one of.
    pub(crate) fn is_first(&self) -> bool {
        self.number() == 0
    }

    /// All ranks, where there are several.
    pub(crate) fn world(&self) -> Option<Arc<dyn Group>> {
        self.world.clone()
    }

    /// Its number.
    pub(crate) fn number(&self) -> usize {
        self.world.as_ref().map_or(0, |world| world.rank())
    }

    /// How many ranks there are.
    pub(crate) fn size(&self) -> usize {
        self.world.as_ref().map_or(1, |world| world.size())
    }

    /// A count added up over all ranks.
    pub(crate) fn sum(&self, own: u64) -> Result<u64> {
        let Some(world) = &self.world else { return Ok(own) };
        let mut sum = Tensor::from_f64(self.device, vec![own as f64])?;
        world.all_reduce(&mut sum, Combine::Sum)?;
        Ok(sum.later_f64()?.wait()?[0] as u64)
    }

    /// Waits for all.
    pub(crate) fn barrier(&self) -> Result<()> {
        Ok(self.world.as_ref().map_or(Ok(()), |world| world.barrier())?)
    }

    /// On the first rank, then on the others, which find what it has left.
    pub(crate) fn first_then_others<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.is_first() {
            let done = f()?;
            self.barrier()?;
            return Ok(done);
        }
        self.barrier()?;
        f()
    }

    /// What the first rank finds out, on all.
    pub(crate) fn told(&self, find_out: impl FnOnce() -> Result<String>) -> Result<String> {
        let own = if self.is_first() { find_out()? } else { String::new() };
        match &self.world {
            Some(world) => Ok(tell(world.as_ref(), self.device, 0, &own)?),
            None => Ok(own),
        }
    }
}

fn patience(plan: &ParallelConfig) -> Duration {
    Duration::from_secs(plan.timeout)
}

/// The ranks that a command asks for.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// How many, and how they lie.
    pub(crate) parallel: ParallelConfig,
    /// What each computes on; a command is told what `auto` came to.
    pub(crate) device: DeviceChoice,
    /// CPU threads of each; 0: as many as the machine has.
    pub(crate) threads: usize,
}

/// Runs a command on all ranks of a plan whose device is not chosen yet.
pub(crate) fn run(plan: &RunPlan, command: impl Fn(RunPlan, &Rank) -> Result<Ending> + Sync) -> Result<()> {
    // Said before anything is read or anyone is started.
    if plan.parallel.of_target() > 1 {
        TargetInfo::read(&plan.target.path)?.shared_by(plan.parallel.of_target())?;
    }
    let wanted = Wanted { parallel: plan.parallel.clone(), device: plan.device, threads: plan.threads };
    on(&wanted, |device, rank| command(RunPlan { device, ..plan.clone() }, rank))
}

/// Runs a command on all ranks.
pub(crate) fn on(
    wanted: &Wanted,
    command: impl Fn(DeviceChoice, &Rank) -> Result<Ending> + Sync,
) -> Result<()> {
    launch::end_with_parent();
    let asked = layout::asked(&wanted.parallel);
    match placement(&env::launch())? {
        _ if wanted.parallel.ranks_in_process => in_threads(wanted, asked, &command),
        Some(placement) if placement.size > 1 => as_process(wanted, &placement, &command),
        _ if asked > 1 => start(wanted, asked),
        _ => {
            let device = setup::on_this_machine(wanted.device, wanted.threads)?;
            end(command(device, &Rank { world: None, device: Device::Cpu })?)
        }
    }
}

/// As [`run`], for a command that only decodes: on as many ranks as share the target, however many train.
pub(crate) fn run_decoding(
    mut plan: RunPlan,
    command: impl Fn(RunPlan, &Rank) -> Result<Ending> + Sync,
) -> Result<()> {
    let of_target = plan.parallel.of_target();
    let data = if placement(&env::launch())?.is_none() { Some(of_target) } else { None };
    let alone = ParallelConfig { data, target_tensor: Some(of_target), ..ParallelConfig::default() };
    let ParallelConfig { timeout, rendezvous, ranks_in_process, .. } = plan.parallel;
    plan.parallel = ParallelConfig { timeout, rendezvous, ranks_in_process, ..alone };
    run(&plan, command)
}

/// Ranks that nobody has started: one process per GPU of this machine.
fn start(wanted: &Wanted, asked: usize) -> Result<()> {
    let gpus = if wanted.device == DeviceChoice::Cpu { 0 } else { Gpu::count().unwrap_or(0) };
    match gpus {
        0 if wanted.device == DeviceChoice::Cuda => Gpu::count().map(|_| ()).context("device = \"cuda\""),
        0 => bail!("{}", not_started(wanted, asked)),
        _ if asked <= gpus => launch::start(asked),
        _ => bail!(
            "{asked} ranks are asked for, this machine has {gpus} GPUs: start as many processes on several \
             machines, with torchrun or srun (docs/parallel.md)"
        ),
    }
}

/// What to do where ranks are asked for that nobody has started, on CPUs.
fn not_started(wanted: &Wanted, asked: usize) -> String {
    let with = if cfg!(feature = "mpi") { "" } else { "build with --features mpi and " };
    let lies_over = wanted.parallel.of_target() > 1 || wanted.parallel.target_ranks > 0;
    let without = if lies_over { ", without target-tensor and target-ranks" } else { "" };
    format!(
        "the recipe asks for {asked} ranks, and this process was started alone: {with}run it with \
         `mpirun -n {asked} specforge ...` (device = {:?}), or set parallel.data = 1{without}",
        wanted.device
    )
}

fn end(ending: Ending) -> Result<()> {
    match ending {
        Ending::Done => Ok(()),
        Ending::Stopped(how_to_go_on) => bail!(how_to_go_on),
    }
}

/// Every rank a thread. The error to tell is the first that is not of a rank which only missed another one.
fn in_threads(
    wanted: &Wanted,
    ranks: usize,
    command: &(impl Fn(DeviceChoice, &Rank) -> Result<Ending> + Sync),
) -> Result<()> {
    let device = setup::on_this_machine(wanted.device, wanted.threads)?;
    let errors = Mutex::new(Vec::new());
    let endings = threads::run(ranks, patience(&wanted.parallel), |world| {
        quiet(world.rank() > 0);
        let number = world.rank();
        let rank = Rank { world: (ranks > 1).then_some(world), device: Device::Cpu };
        command(device, &rank).map_err(|error| {
            let error = if number == 0 { error } else { error.context(format!("rank {number} of {ranks}")) };
            errors.lock().unwrap_or_else(PoisonError::into_inner).push(error);
        })
    });
    let mut errors = errors.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !errors.is_empty() {
        let missed = |error: &Error| format!("{error:#}").contains(threads::ENDED);
        let cause = errors.iter().position(|error| !missed(error)).unwrap_or(0);
        return Err(errors.swap_remove(cause));
    }
    endings.into_iter().next().and_then(Result::ok).map_or(Ok(()), end)
}

/// This process is one of several that were started together.
fn as_process(
    wanted: &Wanted,
    placement: &Placement,
    command: &(impl Fn(DeviceChoice, &Rank) -> Result<Ending> + Sync),
) -> Result<()> {
    layout::shape(&wanted.parallel, placement.size)?;
    quiet(placement.rank > 0);
    if wanted.device != DeviceChoice::Cpu {
        gpu::choose(placement.local_rank)?;
    }
    match setup::on_this_machine(wanted.device, wanted.threads)? {
        DeviceChoice::Cuda => by_nccl(&wanted.parallel, placement, command),
        _ => by_mpi(&wanted.parallel, placement, command),
    }
}

/// Where the ranks find each other: the recipe's folder, or what the launcher says.
fn meeting(plan: &ParallelConfig, placement: &Placement) -> Result<Meeting> {
    match (&plan.rendezvous, &placement.meeting) {
        (Some(folder), _) => Ok(Meeting::Folder(folder.clone())),
        (None, Some((host, port))) => Ok(Meeting::At(host.clone(), *port)),
        (None, None) => bail!(
            "rank {} of {}, started by {:?}: MASTER_ADDR, the machine of rank 0, is not set: set it, or name a folder \
             that all ranks see as parallel.rendezvous",
            placement.rank,
            placement.size,
            placement.by
        ),
    }
}

/// Every rank with a GPU: they meet by TCP, and talk through NCCL.
fn by_nccl(
    parallel: &ParallelConfig,
    placement: &Placement,
    command: &(impl Fn(DeviceChoice, &Rank) -> Result<Ending> + Sync),
) -> Result<()> {
    let place @ (number, size) = (placement.rank, placement.size);
    let meeting = meeting(parallel, placement)?;
    let wait: (Duration, Alarm) = (patience(parallel), launch::die);
    let id = || nccl::unique_id().map(Vec::from).map_err(|e| e.to_string());
    let (id, link) = rendezvous::meet(&meeting, place, wait, id)?;
    let join = || -> Result<Ending> {
        let id: [u8; 128] = id.try_into().map_err(|_| anyhow!("what rank 0 sent is not an id of NCCL's"))?;
        let device = gpu::chosen(DeviceChoice::Cuda)?;
        let world = nccl::join(device, &id, place, wait)?;
        command(DeviceChoice::Cuda, &Rank { world: Some(world), device })
    };
    match join() {
        Ok(ending) => {
            link.leave();
            // The first rank says it for all.
            if number == 0 { end(ending) } else { Ok(()) }
        }
        Err(error) => {
            let error = error.context(format!("rank {number} of {size}"));
            link.fail(&format!("{error:#}"));
            Err(error)
        }
    }
}

#[cfg(not(feature = "mpi"))]
fn by_mpi(
    _: &ParallelConfig,
    placement: &Placement,
    _: &(impl Fn(DeviceChoice, &Rank) -> Result<Ending> + Sync),
) -> Result<()> {
    bail!(
        "this process is rank {} of {}, and on CPUs ranks reach each other by MPI, which this program was built \
         without: install MPI and build with `cargo build --release --features mpi`",
        placement.rank,
        placement.size
    )
}

#[cfg(feature = "mpi")]
fn by_mpi(
    parallel: &ParallelConfig,
    placement: &Placement,
    command: &(impl Fn(DeviceChoice, &Rank) -> Result<Ending> + Sync),
) -> Result<()> {
    use specforge_parallel::mpi;
    let world = mpi::start(patience(parallel), launch::die)?;
    let (number, size) = (world.rank(), world.size());
    if (number, size) != (placement.rank, placement.size) {
        mpi::finish();
        bail!(
            "{:?} says that this is rank {} of {}, MPI says rank {number} of {size}: it was not started by the MPI that \
             this program was built with; use its own mpirun, or srun --mpi=pmix",
            placement.by,
            placement.rank,
            placement.size
        );
    }
    match command(DeviceChoice::Cpu, &Rank { world: Some(world), device: Device::Cpu }) {
        Ok(ending) => {
            mpi::finish();
            // The first rank says it for all.
            if number == 0 { end(ending) } else { Ok(()) }
        }
        Err(error) => {
            quiet(false);
            crate::show::note!("error: rank {number} of {size}: {error:#}");
            mpi::abort();
            Err(error)
        }
    }
}
