//! The AdamW step against plain float64 arithmetic, and the master weights of bfloat16 parameters.

use half::bf16;
use specforge_testkit::{Lcg, assert_close};

use super::{bits, matrix, normal};
use crate::{Across, AdamStep, AdamTensor, DType, Device, Kernels, Result, Tensor};

/// Settings that exercise everything: decay, a weight that is no power of two, clipping.
pub(crate) const STEP: AdamStep =
    AdamStep { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, weight: 3.0, max_norm: 2.0 };

/// A parameter with everything that belongs to it.
#[derive(Clone)]
pub(crate) struct Trained {
    pub(crate) param: Tensor,
    pub(crate) remainder: Option<Tensor>,
    pub(crate) moments: [Tensor; 2],
}

impl Trained {
    /// Before its first step.
    pub(crate) fn new(param: Tensor) -> Self {
        let zeros = || Tensor::zeros(param.device(), param.shape()).unwrap();
        let (remainder, moments) = (param.device().kernels().remainder(&param).unwrap(), [zeros(), zeros()]);
        Self { param, remainder, moments }
    }

    /// The float32 value.
    pub(crate) fn master(&self) -> Tensor {
        let kernels = self.param.device().kernels();
        self.remainder.as_ref().map_or(self.param.clone(), |rest| kernels.master(&self.param, rest).unwrap())
    }

    /// Everything, as bits.
    pub(crate) fn bits(&self) -> Vec<Vec<u32>> {
        let all = [&self.param, &self.moments[0], &self.moments[1]];
        all.into_iter().chain(&self.remainder).map(bits).collect()
    }
}

/// The `number`-th step of all these parameters; the norm.
pub(crate) fn step(all: &mut [Trained], grads: &[Tensor], number: u64, step: &AdamStep) -> Result<f64> {
    let kernels = grads[0].device().kernels();
    let mut tensors: Vec<AdamTensor<'_>> = all
        .iter_mut()
        .zip(grads)
        .map(|(t, grad)| {
            let Trained { param, remainder, moments: [exp_avg, exp_avg_sq] } = t;
            AdamTensor {
                param,
                remainder: remainder.as_mut(),
                exp_avg,
                exp_avg_sq,
                grad,
                step: number,
                share: 1.0,
            }
        })
        .collect();
    kernels.adamw(&mut tensors, step, &Across::default())?.wait()
}

fn kernels() -> &'static dyn Kernels {
    Device::Cpu.kernels()
}

/// The norm of the gradients divided by the weight, and every parameter after the step, in float64. `state` is a
/// parameter and its two moments.
fn plain(state: &mut [[Vec<f64>; 3]], grads: &[Tensor], number: i32, s: &AdamStep) -> f64 {
    let squares = grads.iter().flat_map(Tensor::to_f32).map(|g| f64::from(g).powi(2)).sum::<f64>();
    let norm = squares.sqrt() / s.weight;
    let clip = if s.max_norm > 0.0 && norm > s.max_norm { s.max_norm / norm } else { 1.0 };
    for ([p, m, v], grad) in state.iter_mut().zip(grads) {
        for (i, g) in grad.to_f32().into_iter().enumerate() {
            let g = f64::from(g) * clip / s.weight;
            m[i] = s.beta1 * m[i] + (1.0 - s.beta1) * g;
            v[i] = s.beta2 * v[i] + (1.0 - s.beta2) * g * g;
            let (mean, square) = (m[i] / (1.0 - s.beta1.powi(number)), v[i] / (1.0 - s.beta2.powi(number)));
            p[i] -= s.lr * s.weight_decay * p[i] + s.lr * mean / (square.sqrt() + s.eps);
        }
    }
    norm
}

#[test]
fn steps_agree_with_plain_arithmetic() {
    for max_norm in [0.0, 2.0, 1e9] {
        let settings = AdamStep { max_norm, ..STEP };
        let mut rng = Lcg::new(5);
        let shapes: [&[usize]; 3] = [&[40, 30], &[7], &[20_000]];
        let mut all = shapes.map(|shape| Trained::new(normal(&mut rng, shape)));
        let mut state = all.clone().map(|t| {
            let zeros = vec![0.0; t.param.len()];
            [t.param.to_f32().into_iter().map(f64::from).collect(), zeros.clone(), zeros]
        });
        for number in 1..=5 {
            let grads = shapes.map(|shape| normal(&mut rng, shape));
            let norm = step(&mut all, &grads, number, &settings).unwrap();
            let want = plain(&mut state, &grads, number as i32, &settings);
            assert!((norm - want).abs() < 1e-6 * want, "{norm}, want {want}");
        }
        for (t, [p, ..]) in all.iter().zip(&state) {
            let want: Vec<f32> = p.iter().map(|&v| v as f32).collect();
            assert_close(&format!("clipped to {max_norm}"), &t.param.f32s(), &want, 1e-6, 1e-6);
        }
    }
}

#[test]
fn the_master_of_a_bfloat16_parameter_takes_the_steps_of_a_float32_one() {
    let mut rng = Lcg::new(6);
    let start = normal(&mut rng, &[50, 300]).cast(DType::Bf16).unwrap();
    let mut wide = [Trained::new(start.cast(DType::F32).unwrap())];
    let mut narrow = [Trained::new(start.clone())];
    assert!(wide[0].remainder.is_none() && narrow[0].remainder.is_some());
    for number in 1..=20 {
        let grads = [normal(&mut rng, &[50, 300])];
        let norms = [&mut wide, &mut narrow].map(|t| step(t, &grads, number, &STEP).unwrap());
        assert_eq!(norms[0], norms[1]);
        assert_eq!(bits(&narrow[0].master()), bits(&wide[0].param), "step {number}");
        assert_eq!(narrow[0].param.dtype(), DType::Bf16);
        assert!((0..2).all(|i| bits(&narrow[0].moments[i]) == bits(&wide[0].moments[i])));
    }
    assert_ne!(bits(&narrow[0].param), bits(&start));
}

#[test]
fn gradients_that_are_no_numbers_change_nothing() {
    let mut rng = Lcg::new(7);
    let params = [normal(&mut rng, &[30]), normal(&mut rng, &[40]).cast(DType::Bf16).unwrap()];
    let mut all = params.map(Trained::new);
    let good = [normal(&mut rng, &[30]), normal(&mut rng, &[40])];
    step(&mut all, &good, 1, &STEP).unwrap();
    let before = all.clone().map(|t| t.bits());
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
        let mut values = good[1].to_f32();
        values[17] = bad;
        let norm = step(&mut all, &[good[0].clone(), matrix(values, &[40])], 2, &STEP).unwrap();
        if bad == 1e30 {
            // A square that float32 cannot hold: the norm says so, or holds it.
            assert!(norm.is_infinite() || (norm * STEP.weight / 1e30 - 1.0).abs() < 1e-6);
            if norm.is_finite() {
                continue;
            }
        }
        assert!(!norm.is_finite(), "{bad}: {norm}");
        assert!(all.iter().zip(&before).all(|(t, before)| t.bits() == *before), "{bad}");
    }
}

/// Values with every upper half and the lower halves at which rounding turns.
pub(crate) fn every_kind_of_number() -> Vec<f32> {
    let lower = [0, 1, 2, 0x1234, 0x7ffe, 0x7fff, 0x8000, 0x8001, 0xcdef, 0xfffe, 0xffff];
    (0..=u32::from(u16::MAX)).flat_map(|upper| lower.map(|low| f32::from_bits(upper << 16 | low))).collect()
}

/// Asserts that bits came back, and that what is no number still is none.
pub(crate) fn assert_restored(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        let same = if want.is_nan() { got.is_nan() } else { got.to_bits() == want.to_bits() };
        assert!(same, "{:#010x} became {:#010x}", want.to_bits(), got.to_bits());
    }
}

#[test]
fn parameter_and_remainder_restore_every_bit_of_the_master() {
    let values = every_kind_of_number();
    let master = matrix(values.clone(), &[values.len()]);
    let [param, rest] = kernels().split_master(&master, DType::Bf16).unwrap();
    assert_eq!((param.dtype(), rest.dtype()), (DType::Bf16, DType::I16));
    assert_restored(&kernels().master(&param, &rest).unwrap().f32s(), &values);
    for (got, value) in param.to_bf16().into_iter().zip(values) {
        // Ties go away from zero, everything else to the nearest.
        let is_tie = value.to_bits() & 0xffff == 0x8000;
        let nearest = bf16::from_f32(value);
        let up = bf16::from_bits(((value.to_bits() >> 16) + 1) as u16);
        match value {
            v if v.is_nan() => assert!(got.is_nan()),
            _ if is_tie => assert_eq!(got.to_bits(), up.to_bits(), "{value:e}"),
            _ => assert_eq!(got.to_bits(), nearest.to_bits(), "{value:e}"),
        }
    }
}

#[test]
fn parameters_start_with_nothing_lost() {
    let p = normal(&mut Lcg::new(1), &[9]);
    assert!(kernels().remainder(&p).unwrap().is_none());
    let narrow = p.cast(DType::Bf16).unwrap();
    let rest = kernels().remainder(&narrow).unwrap().unwrap();
    assert_eq!((rest.shape(), rest.to_f32()), (&[9][..], vec![0.0; 9]));
    assert_eq!(kernels().master(&narrow, &rest).unwrap().to_f32(), narrow.to_f32());
    let half = p.cast(DType::F16).unwrap();
    let message = "a trained parameter's storage is F16, expected F32 or Bf16";
    assert_eq!(kernels().remainder(&half).unwrap_err().to_string(), format!("split_master: {message}"));
    let split = kernels().split_master(&p, DType::F16).unwrap_err();
    assert_eq!(split.to_string(), format!("split_master: {message}"));
}
