//! Ranks that are processes: each test starts itself again under `mpirun`.

use std::time::Duration;

use specforge_parallel::mpi;
use specforge_tensor::{Device, Tensor};
use specforge_testkit::{is_rank, passes_on_ranks, test_on_ranks};

#[expect(clippy::print_stdout, clippy::exit, reason = "what no test could go on from")]
fn die(why: &str) {
    println!("alarm: {why}");
    std::process::exit(1);
}

#[test]
fn parallel_processes_do_every_collective() {
    if is_rank() {
        let world = mpi::start(Duration::from_mins(1), die).unwrap();
        crate::collectives::check(world.as_ref(), Device::Cpu);
        mpi::finish();
        return;
    }
    for ranks in [1, 2, 4] {
        passes_on_ranks("mpi::parallel_processes_do_every_collective", ranks);
    }
}

/// A rank that hangs does not hold the others for ever.
#[test]
fn parallel_a_process_that_hangs_is_noticed() {
    if is_rank() {
        let world = mpi::start(Duration::from_millis(300), die).unwrap();
        if world.rank() == 0 {
            std::thread::sleep(Duration::from_mins(1));
        }
        let mut x = Tensor::from_f32(Device::Cpu, vec![1.0], &[1]).unwrap();
        world.broadcast(&mut x, 0).unwrap();
        mpi::finish();
        return;
    }
    let started = std::time::Instant::now();
    let (ended_well, said) = test_on_ranks("mpi::parallel_a_process_that_hangs_is_noticed", 2);
    assert!(!ended_well && said.contains("alarm: rank 1 of 2, broadcast: not done after"), "{said}");
    assert!(started.elapsed() < Duration::from_secs(30));
}
