//! The operations on a CUDA device against the CPU's results from the same inputs, which are bfloat16 numbers on both.
//! Without a device each test says that it was skipped.

mod adam;
mod attention;
mod compile;
mod fp8;
mod invariance;
mod loss;
mod mixture;
mod stack;
mod storage;
mod zoo;

use crate::tests::{Op, bits};
use crate::{DType, Device, Tensor};

/// How far a result may be from the right one, relative to its norm: a bfloat16 has 8 bits, and the roundings of an
/// operation's inputs within, intermediate values and outputs add up to a few halves of the last.
const TOLERANCE: f64 = 1e-2;

/// The root mean square below which a result counts as being this large: with inputs of order one, gradients that
/// cancel leave the rounding of what cancelled.
const SMALLEST: f64 = 0.01;

/// The first CUDA device, if this machine has one.
fn device() -> Option<Device> {
    match Device::cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("skipped: no CUDA device ({error})");
            None
        }
    }
}

/// The bfloat16 numbers nearest to these, in the same type of storage.
fn rounded(t: &Tensor) -> Tensor {
    t.cast(DType::Bf16).unwrap().cast(DType::F32).unwrap().cast(t.dtype()).unwrap()
}

/// Numbers that bfloat16 holds, in its storage on a device.
fn upload(t: &Tensor, device: Device) -> Tensor {
    t.cast(DType::Bf16).unwrap().to_device(device).unwrap()
}

/// An operation on rounded inputs, for the CPU, and the same one for the device: its float32 parameters are kept in
/// `storage`.
fn on_both(op: &Op, device: Device, storage: DType) -> [Op; 2] {
    let all = |tensors: &[Tensor], f: &dyn Fn(&Tensor) -> Tensor| tensors.iter().map(f).collect::<Vec<_>>();
    let here = Op { leaves: all(&op.leaves, &rounded), params: all(&op.params, &rounded), ..op.clone() };
    let stored = |p: &Tensor| {
        let p = if p.dtype() == DType::F32 { p.cast(storage).unwrap() } else { p.clone() };
        p.to_device(device).unwrap()
    };
    let leaves = all(&here.leaves, &|t| upload(t, device));
    let there = Op { leaves, params: all(&here.params, &stored), ..op.clone() };
    [here, there]
}

/// The norm of the difference, relative to that of `want`.
fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let least = SMALLEST * (want.len() as f64).sqrt();
    difference / norm(&mut want.iter().map(|&v| f64::from(v))).max(least)
}

fn assert_near_within(name: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.shape(), want.shape(), "{name}");
    if want.is_empty() {
        return;
    }
    let (got, want) = (got.to_f32(), want.to_f32());
    let error = relative_error(&got, &want);
    let worst = (0..got.len()).max_by(|&a, &b| (got[a] - want[a]).abs().total_cmp(&(got[b] - want[b]).abs()));
    let worst = worst.unwrap_or(0);
    assert!(
        error <= tolerance,
        "{name}: relative error {error:.2e} above {tolerance:e}; worst at [{worst}] of {}: got {}, want {}",
        got.len(),
        got[worst],
        want[worst]
    );
}

fn assert_near(name: &str, got: &Tensor, want: &Tensor) {
    assert_near_within(name, got, want, TOLERANCE);
}

/// Value and gradients of an operation on the device against those on the CPU.
fn check(name: &str, op: &Op, device: Device, storage: DType) {
    let [here, there] = on_both(op, device, storage);
    let ((want, _, want_gradients), (got, _, gradients)) = (here.gradients(3), there.gradients(3));
    assert_eq!(got.device(), device);
    assert_near(name, &got, &want);
    assert_eq!(gradients.len(), want_gradients.len());
    for (i, (got, want)) in gradients.iter().zip(&want_gradients).enumerate() {
        assert_near(&format!("{name}, gradient {i}"), got, want);
    }
}

/// Value and gradients, as bits.
fn all_bits(op: &Op) -> Vec<Vec<u32>> {
    let (value, _, gradients) = op.gradients(3);
    [vec![bits(&value)], gradients.iter().map(bits).collect()].concat()
}

#[test]
fn a_wrong_result_is_told_from_a_rounded_one() {
    let want: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
    let with = |f: fn(f32) -> f32| relative_error(&want.iter().map(|&v| f(v)).collect::<Vec<_>>(), &want);
    assert!(with(|v| half::bf16::from_f32(v).to_f32()) < TOLERANCE / 2.0);
    assert!(with(|v| v * 1.02) > TOLERANCE);
    assert!(with(|_| f32::NAN).is_nan());
}
