//! Ranks that are threads.

use std::time::Duration;

use specforge_parallel::threads;
use specforge_tensor::{Combine, Device, Group, Tensor};

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn parallel_threads_do_every_collective() {
    for size in 1..=4 {
        threads::run(size, PATIENCE, |rank| crate::collectives::check(rank.as_ref(), Device::Cpu));
    }
}

/// Many rounds without a pause between them.
#[test]
fn parallel_threads_keep_rounds_apart() {
    threads::run(3, PATIENCE, |rank| {
        for round in 0..500 {
            let mut x = Tensor::from_f32(Device::Cpu, vec![(round + rank.rank()) as f32], &[1]).unwrap();
            rank.all_reduce(&mut x, Combine::Sum).unwrap();
            assert_eq!(x.to_f32(), [(3 * round + 3) as f32]);
        }
    });
}

/// The sum is that of the ranks' order, whoever comes first.
#[test]
fn parallel_sums_are_in_the_order_of_the_ranks() {
    let values = [1e8f32, 1.0, -1e8, 1.0];
    for late in 0..4 {
        let sums = threads::run(4, PATIENCE, |rank| {
            std::thread::sleep(Duration::from_millis(if rank.rank() == late { 5 } else { 0 }));
            let mut x = Tensor::from_f32(Device::Cpu, vec![values[rank.rank()]], &[1]).unwrap();
            rank.all_reduce(&mut x, Combine::Sum).unwrap();
            x.to_f32()[0]
        });
        assert_eq!(sums, [((1e8 + 1.0) - 1e8) + 1.0; 4]);
    }
}

fn barrier_error(rank: &dyn Group) -> String {
    rank.barrier().unwrap_err().to_string()
}

#[test]
fn parallel_a_rank_that_ends_is_named_at_once() {
    let started = std::time::Instant::now();
    let said = threads::run(3, Duration::from_mins(10), |rank| {
        if rank.rank() == 1 { String::new() } else { barrier_error(rank.as_ref()) }
    });
    assert!(started.elapsed() < Duration::from_secs(5));
    for rank in [0, 2] {
        assert!(said[rank].contains(&format!("rank {rank} of 3, barrier: rank 1 has ended")), "{said:?}");
    }
}

#[test]
fn parallel_a_rank_that_does_not_come_is_named_after_the_time_out() {
    let said = threads::run(3, Duration::from_millis(100), |rank| {
        if rank.rank() == 2 {
            std::thread::sleep(Duration::from_millis(400));
        }
        barrier_error(rank.as_ref())
    });
    assert!(said[0].contains("after 0.1 s ranks [2] did not come to barrier"), "{said:?}");
    assert_eq!(said[0].split(':').next_back(), said[2].split(':').next_back());
}

#[test]
fn parallel_ranks_out_of_step_are_an_error_for_all() {
    let said = threads::run(2, PATIENCE, |rank| {
        let mut x = Tensor::from_f32(Device::Cpu, vec![0.0], &[1]).unwrap();
        let done = if rank.rank() == 0 { rank.barrier() } else { rank.all_reduce(&mut x, Combine::Sum) };
        done.unwrap_err().to_string()
    });
    assert!(said.iter().all(|s| s.contains("barrier") && s.contains("all-reduce")), "{said:?}");
    let said = threads::run(2, PATIENCE, |rank| {
        let x = Tensor::from_f32(Device::Cpu, vec![0.0; 1 + rank.rank()], &[1 + rank.rank()]).unwrap();
        rank.all_gather(&x).unwrap_err().to_string()
    });
    assert!(said.iter().all(|s| s.contains("[1]") && s.contains("[2]")), "{said:?}");
}

#[test]
fn parallel_a_tensor_that_cannot_be_cut_is_refused() {
    let [rank] = <[_; 1]>::try_from(threads::ranks(1, PATIENCE)).unwrap();
    assert!(
        rank.send(&Tensor::from_u32(Device::Cpu, vec![1]), 1).unwrap_err().to_string().contains("no rank 1")
    );
    threads::run(2, PATIENCE, |rank| {
        let x = Tensor::from_f32(Device::Cpu, vec![0.0; 3], &[3]).unwrap();
        let said = rank.reduce_scatter(&x).unwrap_err().to_string();
        assert!(said.contains("a multiple of 2") && said.contains("[3]"), "{said}");
    });
}
