//! A row's result does not depend on the rows that are computed beside it: what a draft proposes is verified to the bit
//! that plain decoding computes.

use specforge_testkit::Lcg;

use super::{device, upload};
use crate::tests::attention::{kernel_forward, leaves_of};
use crate::tests::{bits, documents, heads, matrix, rows};
use crate::{Device, Spans, Tensor};

/// One row of a matrix.
fn row(t: &Tensor, r: usize) -> Tensor {
    some_rows(t, r..r + 1)
}

fn some_rows(t: &Tensor, range: std::ops::Range<usize>) -> Tensor {
    let index = Tensor::from_u32(t.device(), range.map(|r| r as u32).collect());
    t.device().kernels().gather_rows(t, &index).unwrap()
}

/// x, weight, bias, residual.
fn linear_inputs(n: usize, out: usize, k: usize, device: Device) -> [Tensor; 4] {
    let mut rng = Lcg::new(17);
    [&[n, k][..], &[out, k], &[out], &[n, out]].map(|shape| {
        let values = rng.normals(shape.iter().product(), 1.0);
        upload(&matrix(values, shape), device)
    })
}

#[test]
fn cuda_rows_of_a_linear_layer_do_not_depend_on_each_other() {
    let Some(device) = device() else { return };
    let kernels = device.kernels();
    for (out, k) in [(100, 512), (264, 1000), (33, 77), (16, 4096)] {
        let [x, w, bias, residual] = linear_inputs(32, out, k, device);
        let linear = |range: std::ops::Range<usize>| {
            let (x, residual) = (some_rows(&x, range.clone()), some_rows(&residual, range));
            let plain = kernels.linear(&x, &[&w], 0..k, &[], None).unwrap();
            let all = kernels.linear(&x, &[&w], 0..k, &[&bias], Some(&residual)).unwrap();
            let part = kernels.columns(&x, 0..k / 2).unwrap();
            let half = kernels.linear(&part, &[&w], 0..k / 2, &[], None).unwrap();
            [plain, all, half]
        };
        let alone: Vec<_> = (0..32).map(|r| linear(r..r + 1).map(|y| bits(&y))).collect();
        for n in (2..=32).chain([1]) {
            let (first, together) = (32 - n, linear(32 - n..32));
            for (y, which) in together.iter().zip(0..) {
                let one = |r: usize| bits(&row(y, r)) == alone[first + r][which];
                assert!((0..n).all(one), "{n} rows x {out} x {k}, product {which}");
            }
        }
    }
}

#[test]
fn cuda_statistics_of_a_row_do_not_depend_on_other_rows() {
    let Some(device) = device() else { return };
    let [hidden, head, ..] = linear_inputs(32, 3000, 64, device);
    let stats = |range: std::ops::Range<usize>| {
        let stats = device.kernels().vocab_stats(&some_rows(&hidden, range), &head).unwrap();
        (stats.argmax.to_u32(), bits(&stats.logsumexp))
    };
    let together = stats(0..32);
    for r in 0..32 {
        assert_eq!(stats(r..r + 1), (vec![together.0[r]], vec![together.1[r]]), "row {r}");
    }
}

#[test]
fn cuda_rows_of_an_attention_do_not_depend_on_each_other() {
    let Some(device) = device() else { return };
    let n = 200;
    for head_dim in [16, 64, 80, 128, 256] {
        let s = heads(4, 2, head_dim);
        for (window, n_extras) in [(usize::MAX, 0), (usize::MAX, 3), (50, 1)] {
            let leaves: Vec<Tensor> =
                leaves_of(s, n, n, n_extras).iter().map(|t| upload(t, device)).collect();
            let spans = documents(&[n], window);
            let attend = |range: std::ops::Range<usize>| {
                let pick = |t: &Tensor| Tensor::from_u32(device, t.u32s().unwrap()[range.clone()].to_vec());
                let spans = Spans { lo: pick(&spans.lo), hi: pick(&spans.hi) };
                let query = some_rows(&leaves[0], range.clone());
                let extras = leaves[3..].iter().map(|t| some_rows(t, range.clone()));
                let leaves: Vec<Tensor> =
                    [query].into_iter().chain(leaves[1..3].to_vec()).chain(extras).collect();
                let (out, lse) = kernel_forward(s, &spans, &leaves, &vec![None; n_extras], None).unwrap();
                [out, lse]
            };
            let together = attend(0..n);
            for range in [0..1, 1..2, 63..64, 64..66, 70..150, 127..129, 199..200, 100..200] {
                let part = attend(range.clone());
                for (all, part) in together.iter().zip(&part) {
                    let same = bits(&some_rows(all, range.clone())) == bits(part);
                    assert!(same, "{s:?}, window {window}, {n_extras} extras, rows {range:?}");
                }
            }
        }
    }
}

/// Keys that are appended later change nothing for those who do not see them: a cache grows while decoding.
#[test]
fn cuda_attention_does_not_depend_on_keys_it_does_not_see() {
    let Some(device) = device() else { return };
    for head_dim in [64, 80, 128, 256] {
        let s = heads(4, 2, head_dim);
        let leaves: Vec<Tensor> = leaves_of(s, 300, 300, 0).iter().map(|t| upload(t, device)).collect();
        let attend = |keys: usize, r: usize| {
            let query = row(&leaves[0], r);
            let [k, v] = [1, 2].map(|i| some_rows(&leaves[i], 0..keys));
            let on = |v: usize| rows([v as u32]).to_device(device).unwrap();
            let spans = Spans { lo: on(0), hi: on(r + 1) };
            let (out, lse) = kernel_forward(s, &spans, &[query, k, v], &[], None).unwrap();
            [bits(&out), bits(&lse)]
        };
        for r in [0, 5, 63, 64, 127, 130, 250] {
            let first = attend(r + 1, r);
            assert!(
                [r + 2, r + 7, 299, 300].iter().all(|&keys| attend(keys.min(300), r) == first),
                "{s:?}, row {r}"
            );
        }
    }
}
