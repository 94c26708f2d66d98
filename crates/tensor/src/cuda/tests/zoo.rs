//! Every operation of the zoo, and shapes that reach each way through a kernel.

use specforge_testkit::Lcg;

use super::{all_bits, assert_near, check, device, on_both};
use crate::tests::zoo::TREE;
use crate::tests::{Op, frozen, matrix, normal, rows, zoo};
use crate::{DType, Device, Result, Rope, Tape, Tensor, Var, Weight};

#[test]
fn cuda_operations_agree_with_the_cpu() {
    let Some(device) = device() else { return };
    for n in [1, 2, 7, 33, 130, 300] {
        for (name, op) in zoo(n) {
            for storage in [DType::Bf16, DType::F32] {
                let name = format!("{name}, {n} rows, {storage:?} parameters");
                if !name.starts_with(TREE) {
                    check(&name, &op, device, storage);
                    continue;
                }
                let [here, there] = on_both(&op, device, storage);
                assert_near(&name, &there.value(), &here.value());
                let error = there.try_gradients(3).unwrap_err().to_string();
                let message =
                    "attention_backward on a CUDA device: extra keys with an index have no gradient";
                assert!(error.starts_with(message), "{error}");
            }
        }
    }
}

#[test]
fn cuda_operations_give_the_same_bits_again() {
    let Some(device) = device() else { return };
    for n in [1, 33, 300] {
        for (name, op) in zoo(n).into_iter().filter(|(name, _)| *name != TREE) {
            let [_, op] = on_both(&op, device, DType::Bf16);
            let first = all_bits(&op);
            assert!((0..3).all(|_| all_bits(&op) == first), "{name}, {n} rows");
        }
    }
}

#[test]
fn cuda_operations_take_no_rows() {
    let Some(device) = device() else { return };
    for (name, op) in zoo(0).into_iter().filter(|(name, _)| *name != TREE) {
        let [_, op] = on_both(&op, device, DType::Bf16);
        let (value, _, gradients) = op.gradients(1);
        assert_eq!(value.rows_cols().0, 0, "{name}");
        let shapes: Vec<_> = op.leaves.iter().chain(&op.params).map(Tensor::shape).collect();
        assert_eq!(gradients.iter().map(Tensor::shape).collect::<Vec<_>>(), shapes, "{name}");
        assert!(gradients.iter().all(|g| g.to_f32().iter().all(|&v| v == 0.0)), "{name}");
    }
}

/// An operation on normal numbers of these shapes, divided by `scale`.
fn random(
    leaves: &[&[usize]],
    params: &[&[usize]],
    scale: f32,
    forward: impl Fn(&Tape<'_>, &[Var], &[crate::ParamId]) -> Result<Var> + Sync + Send + 'static,
) -> Op {
    let mut rng = Lcg::new(41);
    let mut all = |shapes: &[&[usize]], scale: f32| -> Vec<Tensor> {
        let draw = |shape: &&[usize]| matrix(rng.normals(shape.iter().product(), scale), shape);
        shapes.iter().map(draw).collect()
    };
    let (leaves, params) = (all(leaves, 1.0), all(params, scale));
    Op::new(leaves, params, forward)
}

#[test]
fn cuda_linear_layers_agree_at_every_size() {
    let Some(device) = device() else { return };
    // Few rows and many; whole tiles and not; widths that are read 16 bytes at a time and not.
    let sizes =
        [(1, 512, 1024), (5, 100, 256), (32, 264, 520), (33, 512, 256), (64, 513, 255), (300, 1024, 768)];
    for (r, n, k) in sizes {
        let op = random(&[&[r, k], &[r, n]], &[&[n, k], &[n]], (k as f32).powf(-0.5), |t, v, p| {
            t.linear_add(&v[0], &Weight::of(p[0]).with_bias(Some(p[1])), &v[1])
        });
        check(&format!("{r} x {n} x {k}"), &op, device, DType::Bf16);
        let op = random(&[&[r, k]], &[&[n, k + 264]], (k as f32).powf(-0.5), move |t, v, p| {
            t.linear(&v[0], &Weight::of(p[0]).columns(256..256 + k))
        });
        check(&format!("{r} x {n} x {k}, columns"), &op, device, DType::Bf16);
    }
}

#[test]
fn cuda_norms_agree_at_every_width() {
    let Some(device) = device() else { return };
    for (n, d) in [(300, 256), (40, 300), (600, 2048), (3, 3001), (9, 4096), (5, 5000), (4, 8192), (6, 9000)]
    {
        let op = random(&[&[n, d]], &[&[d]], 1.0, |t, v, p| {
            let y = t.rms_norm(&v[0], p[0], 1e-5)?;
            t.add(&y, &v[0])
        });
        check(&format!("{n} rows of {d}"), &op, device, DType::Bf16);
    }
    let op = random(&[&[100, 8 * 128]], &[&[128]], 1.0, |t, v, p| t.rms_norm(&v[0], p[0], 1e-6));
    check("heads of 128", &op, device, DType::Bf16);
}

#[test]
fn cuda_swiglu_agrees_at_every_width() {
    let Some(device) = device() else { return };
    for (n, width) in [(300, 2 * 2048), (7, 2 * 1001), (1, 2 * 8)] {
        let op = random(&[&[n, width]], &[], 1.0, |t, v, _| t.swiglu(&v[0]));
        check(&format!("{n} rows of {width}"), &op, device, DType::Bf16);
    }
    // Far out: a gate whose sigmoid is zero or one.
    let gate = (-150..150).map(|i| i as f32).chain((0..300).map(|i| (i as f32).cos()));
    let op = Op::new(vec![matrix(gate.collect(), &[1, 600])], vec![], |t, v, _| t.swiglu(&v[0]));
    check("far out", &op, device, DType::Bf16);
}

#[test]
fn cuda_operations_of_frozen_targets_agree() {
    let Some(device) = device() else { return };
    for (name, op) in frozen::element_wise() {
        let [here, there] = on_both(&op, device, DType::Bf16);
        assert_near(name, &there.value(), &here.value());
    }
}

#[test]
fn cuda_rotations_agree_at_every_head_width() {
    let Some(device) = device() else { return };
    for (head_dim, half) in [(64, 32), (80, 40), (96, 48), (128, 64), (256, 128), (128, 32), (80, 20)] {
        let table = |f: fn(f32) -> f32| {
            let values = (0..50 * half).map(|i| f((i / half) as f32 / 1.1f32.powi((i % half) as i32)));
            matrix(values.collect(), &[50, half])
        };
        let (cos, sin) = (table(f32::cos), table(f32::sin));
        let op = random(&[&[200, 5 * head_dim]], &[], 1.0, move |t, v, _| {
            let on = |t: &Tensor| t.to_device(v[0].value().device());
            let positions = on(&rows((0..200).map(|i| i * 7 % 50)))?;
            // The last head is values.
            t.rope(&v[0], &Rope { n_heads: 4, head_dim, cos: on(&cos)?, sin: on(&sin)?, positions })
        });
        check(&format!("heads of {head_dim}, {half} pairs"), &op, device, DType::Bf16);
    }
}

#[test]
fn cuda_gradients_of_earlier_tapes_are_added_to() {
    let Some(device) = device() else { return };
    let mut rng = Lcg::new(2);
    let (w, b) = (normal(&mut rng, &[48, 64]), normal(&mut rng, &[48]));
    let x: Vec<Tensor> = [40, 7, 100].iter().map(|&n| normal(&mut rng, &[n, 64])).collect();
    let run = |device: Device| {
        let mut params = crate::Params::new();
        let [w, b] = [&w, &b].map(|t| params.add("p", super::upload(t, device), true));
        let mut grads = crate::Grads::new();
        for x in &x {
            let tape = Tape::accumulating(&params, grads);
            let y = tape
                .linear(&tape.input(super::upload(x, device)), &Weight::of(w).with_bias(Some(b)))
                .unwrap();
            let dy = super::upload(&normal(&mut Lcg::new(1), y.value().shape()), device);
            grads = tape.backward_from(vec![(y, dy)]).unwrap();
        }
        [w, b].map(|id| grads.get(id).unwrap().clone())
    };
    let (got, want) = (run(device), run(Device::Cpu));
    assert_near("weight", &got[0], &want[0]);
    assert_near("bias", &got[1], &want[1]);
}
