//! Parameters that lie one below the other.

use specforge_testkit::Lcg;

use super::{assert_near, assert_near_within, device, on_both};
use crate::tests::{Op, bits, matrix, normal};
use crate::{DType, Device, Grads, ParamId, Params, Tape, Tensor, Weight};

/// Three layers over one input, with biases, and a residual.
fn layers(n: usize) -> Op {
    let mut rng = Lcg::new(13);
    let mut x = |shape: &[usize], scale: f32| matrix(rng.normals(shape.iter().product(), scale), shape);
    let leaves = vec![x(&[n, 64], 1.0), x(&[n, 192], 1.0)];
    let weights = [128, 32, 32].map(|out| x(&[out, 64], 0.125));
    let biases = [128, 32, 32].map(|out| x(&[out], 1.0));
    Op::new(leaves, [weights, biases].concat(), |t, v, p| {
        let layer = |i: usize| Weight::of(p[i]).with_bias(Some(p[i + 3]));
        t.linear_add(&v[0], &Weight::stacked(&[&layer(0), &layer(1), &layer(2)]), &v[1])
    })
}

/// The parameters of an operation; the three weights stacked if asked for.
fn declared(op: &Op, stacked: bool) -> (Params, Vec<ParamId>) {
    let mut params = Params::new();
    let ids: Vec<ParamId> = op.params.iter().map(|p| params.add("p", p.clone(), true)).collect();
    if stacked {
        params.stack(&ids[..3]).unwrap();
    }
    (params, ids)
}

fn lie_together(tensors: &[&Tensor]) -> bool {
    tensors.windows(2).all(|pair| pair[0].stored().unwrap().is_before(pair[1].stored().unwrap()).unwrap())
}

#[test]
fn cuda_stacked_layers_agree_with_layers_apart() {
    let Some(device) = device() else { return };
    for n in [1, 7, 32, 33, 200] {
        for storage in [DType::Bf16, DType::F32] {
            let [here, there] = on_both(&layers(n), device, storage);
            let run = |op: &Op, stacked| {
                let (params, ids) = declared(op, stacked);
                op.gradients_of(&params, &ids, 3).unwrap()
            };
            let (want, apart, stacked) = (run(&here, false), run(&there, false), run(&there, true));
            for (name, got) in [("apart", &apart), ("stacked", &stacked)] {
                let name = format!("{name}, {n} rows, {storage:?}");
                assert_near(&name, &got.0, &want.0);
                for (i, (got, want)) in got.2.iter().zip(&want.2).enumerate() {
                    assert_near(&format!("{name}, gradient {i}"), got, want);
                }
            }
            if n <= 32 {
                assert_eq!(bits(&apart.0), bits(&stacked.0), "{n} rows, {storage:?}");
            }
        }
    }
}

#[test]
fn cuda_stacks_and_their_gradients_lie_together() {
    let Some(device) = device() else { return };
    let [_, op] = on_both(&layers(40), device, DType::Bf16);
    let (mut params, ids) = declared(&op, true);
    let together = |params: &Params| lie_together(&[0, 1, 2].map(|i| &params.get(ids[i]).value));
    assert!(together(&params));
    for (id, value) in ids.iter().zip(&op.params) {
        assert_eq!(bits(&params.get(*id).value), bits(value));
    }
    let mut grads = Grads::new();
    for _ in 0..2 {
        let tape = Tape::accumulating(&params, grads);
        let leaves: Vec<_> = op.leaves.iter().map(|t| tape.input(t.clone())).collect();
        let y = (op.forward)(&tape, &leaves, &ids).unwrap();
        let dy = super::upload(&normal(&mut Lcg::new(1), y.value().shape()), device);
        grads = tape.backward_from(vec![(y, dy)]).unwrap();
        assert!(lie_together(&[0, 1, 2].map(|i| grads.get(ids[i]).unwrap())));
    }
    // A checkpoint's values take the place of the old ones.
    for id in &ids {
        let values = params.get(*id).value.to_device(Device::Cpu).unwrap();
        params.get_mut(*id).value.assign(&values).unwrap();
    }
    assert!(together(&params));
}

#[test]
fn a_cuda_optimizer_step_leaves_stacks_together() {
    let Some(device) = device() else { return };
    let [_, op] = on_both(&layers(1), device, DType::Bf16);
    let (mut params, ids) = declared(&op, true);
    let mut rng = Lcg::new(4);
    for id in &ids[..3] {
        let value = &mut params.get_mut(*id).value;
        let grad = normal(&mut rng, value.shape()).to_device(device).unwrap();
        let zeros = || Tensor::zeros(device, grad.shape()).unwrap();
        let (mut remainder, mut exp_avg, mut exp_avg_sq) =
            (device.kernels().remainder(value).unwrap(), zeros(), zeros());
        let tensor = crate::AdamTensor {
            param: value,
            remainder: remainder.as_mut(),
            exp_avg: &mut exp_avg,
            exp_avg_sq: &mut exp_avg_sq,
            grad: &grad,
            step: 1,
            share: 1.0,
        };
        device
            .kernels()
            .adamw(&mut [tensor], &crate::tests::adam::STEP, &crate::Across::default())
            .unwrap()
            .wait()
            .unwrap();
    }
    assert!(lie_together(&[0, 1, 2].map(|i| &params.get(ids[i]).value)));
}

/// A weight used five times over its own output, as in test-time training: its gradient is one product over all rows.
#[test]
fn cuda_a_weight_used_again_and_again_has_the_sum_of_its_gradients() {
    let Some(device) = device() else { return };
    for n in [1, 33, 200, 2100] {
        let mut rng = Lcg::new(17);
        let mut x = |shape: &[usize], scale: f32| matrix(rng.normals(shape.iter().product(), scale), shape);
        let leaves = vec![x(&[n, 64], 1.0)];
        let params = vec![x(&[256, 64], 0.125), x(&[64, 128], 0.03), x(&[64, 128], 0.125)];
        let op = Op::new(leaves, params, |t, v, p| {
            let (gate_up, down, half) =
                (Weight::of(p[0]), Weight::of(p[1]), Weight::of(p[2]).columns(64..128));
            let mut h = v[0].clone();
            for _ in 0..5 {
                let a = t.linear(&h, &half)?;
                h = t.swiglu_linear_add(&t.linear(&a, &gate_up)?, &down, &h)?;
            }
            Ok(h)
        });
        let [here, there] = on_both(&op, device, DType::Bf16);
        let ((_, _, want), (_, _, got)) = (here.gradients(3), there.gradients(3));
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            // Five layers of intermediate values in bfloat16.
            assert_near_within(&format!("{n} rows, gradient {i}"), got, want, 3e-2);
        }
        assert_eq!(super::all_bits(&there), super::all_bits(&there), "{n} rows: the same bits");
    }
}
