//! NCCL with one rank on one GPU: all that one machine with one card can show.

use std::time::Duration;

use specforge_parallel::{Mesh, MeshShape, Shards, nccl};
use specforge_tensor::{Combine, DType, Device, Tensor};

#[expect(clippy::print_stdout, clippy::exit, reason = "what no test could go on from")]
fn die(why: &str) {
    println!("alarm: {why}");
    std::process::exit(1);
}

/// The first GPU, where there is one with NCCL beside it.
#[expect(clippy::print_stdout, reason = "a test that is skipped says so")]
fn device() -> Option<Device> {
    let device = Device::cuda(0).ok().filter(|_| specforge_cuda::nccl_library().path.is_some());
    if device.is_none() {
        println!("skipped: no GPU, or no NCCL");
    }
    device
}

#[test]
fn parallel_nccl_with_one_rank_does_every_collective() {
    let Some(device) = device() else { return };
    let id = nccl::unique_id().unwrap();
    let world = nccl::join(device, &id, (0, 1), (Duration::from_mins(1), die)).unwrap();
    crate::collectives::check(world.as_ref(), device);
    let said = world.send(&Tensor::from_u32(device, vec![1]), 1).unwrap_err().to_string();
    assert!(said.contains("no rank 1"), "{said}");
    let host = &mut Tensor::from_f32(Device::Cpu, vec![1.0], &[1]).unwrap();
    let said = world.all_reduce(host, Combine::Sum).unwrap_err().to_string();
    assert!(said.contains("on the host"), "{said}");
}

/// A part of one is the whole, to the bit, in float32 and bfloat16.
#[test]
fn parallel_nccl_with_one_rank_keeps_every_bit() {
    let Some(device) = device() else { return };
    let id = nccl::unique_id().unwrap();
    let world = nccl::join(device, &id, (0, 1), (Duration::from_mins(1), die)).unwrap();
    let mesh = Mesh::new(world, MeshShape::data(1), device).unwrap();
    let shards = Shards::new(&mesh, DType::F32);
    for n in [1, 1000, 4097] {
        let x = Tensor::random(device, &[n], 1.0, n as u64).unwrap();
        let part = shards.cut(&x).unwrap();
        assert_eq!(shards.gather(&part, &[n]).unwrap().to_f32(), x.to_f32());
        let grad = x.cast(DType::F32).unwrap();
        assert_eq!(shards.reduce(&grad).unwrap().to_f32(), grad.to_f32());
        assert_eq!(
            specforge_parallel::sum(mesh.data.as_ref(), grad.copied().unwrap(), DType::F32).unwrap().to_f32(),
            grad.to_f32()
        );
    }
}

/// Every GPU of this machine a rank, each on a thread of its own.
#[test]
fn parallel_nccl_on_every_gpu_does_every_collective() {
    let gpus = device().map_or(0, |_| specforge_cuda::Gpu::count().unwrap());
    if gpus < 2 {
        return;
    }
    let id = nccl::unique_id().unwrap();
    std::thread::scope(|scope| {
        for rank in 0..gpus {
            scope.spawn(move || {
                let device = Device::cuda(rank).unwrap();
                let world = nccl::join(device, &id, (rank, gpus), (Duration::from_mins(1), die)).unwrap();
                crate::collectives::check(world.as_ref(), device);
                let x = Tensor::random(device, &[5003], 1.0, 7).unwrap();
                let mesh = Mesh::new(world, MeshShape::data(gpus), device).unwrap();
                let shards = Shards::new(&mesh, DType::F32);
                let part = shards.cut(&x).unwrap();
                assert_eq!(shards.gather(&part, &[5003]).unwrap().to_f32(), x.to_f32());
            });
        }
    });
}
