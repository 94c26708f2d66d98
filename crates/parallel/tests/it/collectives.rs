//! What every implementation of a group must do, whatever carries it.

use half::bf16;
use specforge_tensor::{Combine, DType, Device, Group, Tensor};

/// All collectives on one rank of a group; every rank calls this.
pub(crate) fn check(group: &dyn Group, device: Device) {
    let (rank, size) = (group.rank(), group.size());
    reductions(group, device);
    moves(group, device);
    let mut from_last = floats(device, &[rank as f32; 3], &[3]);
    group.broadcast(&mut from_last, size - 1).unwrap();
    assert_eq!(from_last.to_f32(), [(size - 1) as f32; 3]);
    ring(group, device);
    parts(group, device);
    group.barrier().unwrap();
}

fn floats(device: Device, values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_f32(device, values.to_vec(), shape).unwrap()
}

/// `value + rank`, whose sum over the ranks the tests know.
fn own(group: &dyn Group, value: usize) -> f32 {
    (value + group.rank()) as f32
}

fn ranks_sum(group: &dyn Group) -> usize {
    group.size() * (group.size() - 1) / 2
}

fn reductions(group: &dyn Group, device: Device) {
    let size = group.size();
    let sum = |value: usize| (size * value + ranks_sum(group)) as f32;
    for dtype in [DType::F32, DType::Bf16] {
        let mut x = floats(device, &[own(group, 1), own(group, 5)], &[1, 2]).cast(dtype).unwrap();
        group.all_reduce(&mut x, Combine::Sum).unwrap();
        assert_eq!((x.to_f32(), x.dtype(), x.shape()), (vec![sum(1), sum(5)], dtype, &[1, 2][..]));
        let mut x = floats(device, &[own(group, 1), own(group, 5)], &[2]).cast(dtype).unwrap();
        group.all_reduce(&mut x, Combine::Max).unwrap();
        assert_eq!(x.to_f32(), [size as f32, (size + 4) as f32]);
        let values: Vec<f32> = (0..2 * size).map(|i| own(group, i)).collect();
        let x = floats(device, &values, &[size, 2]).cast(dtype).unwrap();
        let piece = group.reduce_scatter(&x).unwrap();
        let first = 2 * group.rank();
        assert_eq!((piece.to_f32(), piece.shape()), (vec![sum(first), sum(first + 1)], &[1, 2][..]));
    }
    let mut exact = Tensor::from_f64(device, vec![1e-9 + group.rank() as f64]).unwrap();
    group.all_reduce(&mut exact, Combine::Sum).unwrap();
    let got = exact.later_f64().unwrap().wait().unwrap()[0];
    assert!((got - (ranks_sum(group) as f64 + size as f64 * 1e-9)).abs() < 1e-14, "{got}");
    let mut numbers = Tensor::from_u32(device, vec![group.rank() as u32, 7]);
    group.all_reduce(&mut numbers, Combine::Sum).unwrap();
    assert_eq!(numbers.to_u32(), [ranks_sum(group) as u32, 7 * size as u32]);
}

fn moves(group: &dyn Group, device: Device) {
    let (rank, size) = (group.rank(), group.size());
    let x = Tensor::from_bf16(device, vec![bf16::from_f32(rank as f32); 2], &[1, 2]).unwrap();
    let all = group.all_gather(&x).unwrap();
    let expected: Vec<f32> = (0..size).flat_map(|r| [r as f32; 2]).collect();
    assert_eq!((all.to_f32(), all.shape(), all.dtype()), (expected, &[size, 2][..], DType::Bf16));
    // Piece i says who sent it and to whom.
    let values: Vec<f32> = (0..size).flat_map(|to| [rank as f32, to as f32]).collect();
    let came = group.all_to_all(&floats(device, &values, &[size, 2])).unwrap();
    let expected: Vec<f32> = (0..size).flat_map(|from| [from as f32, rank as f32]).collect();
    assert_eq!((came.to_f32(), came.shape()), (expected, &[size, 2][..]));
    let index = group.all_gather(&Tensor::from_u32(device, vec![rank as u32 + 3])).unwrap();
    assert_eq!(index.to_u32(), (3..3 + size as u32).collect::<Vec<_>>());
}

/// Once around, by pairs of send and receive and by exchange.
fn ring(group: &dyn Group, device: Device) {
    let (rank, size) = (group.rank(), group.size());
    let (next, last) = ((rank + 1) % size, (rank + size - 1) % size);
    let mine = floats(device, &[rank as f32], &[1]);
    let came = group.exchange(&mine, next, last).unwrap();
    assert_eq!(came.to_f32(), [last as f32]);
    if size == 1 {
        return;
    }
    let mut passed = floats(device, &[100.0], &[1]);
    if rank > 0 {
        group.receive(&mut passed, rank - 1).unwrap();
    }
    assert_eq!(passed.to_f32(), [100.0 * 2f32.powi(rank as i32)]);
    if rank + 1 < size {
        group.send(&floats(device, &[passed.to_f32()[0] * 2.0], &[1]), rank + 1).unwrap();
    }
}

/// Odd and even ranks apart, and a group of one.
fn parts(group: &dyn Group, device: Device) {
    let (rank, size) = (group.rank(), group.size());
    let half = group.split(rank % 2).unwrap();
    assert_eq!((half.rank(), half.size()), (rank / 2, (size + 1 - rank % 2) / 2));
    let all = half.all_gather(&floats(device, &[rank as f32], &[1])).unwrap();
    assert_eq!(all.to_f32(), (0..half.size()).map(|r| (2 * r + rank % 2) as f32).collect::<Vec<_>>());
    let alone = group.split(rank).unwrap();
    let mut x = floats(device, &[0.5], &[1]);
    alone.all_reduce(&mut x, Combine::Sum).unwrap();
    assert_eq!((alone.size(), x.to_f32()), (1, vec![0.5]));
}
