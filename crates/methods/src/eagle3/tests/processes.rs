//! The reference case on ranks that are processes of MPI; each test starts itself again under `mpirun`.

use std::time::Duration;

use specforge_parallel::mpi;
use specforge_testkit::{golden_case, is_rank, passes_on_ranks};

use super::{parallel, ranks};
use crate::Exchange;

#[expect(clippy::print_stdout, clippy::exit, reason = "what no test could go on from")]
fn die(why: &str) {
    println!("alarm: {why}");
    std::process::exit(1);
}

#[test]
fn parallel_processes_train_as_one() {
    if !is_rank() {
        for size in [2, 4] {
            passes_on_ranks("eagle3::tests::processes::parallel_processes_train_as_one", size);
        }
        return;
    }
    let world = mpi::start(Duration::from_mins(1), die).unwrap();
    let size = world.size();
    if let Some(dir) = golden_case("eagle3-basic") {
        let alone = ranks::ALONE;
        let of = |data, sequence, tensor, exchange| ranks::Shape { data, sequence, tensor, exchange };
        ranks::check_on(&world, &dir, ranks::Shape { data: size, ..alone });
        ranks::check_on(&world, &dir, ranks::Shape { tensor: size, ..alone });
        for exchange in [Exchange::Heads, Exchange::Ring, Exchange::Gather] {
            let shape = of(size / 2, 2, 1, exchange);
            ranks::check_on(&world, &dir, shape);
        }
        if size == 4 {
            ranks::check_on(&world, &dir, of(2, 1, 2, Exchange::Ring));
            ranks::check_on(&world, &dir, of(1, 2, 2, Exchange::Ring));
        }
        // The reference's own steps, with the optimizer's state whole and in parts.
        let single = parallel::path(&dir, 1, false);
        for is_sharded in [false, true] {
            let name = format!("{size} processes, parts: {is_sharded}");
            parallel::assert_same_path(&name, &parallel::path_on(&world, &dir, is_sharded), &single);
        }
    }
    mpi::finish();
}
