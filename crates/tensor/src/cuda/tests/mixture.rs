//! Mixtures of experts and the gated delta rule.

use specforge_testkit::Lcg;

use super::{assert_near, device, rounded, upload};
use crate::tests::delta::Case;
use crate::tests::mixture::{ENDS, Inputs, ends_on, experts_of, grouped, routers, ties};
use crate::tests::{bits, normal, rows};
use crate::{DType, DeltaShape, Device, Tensor};

/// Inputs of a router as both sides have them: bfloat16 but for the correction.
fn on_both(inputs: &Inputs, device: Device) -> [Inputs; 2] {
    let with = |f: &dyn Fn(&Tensor) -> Tensor, correction: Option<Tensor>| Inputs {
        x: f(&inputs.x),
        weight: f(&inputs.weight),
        bias: inputs.bias.as_ref().map(f),
        correction,
        rule: inputs.rule,
    };
    let there = inputs.correction.as_ref().map(|c| c.to_device(device).unwrap());
    [with(&rounded, inputs.correction.clone()), with(&|t| upload(t, device), there)]
}

#[test]
fn cuda_rows_pick_the_same_experts() {
    let Some(device) = device() else { return };
    for n in [1, 40, 500] {
        for (name, inputs) in routers(n) {
            let [here, there] = on_both(&inputs, device).map(|inputs| inputs.routes());
            assert_eq!(experts_of(&there), experts_of(&here), "{name}, {n} rows");
            for [got, want] in
                [[&there.rows, &here.rows], [&there.pairs, &here.pairs], [&there.ends, &here.ends]]
            {
                assert_eq!(got.to_u32(), want.to_u32(), "{name}, {n} rows");
            }
            assert_near(&name, &there.weights, &here.weights);
        }
    }
    for (case, (inputs, expected)) in ties().into_iter().enumerate() {
        let [_, there] = on_both(&inputs, device);
        assert_eq!(experts_of(&there.routes()), expected, "case {case}");
    }
}

#[test]
fn cuda_groups_agree_with_the_cpu() {
    let Some(device) = device() else { return };
    for ends in ENDS {
        let [x, w, bias] = grouped(ends);
        let run = |[x, w, bias]: [Tensor; 3]| {
            let (kernels, ends) = (x.device().kernels(), ends_on(x.device(), ends));
            [None, Some(&bias)].map(|bias| kernels.linear_grouped(&x, &w, bias, &ends).unwrap())
        };
        let here = run([&x, &w, &bias].map(rounded));
        let there = run([&x, &w, &bias].map(|t| upload(t, device)));
        for (got, want) in there.iter().zip(&here) {
            assert_near(&format!("{ends:?}"), got, want);
        }
        let weights = rounded(&bias).rows(0..1).unwrap();
        let index = rows((0..9).map(|r| r % ends[4].max(1) as u32));
        if ends[4] > 0 {
            let sum = |device: Device, y: &Tensor, base: Option<&Tensor>| {
                let (index, weights) = (index.to_device(device).unwrap(), weights.to_device(device).unwrap());
                device.kernels().weighted_rows(y, &index, &weights, base, 3).unwrap()
            };
            let y = rounded(&there[0].to_device(Device::Cpu).unwrap().cast(DType::F32).unwrap());
            let base = y.rows(0..1).unwrap().to_f32().repeat(3);
            let base = rounded(&Tensor::from_f32(Device::Cpu, base, &[3, 9]).unwrap());
            assert_near("a sum", &sum(device, &there[0], None), &sum(Device::Cpu, &y, None));
            let (got, want) =
                (sum(device, &there[0], Some(&upload(&base, device))), sum(Device::Cpu, &y, Some(&base)));
            assert_near("a sum on top", &got, &want);
        }
    }
}

/// Several tiles of rows, columns and of the inner dimension, the last of each not full; and a row's bits do not depend on
/// how many rows are beside it.
#[test]
fn cuda_large_groups_agree_with_the_cpu() {
    let Some(device) = device() else { return };
    let ends = [130, 130, 131, 460, 700];
    let mut rng = Lcg::new(37);
    let [x, w] = [&[700, 584][..], &[5, 300, 584]].map(|shape| rounded(&normal(&mut rng, shape)));
    let linear = |x: &Tensor, w: &Tensor, ends| {
        x.device().kernels().linear_grouped(x, w, None, &ends_on(x.device(), ends)).unwrap()
    };
    let (there, w_there) = (upload(&x, device), upload(&w, device));
    let all = linear(&there, &w_there, ends);
    assert_near("bf16", &all, &linear(&x, &w, ends));
    let few = linear(&there.rows(0..5).unwrap(), &w_there, [5; 5]);
    assert_eq!(bits(&few), bits(&all.rows(0..5).unwrap()), "the bits of rows beside fewer others");
    let [x, w] = [&[700, 592][..], &[5, 300, 592]].map(|shape| rounded(&normal(&mut rng, shape)));
    match upload(&w, device).quantize_rows() {
        Err(why) => println!("skipped: {why}"),
        Ok(eight) => {
            let got = linear(&upload(&x, device), &eight, ends);
            super::assert_near_within("8 bits", &got, &linear(&x, &w, ends), 5e-2);
        }
    }
}

/// A row of an expert has the same bits whatever rows are beside it, up to 32 of them.
#[test]
fn cuda_rows_of_a_group_do_not_depend_on_each_other() {
    let Some(device) = device() else { return };
    let [x, w, _] = grouped([0, 32, 32, 32, 32]).map(|t| upload(&t, device));
    let linear = |n: usize| {
        let ends = ends_on(device, [0, n, n, n, n]);
        device.kernels().linear_grouped(&x.rows(0..n).unwrap(), &w, None, &ends)
    };
    let all = linear(32).unwrap();
    for n in [1, 2, 9, 31] {
        assert_eq!(bits(&linear(n).unwrap()), bits(&all.rows(0..n).unwrap()), "{n} rows");
    }
}

#[test]
fn cuda_groups_of_8_bit_weights_agree() {
    let Some(device) = device() else { return };
    let ends = ENDS[1];
    let [x, w, _] = grouped(ends);
    let wide = |t: &Tensor, shape: &[usize]| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i| t.f32s()[i % t.len()]).collect();
        Tensor::from_f32(Device::Cpu, values, shape).unwrap()
    };
    let (x, w) = (rounded(&wide(&x, &[ends[4], 64])), rounded(&wide(&w, &[5, 16, 64])));
    let linear =
        |x: &Tensor, w: &Tensor| x.device().kernels().linear_grouped(x, w, None, &ends_on(x.device(), ends));
    let want = linear(&x, &w).unwrap();
    match upload(&w, device).quantize_rows() {
        Err(why) => println!("skipped: {why}"),
        Ok(w) => {
            let got = linear(&upload(&x, device), &w).unwrap();
            super::assert_near_within("8 bits", &got, &want, 5e-2);
        }
    }
}

fn case_on(case: &Case, device: Device) -> [Case; 2] {
    let here = Case { qkv: rounded(&case.qkv), ba: rounded(&case.ba), ..case.clone() };
    let on = |t: &Tensor| t.to_device(device).unwrap();
    let there = Case {
        qkv: upload(&case.qkv, device),
        ba: upload(&case.ba, device),
        gates: [on(&case.gates[0]), on(&case.gates[1])],
        states: on(&case.states),
        ..case.clone()
    };
    [here, there]
}

#[test]
fn cuda_delta_rules_agree_with_the_cpu() {
    let Some(device) = device() else { return };
    for [key_heads, value_heads, key_dim, value_dim] in [[2, 4, 16, 16], [1, 2, 64, 40], [2, 4, 128, 128]] {
        let shape = DeltaShape { key_heads, value_heads, key_dim, value_dim };
        for case in
            [Case::documents(shape, 130, &[0, 3, 70]), Case::documents(shape, 2, &[]), Case::tree(shape)]
        {
            let [here, there] = case_on(&case, device);
            let ([want, want_states], [got, got_states]) = (here.run(), there.run());
            assert_near(&format!("{shape:?}"), &got, &want);
            assert_near(&format!("{shape:?}, states"), &got_states, &want_states);
            assert_eq!(
                there.run().map(|t| bits(&t)),
                [got, got_states].map(|t| bits(&t)),
                "the same bits again"
            );
        }
    }
}

#[test]
fn cuda_delta_rules_of_other_widths_are_refused() {
    let Some(device) = device() else { return };
    let shape = DeltaShape { key_heads: 1, value_heads: 1, key_dim: 6, value_dim: 6 };
    let [_, there] = case_on(&Case::tree(shape), device);
    let message = there.try_run().unwrap_err().to_string();
    assert!(
        message.starts_with("delta_rule on a CUDA device: keys of 6 and values of 6 elements"),
        "{message}"
    );
}
