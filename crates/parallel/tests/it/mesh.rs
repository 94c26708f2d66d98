//! Places in a mesh and the groups along its dimensions.

use std::time::Duration;

use specforge_parallel::{Mesh, MeshShape, threads};
use specforge_tensor::{Device, Group, Tensor};

fn members(group: &dyn Group, world: &dyn Group) -> Vec<u32> {
    group.all_gather(&Tensor::from_u32(Device::Cpu, vec![world.rank() as u32])).unwrap().to_u32()
}

#[test]
fn parallel_groups_of_a_mesh_have_the_ranks_that_they_should() {
    let shape = MeshShape { replicas: 2, shards: 2, sequence: 2, tensor: 2 };
    let all = threads::run(16, Duration::from_secs(20), |world| {
        let mesh = Mesh::new(world.clone(), shape, Device::Cpu).unwrap();
        let groups = [&mesh.data, &mesh.gradients, &mesh.parts, &mesh.replicas, &mesh.sequence, &mesh.tensor];
        (mesh.place, mesh.is_first(), groups.map(|group| members(group.as_ref(), world.as_ref())))
    });
    for (rank, (place, is_first, groups)) in all.iter().enumerate() {
        assert_eq!((*place, *is_first), (shape.place(rank), rank == 0));
        // Of a rank's number, binary digits are replica, shard, sequence, tensor: each group varies some of them.
        let rank = rank as u32;
        let along =
            |digits: u32| (0..16).filter(|other| other & !digits == rank & !digits).collect::<Vec<u32>>();
        let expected = [0b1100, 0b1110, 0b0110, 0b1000, 0b0010, 0b0001].map(along);
        assert_eq!(*groups, expected, "rank {rank}");
    }
}

#[test]
fn parallel_every_place_of_a_mesh_is_one_rank() {
    let shape = MeshShape { replicas: 2, shards: 3, sequence: 2, tensor: 2 };
    let mut places: Vec<_> = (0..shape.ranks()).map(|rank| shape.place(rank)).collect();
    let key = |p: &specforge_parallel::Place| (p.replica, p.shard, p.sequence, p.tensor);
    assert!(places.is_sorted_by_key(key));
    places.dedup();
    assert_eq!(places.len(), 24);
}

#[test]
fn parallel_a_mesh_of_another_size_is_refused() {
    threads::run(2, Duration::from_secs(20), |world| {
        let said = Mesh::new(world, MeshShape::data(3), Device::Cpu).unwrap_err().to_string();
        assert!(said.contains("3 ranks, but there are 2"), "{said}");
    });
}
