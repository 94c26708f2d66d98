//! Linear layers with 8-bit weights, and what rounds their inputs.

use specforge_testkit::Lcg;

use super::{assert_near_within, device, upload};
use crate::tests::{bits, normal};
use crate::{Device, Params, Tape, Tensor, Var, Weight};

/// Weights of `n_out` rows in 8 bits, and a norm's.
fn weights(device: Device, [n_out, width]: [usize; 2]) -> (Params, Weight, crate::ParamId) {
    let (mut rng, mut params) = (Lcg::new(5), Params::new());
    let w = upload(&normal(&mut rng, &[n_out, width]), device).quantize_rows().unwrap();
    let w = Weight::of(params.add("w", w, false));
    let norm = params.add("norm", upload(&normal(&mut rng, &[width]), device), false);
    (params, w, norm)
}

fn rows_of(device: Device, n: usize, width: usize, seed: u64) -> Tensor {
    upload(&normal(&mut Lcg::new(seed), &[n, width]), device)
}

/// An 8-bit device; older ones have no such numbers.
fn device_with_8_bits() -> Option<Device> {
    let device = device()?;
    match rows_of(device, 1, 16, 1).quantize_rows() {
        Ok(_) => Some(device),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

#[test]
fn cuda_what_is_rounded_in_one_pass_has_the_bits_of_two() {
    let Some(device) = device_with_8_bits() else { return };
    for (n, width) in [(33, 512), (200, 4096), (40, 5120), (64, 8208), (35, 14336), (7, 512), (50, 144)] {
        let (params, w, norm) = weights(device, [64, width]);
        let tape = Tape::inference(&params);
        let x = tape.input(rows_of(device, n, width, 2));
        let product = |x: &Var| bits(tape.linear(x, &w).unwrap().value());
        let (two, one) =
            (tape.rms_norm(&x, norm, 1e-5).unwrap(), tape.rms_norm_for(&x, norm, 1e-5, &w).unwrap());
        assert_eq!(product(&one), product(&two), "norm of {n} rows of {width}");
        let gate_up = tape.input(rows_of(device, n, 2 * width, 3));
        let (two, one) = (tape.swiglu(&gate_up).unwrap(), tape.swiglu_for(&gate_up, &w).unwrap());
        assert_eq!(product(&one), product(&two), "swiglu of {n} rows of {width}");
    }
}

#[test]
fn cuda_products_of_8_bits_are_near_those_of_16() {
    let Some(device) = device_with_8_bits() else { return };
    for n in [1, 32, 33, 300] {
        let (params, w, _) = weights(device, [96, 256]);
        let tape = Tape::inference(&params);
        let (x, residual) = (rows_of(device, n, 256, 2), rows_of(device, n, 96, 3));
        let mut wide = Params::new();
        let same =
            Weight::of(wide.add("w", upload(&normal(&mut Lcg::new(5), &[96, 256]), Device::Cpu), false));
        let cpu = Tape::inference(&wide);
        let host = |t: &Tensor| cpu.input(t.to_device(Device::Cpu).unwrap());
        let want = cpu.linear_add(&host(&x), &same, &host(&residual)).unwrap();
        let got = tape.linear_add(&tape.input(x), &w, &tape.input(residual)).unwrap();
        assert_near_within(&format!("{n} rows"), got.value(), want.value(), 6e-2);
    }
}

#[test]
fn cuda_some_rows_of_8_bits_keep_their_scales() {
    let Some(device) = device_with_8_bits() else { return };
    let (params, w, norm) = weights(device, [64, 512]);
    let tape = Tape::inference(&params);
    let all = tape.rms_norm_for(&tape.input(rows_of(device, 160, 512, 2)), norm, 1e-5, &w).unwrap();
    let some = tape.input(all.value().rows(40..120).unwrap());
    let (all, some) = (tape.linear(&all, &w).unwrap(), tape.linear(&some, &w).unwrap());
    assert_eq!(bits(some.value()), bits(&all.value().rows(40..120).unwrap()));
}
