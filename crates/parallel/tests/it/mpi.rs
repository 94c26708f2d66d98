//! Ranks that are processes: each test starts itself again under `mpirun`.
#![expect(clippy::disallowed_methods, reason = "a test asks whether mpirun started it")]

use std::process::Command;
use std::time::Duration;

use specforge_parallel::mpi;
use specforge_tensor::{Device, Tensor};

fn is_rank() -> bool {
    std::env::var_os("OMPI_COMM_WORLD_RANK").is_some()
}

/// Runs a test of this file on ranks; what they printed, and whether all ended well.
fn on_ranks(test: &str, ranks: usize) -> (bool, String) {
    let mut mpirun = Command::new("mpirun");
    mpirun.args(["-n", &ranks.to_string(), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]);
    mpirun.args(["--mca", "btl", "self,vader", "--mca", "mpi_yield_when_idle", "1"]);
    mpirun.arg(std::env::current_exe().unwrap()).args(["--exact", &format!("mpi::{test}"), "--nocapture"]);
    let output = mpirun.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

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
        let (ended_well, said) = on_ranks("parallel_processes_do_every_collective", ranks);
        assert!(ended_well && said.matches("1 passed").count() == ranks, "{said}");
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
    let (ended_well, said) = on_ranks("parallel_a_process_that_hangs_is_noticed", 2);
    assert!(!ended_well && said.contains("alarm: rank 1 of 2, broadcast: not done after"), "{said}");
    assert!(started.elapsed() < Duration::from_secs(30));
}
