//! The AdamW step and the master weights of bfloat16 parameters.

use specforge_testkit::{Lcg, assert_close};

use super::{device, upload};
use crate::tests::adam::{STEP, Trained, assert_restored, every_kind_of_number, step};
use crate::tests::{bits, matrix, normal};
use crate::{AdamStep, DType, Device, Tensor};

/// Sizes that are one block of the kernel, several, and no whole number of what a thread takes.
const SHAPES: [&[usize]; 6] = [&[40, 30], &[7], &[200_001], &[65_536], &[3, 5], &[130, 1000]];

/// Parameters of both storage types on a device, float32 gradients for some steps.
fn parameters(device: Device) -> (Vec<Trained>, Vec<Vec<Tensor>>) {
    let mut rng = Lcg::new(5);
    let on = |t: Tensor| t.to_device(device).unwrap();
    let param = |(i, shape): (usize, &&[usize])| {
        let value = normal(&mut rng, shape).cast(DType::Bf16).unwrap();
        on(if i % 2 == 0 { value } else { value.cast(DType::F32).unwrap() })
    };
    let params: Vec<Trained> = SHAPES.iter().enumerate().map(param).map(Trained::new).collect();
    let mut rng = Lcg::new(6);
    let grads = (0..5).map(|_| SHAPES.iter().map(|shape| on(normal(&mut rng, shape))).collect());
    (params, grads.collect())
}

/// The parameters after the steps, and the norms.
fn trained(device: Device, settings: &AdamStep) -> (Vec<Trained>, Vec<f64>) {
    let (mut params, grads) = parameters(device);
    let norms =
        grads.iter().zip(1..).map(|(grads, number)| step(&mut params, grads, number, settings).unwrap());
    let norms = norms.collect();
    (params, norms)
}

#[test]
fn cuda_steps_agree_with_the_cpu() {
    let Some(device) = device() else { return };
    for max_norm in [0.0, 2.0, 1e9] {
        let settings = AdamStep { max_norm, ..STEP };
        let ((want, want_norms), (got, norms)) =
            (trained(Device::Cpu, &settings), trained(device, &settings));
        for (norm, want) in norms.iter().zip(want_norms) {
            assert!((norm - want).abs() < 1e-6 * want, "{norm}, want {want}");
        }
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got.param.dtype(), want.param.dtype());
            let name = format!("clipped to {max_norm}, parameter {i}");
            assert_close(&name, &got.master().to_f32(), &want.master().f32s(), 1e-6, 1e-6);
            for k in 0..2 {
                let name = format!("{name}, moment {k}");
                assert_close(&name, &got.moments[k].to_f32(), &want.moments[k].f32s(), 1e-9, 1e-6);
            }
        }
    }
}

/// Without clipping, and with a weight that is a power of two, nothing depends on how the norm was summed.
#[test]
fn cuda_steps_have_the_cpus_bits() {
    let Some(device) = device() else { return };
    let settings = AdamStep { max_norm: 0.0, weight: 4.0, ..STEP };
    let (want, got) = (trained(Device::Cpu, &settings).0, trained(device, &settings).0);
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        assert!(got.bits() == want.bits(), "parameter {i}");
    }
}

#[test]
fn cuda_steps_give_the_same_bits_again() {
    let Some(device) = device() else { return };
    let run = || {
        let (params, norms) = trained(device, &STEP);
        (params.iter().map(Trained::bits).collect::<Vec<_>>(), norms)
    };
    assert!(run() == run());
}

#[test]
fn cuda_gradients_that_are_no_numbers_change_nothing() {
    let Some(device) = device() else { return };
    let (mut params, grads) = parameters(device);
    step(&mut params, &grads[0], 1, &STEP).unwrap();
    let before: Vec<_> = params.iter().map(Trained::bits).collect();
    // In any tensor, at its start, its end, and in between.
    for (tensor, at) in [(0, 17), (1, 6), (2, 200_000), (3, 0), (5, 70_001)] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = grads[1][tensor].to_f32();
            values[at] = bad;
            let mut grads = grads[1].clone();
            grads[tensor] = Tensor::from_f32(device, values, SHAPES[tensor]).unwrap();
            for max_norm in [0.0, 2.0] {
                let norm = step(&mut params, &grads, 2, &AdamStep { max_norm, ..STEP }).unwrap();
                assert!(!norm.is_finite(), "{bad} in {tensor}: {norm}");
            }
        }
        assert!(params.iter().zip(&before).all(|(t, before)| t.bits() == *before), "tensor {tensor}");
    }
    assert!(step(&mut params, &grads[1], 2, &STEP).unwrap().is_finite());
    assert!(params.iter().zip(&before).all(|(t, before)| t.bits() != *before));
}

#[test]
fn a_cuda_parameter_and_its_remainder_restore_every_bit_of_the_master() {
    let Some(device) = device() else { return };
    let kernels = device.kernels();
    let values = every_kind_of_number();
    // One more than threads take at a time.
    let master = matrix([&values[..], &[1.0]].concat(), &[values.len() + 1]);
    let [param, rest] = kernels.split_master(&master.to_device(device).unwrap(), DType::Bf16).unwrap();
    assert_eq!((param.dtype(), rest.dtype()), (DType::Bf16, DType::I16));
    assert_restored(&kernels.master(&param, &rest).unwrap().to_f32(), &master.f32s());
    let [want, want_rest] = Device::Cpu.kernels().split_master(&master, DType::Bf16).unwrap();
    let same = |got: &Tensor, want: &Tensor| {
        let numbers = || master.to_f32().into_iter().map(f32::is_nan);
        bits(got).iter().zip(bits(want)).zip(numbers()).all(|((got, want), nan)| nan || *got == want)
    };
    assert!(same(&param, &want) && same(&rest, &want_rest));
}

#[test]
fn cuda_parameters_start_with_nothing_lost() {
    let Some(device) = device() else { return };
    let (kernels, p) = (device.kernels(), normal(&mut Lcg::new(1), &[9]));
    assert!(kernels.remainder(&p.to_device(device).unwrap()).unwrap().is_none());
    let narrow = upload(&p, device);
    let rest = kernels.remainder(&narrow).unwrap().unwrap();
    assert_eq!((rest.shape(), rest.to_f32()), (&[9][..], vec![0.0; 9]));
    assert_eq!(kernels.master(&narrow, &rest).unwrap().to_f32(), narrow.to_f32());
    let half = p.cast(DType::F16).unwrap().to_device(device).unwrap();
    assert!(kernels.remainder(&half).unwrap_err().to_string().contains("is F16, expected F32 or Bf16"));
    assert_eq!(kernels.adamw(&mut [], &STEP, &crate::Across::default()).unwrap().wait().unwrap(), 0.0);
}
