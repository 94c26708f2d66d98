//! Cutting tensors over ranks, and putting them together.

use std::time::Duration;

use specforge_parallel::{Mesh, MeshShape, Shards, sum, tell, threads};
use specforge_tensor::{DType, Device, Tensor};

fn numbers(n: usize, shape: &[usize], factor: f32) -> Tensor {
    Tensor::from_f32(Device::Cpu, (0..n).map(|i| factor * i as f32).collect(), shape).unwrap()
}

#[test]
fn parallel_parts_of_a_tensor_make_the_whole() {
    let shapes: [&[usize]; 4] = [&[2, 6], &[7], &[1], &[3, 3]];
    for size in 1..=4 {
        for shape in shapes {
            let n = shape.iter().product();
            let parts = threads::run(size, Duration::from_secs(20), |world| {
                let mesh = Mesh::new(world, MeshShape::data(size), Device::Cpu).unwrap();
                let shards = Shards::new(&mesh, DType::F32);
                let x = numbers(n, shape, 1.0);
                let part = shards.cut(&x).unwrap();
                assert_eq!(part.shape(), [shards.part_len(n)]);
                let whole = shards.gather(&part, shape).unwrap();
                assert_eq!((whole.to_f32(), whole.shape()), (x.to_f32(), shape));
                let own = shards.range(n);
                assert_eq!(part.to_f32()[..own.len()], x.to_f32()[own.clone()]);
                assert!(part.to_f32()[own.len()..].iter().all(|v| *v == 0.0));
                own
            });
            let covered: Vec<usize> = parts.into_iter().flatten().collect();
            assert_eq!(covered, (0..n).collect::<Vec<_>>());
        }
    }
}

/// Two copies of the state, each spread over two ranks: every part is the sum of all four ranks' gradients.
#[test]
fn parallel_gradients_are_summed_over_shards_and_replicas() {
    for reduce in [DType::F32, DType::Bf16] {
        threads::run(4, Duration::from_secs(20), |world| {
            let shape = MeshShape { replicas: 2, ..MeshShape::data(2) };
            let factor = 1.0 + world.rank() as f32;
            let mesh = Mesh::new(world, shape, Device::Cpu).unwrap();
            let shards = Shards::new(&mesh, reduce);
            let part = shards.reduce(&numbers(5, &[5], factor)).unwrap();
            let expected: Vec<f32> =
                if shards.group().rank() == 0 { vec![0.0, 10.0, 20.0] } else { vec![30.0, 40.0, 0.0] };
            assert_eq!((part.to_f32(), part.dtype()), (expected, DType::F32));
            let whole = sum(mesh.data.as_ref(), numbers(5, &[5], factor), reduce).unwrap();
            assert_eq!((whole.to_f32(), whole.dtype()), (vec![0.0, 10.0, 20.0, 30.0, 40.0], DType::F32));
        });
    }
}

#[test]
fn parallel_one_rank_tells_all_others_a_text() {
    for text in ["", "a", "step-00000004", "größer"] {
        threads::run(3, Duration::from_secs(20), |world| {
            let own = if world.rank() == 1 { text } else { "something else" };
            assert_eq!(tell(world.as_ref(), Device::Cpu, 1, own).unwrap(), text);
        });
    }
}
