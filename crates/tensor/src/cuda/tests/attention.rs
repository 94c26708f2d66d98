//! Attention over head sizes, head ratios, spans, extras and sinks.

use specforge_testkit::assert_close;

use super::{assert_near, check, device, on_both, rounded, upload};
use crate::tests::attention::{kernel_forward, leaves_of, plain};
use crate::tests::frozen::capped;
use crate::tests::{Op, attend, documents, heads, matrix, normal, rows};
use crate::{Attention, AttentionShape, DType, Device, KeyValue, Part, Spans, Tensor};

const HEAD_DIMS: [usize; 7] = [16, 32, 64, 80, 96, 128, 256];
const LENGTHS: [usize; 7] = [1, 33, 2, 100, 1, 64, 1];

/// Forward and backward of an attention over `keys` rows of keys.
fn check_all(name: &str, s: AttentionShape, spans: &Spans, keys: usize, n_extras: usize, device: Device) {
    let leaves = leaves_of(s, spans.lo.len(), keys, n_extras);
    let op = attend(s, spans.clone(), leaves, vec![None; n_extras]);
    check(&format!("{name}, {s:?}, {n_extras} extras"), &op, device, DType::Bf16);
}

#[test]
fn cuda_attention_agrees_over_head_sizes_and_ratios() {
    let Some(device) = device() else { return };
    let n = LENGTHS.iter().sum();
    for head_dim in HEAD_DIMS {
        for (n_heads, n_kv_heads) in [(2, 2), (4, 2), (4, 1), (8, 1)] {
            let s = heads(n_heads, n_kv_heads, head_dim);
            for (window, n_extras) in [(usize::MAX, 0), (usize::MAX, 6), (40, 1)] {
                let name = format!("window {window}");
                check_all(&name, s, &documents(&LENGTHS, window), n, n_extras, device);
            }
        }
    }
}

#[test]
fn cuda_attention_agrees_over_windows_and_extras() {
    let Some(device) = device() else { return };
    let n = LENGTHS.iter().sum();
    for head_dim in [64, 80, 128, 256] {
        for window in [usize::MAX, 130, 64, 7, 1] {
            for n_extras in [0, 1, 6] {
                let s = heads(4, 2, head_dim);
                check_all(&format!("window {window}"), s, &documents(&LENGTHS, window), n, n_extras, device);
            }
        }
    }
}

#[test]
fn cuda_attention_agrees_over_many_tiles() {
    let Some(device) = device() else { return };
    for head_dim in [64, 128, 256] {
        for window in [usize::MAX, 150] {
            let spans = documents(&[700], window);
            check_all(&format!("700 rows, window {window}"), heads(2, 1, head_dim), &spans, 700, 2, device);
        }
    }
}

#[test]
fn cuda_capped_attention_agrees() {
    let Some(device) = device() else { return };
    for head_dim in [16, 80, 128, 256] {
        for (cap, window, lengths) in
            [(0.7, usize::MAX, &LENGTHS[..]), (50.0, 40, &LENGTHS), (2.0, 150, &[400])]
        {
            let (s, n) = (heads(4, 2, head_dim), lengths.iter().sum());
            let op = capped(s, documents(lengths, window), leaves_of(s, n, n, 1), vec![None], cap);
            let [here, there] = on_both(&op, device, DType::Bf16);
            assert_near(&format!("{s:?}, cap {cap}"), &there.value(), &here.value());
        }
    }
}

/// Some rows of these spans, in order.
fn some_rows(spans: &Spans, keep: impl Fn(usize) -> bool) -> Spans {
    let pick = |t: &Tensor| {
        let kept = t.u32s().unwrap().iter().enumerate().filter(|(r, _)| keep(*r));
        rows(kept.map(|(_, &v)| v).collect::<Vec<_>>())
    };
    Spans { lo: pick(&spans.lo), hi: pick(&spans.hi) }
}

#[test]
fn cuda_attention_agrees_for_live_rows() {
    let Some(device) = device() else { return };
    let spans = documents(&[3, 200, 1, 1, 150, 45], usize::MAX);
    for head_dim in [16, 64, 80, 128, 256] {
        let s = heads(4, 2, head_dim);
        let check = |name: &str, keep: &dyn Fn(usize) -> bool| {
            let spans = some_rows(&spans, keep);
            check_all(name, s, &spans, 400, 0, device);
            check_all(name, s, &spans, 400, 3, device);
        };
        check("two of three", &|r| r % 3 != 1);
        check("a few", &|r| r % 50 == 7);
        check("the last", &|r| r == 399);
        check("none of a document", &|r| !(3..203).contains(&r));
    }
}

#[test]
fn cuda_attention_agrees_for_rows_that_see_nothing() {
    let Some(device) = device() else { return };
    let (mut lo, mut hi) = (vec![0; 70], vec![0; 70]);
    for r in 0..100u32 {
        // Every seventh sees nothing; the others a window.
        lo.push(r);
        hi.push(if r % 7 == 0 { r } else { r + 1 });
    }
    // Ends never decrease.
    (1..hi.len()).for_each(|r| hi[r] = hi[r].max(hi[r - 1]).max(lo[r]));
    [&mut lo, &mut hi].into_iter().for_each(|bounds| bounds.extend([100; 66]));
    let spans = Spans { lo: rows(lo), hi: rows(hi) };
    let nothing = Spans { lo: rows([0; 5]), hi: rows([0; 5]) };
    for head_dim in HEAD_DIMS {
        let s = heads(4, 2, head_dim);
        check_all("some rows", s, &spans, 100, 0, device);
        check_all("some rows", s, &spans, 100, 2, device);
        check_all("all rows", s, &nothing, 9, 0, device);
        check_all("all rows", s, &nothing, 9, 1, device);
        check_all("no keys at all", s, &nothing, 0, 1, device);
    }
}

#[test]
fn cuda_attention_agrees_where_all_see_all() {
    let Some(device) = device() else { return };
    let (lo, hi) = ([vec![0; 150], vec![150; 90]].concat(), [vec![150; 150], vec![240; 90]].concat());
    let spans = Spans { lo: rows(lo), hi: rows(hi) };
    for head_dim in [64, 96, 128, 256] {
        check_all("bidirectional", heads(4, 1, head_dim), &spans, 240, 1, device);
    }
}

#[test]
fn cuda_attention_reads_columns() {
    let Some(device) = device() else { return };
    for head_dim in [64, 80, 128] {
        let shape = heads(4, 2, head_dim);
        let width = 4 * head_dim;
        // Query, then something else, then keys and values.
        let packed = normal(&mut specforge_testkit::Lcg::new(3), &[150, width + 16 + width]);
        let op = Op::new(vec![packed], vec![], move |t, v, _| {
            let on = |t: &Tensor| t.to_device(v[0].value().device());
            let spans = documents(&[50, 100], usize::MAX);
            let spans = Spans { lo: on(&spans.lo)?, hi: on(&spans.hi)? };
            let (query, base) = (Part::new(&v[0], 0), KeyValue::packed(&v[0], width + 16, shape));
            let extras = [(base.clone(), None)];
            t.attention(&Attention { shape, query, base: &base, spans: &spans, extras: &extras })
        });
        check(&format!("{shape:?}"), &op, device, DType::Bf16);
    }
}

/// Output and log-sum-exp of the forward kernel against float64 arithmetic.
fn check_forward(
    name: &str,
    s: AttentionShape,
    spans: &Spans,
    (leaves, indices, sinks): (&[Tensor], &[Option<Tensor>], Option<&Tensor>),
    device: Device,
) {
    let leaves: Vec<Tensor> = leaves.iter().map(rounded).collect();
    let [out, lse] = plain(s, spans, &leaves, indices, sinks);
    let on = |t: &Tensor| t.to_device(device).unwrap();
    let there: Vec<Tensor> = leaves.iter().map(|t| upload(t, device)).collect();
    let spans_there = Spans { lo: on(&spans.lo), hi: on(&spans.hi) };
    let indices: Vec<Option<Tensor>> = indices.iter().map(|i| i.as_ref().map(on)).collect();
    let sinks = sinks.map(on);
    let (got, got_lse) = kernel_forward(s, &spans_there, &there, &indices, sinks.as_ref()).unwrap();
    assert_near(name, &got, &matrix(out, &[spans.lo.len(), s.n_heads * s.head_dim]));
    assert_eq!(got_lse.dtype(), DType::F32);
    assert_close(&format!("{name}, log-sum-exp"), &got_lse.to_f32(), &lse, 1e-3, 1e-4);
}

#[test]
fn cuda_attention_reads_extras_by_index() {
    let Some(device) = device() else { return };
    let n: usize = LENGTHS.iter().sum();
    let tree = |step: u32| {
        rows((0..n as u32).map(move |r| if r % 5 == step { u32::MAX } else { (r * 7 + step) % 37 }))
    };
    let spans = documents(&LENGTHS, 90);
    for head_dim in HEAD_DIMS {
        let s = heads(4, 2, head_dim);
        let mut leaves = leaves_of(s, n, n, 3);
        // The extras by index have rows of their own number.
        leaves[5..].iter_mut().for_each(|t| t.truncate_rows(37));
        let indices = [None, Some(tree(1)), Some(tree(2))];
        check_forward(&format!("{s:?}"), s, &spans, (&leaves, &indices, None), device);
    }
}

#[test]
fn cuda_attention_takes_sinks() {
    let Some(device) = device() else { return };
    let sinks = matrix(vec![-30.0, 0.5, 2.0, 30.0], &[4]);
    let mut spans = documents(&[40, 1, 100], 60);
    // Two rows have nothing but their sink.
    let ends = spans.hi.u32s().unwrap().iter().zip(0..);
    spans.hi = rows(ends.map(|(&end, r)| if r == 40 || r == 41 { r } else { end }).collect::<Vec<_>>());
    for head_dim in HEAD_DIMS {
        let s = heads(4, 2, head_dim);
        for n_extras in [0, 2] {
            let (leaves, indices) = (leaves_of(s, 141, 141, n_extras), vec![None; n_extras]);
            let name = format!("{s:?}, {n_extras} extras");
            check_forward(&name, s, &spans, (&leaves, &indices, Some(&sinks)), device);
        }
    }
}

#[test]
fn cuda_attention_survives_large_scores() {
    let Some(device) = device() else { return };
    for head_dim in [16, 64, 128, 256] {
        let s = AttentionShape { scale: 20.0, ..heads(2, 1, head_dim) };
        let leaves = leaves_of(s, 90, 90, 1).iter().map(|t| upload(t, device)).collect();
        let (value, _, gradients) = attend(s, documents(&[90], usize::MAX), leaves, vec![None]).gradients(1);
        let finite = |t: &Tensor| t.to_f32().iter().all(|v| v.is_finite());
        assert!(gradients.iter().chain([&value]).all(finite), "{s:?}");
    }
}

#[test]
fn cuda_attention_says_what_it_does_not_do() {
    let Some(device) = device() else { return };
    let error = |head_dim: usize, n_extras: usize| {
        let s = heads(1, 1, head_dim);
        let leaves = leaves_of(s, 3, 3, n_extras).iter().map(|t| upload(t, device)).collect();
        attend(s, documents(&[3], 9), leaves, vec![None; n_extras]).try_gradients(1).unwrap_err().to_string()
    };
    let known = "[16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256]";
    let message = format!("attention on a CUDA device: heads of 24 elements; there are kernels for {known}");
    assert_eq!(error(24, 0), message);
    let message = "attention on a CUDA device: 33 extra keys per query, at most 32";
    assert_eq!(error(64, 33), message);
}

/// Two attentions over different keys of the same queries make that over all of them; some queries see keys of one of
/// them alone, some see none.
#[test]
fn cuda_parallel_partial_attentions_merge_as_on_the_cpu() {
    let Some(device) = device() else { return };
    let (rows, heads) = (70, 4);
    for dim in [64, 20] {
        let out = |seed: u32| {
            let value = |i: usize| ((i as u32 * 37 + seed) as f32 * 0.37).sin();
            matrix((0..rows * heads * dim).map(value).collect(), &[rows, heads * dim])
        };
        let lse = |seed: usize| {
            let value = |i: usize| {
                if (i + seed).is_multiple_of(5) { f32::NEG_INFINITY } else { (i % 9) as f32 - 3.0 }
            };
            matrix((0..rows * heads).map(value).collect(), &[rows, heads])
        };
        let parts = [(rounded(&out(1)), lse(0)), (rounded(&out(2)), lse(10))];
        let [a, b] = parts.map(|(out, lse)| {
            let there = (upload(&out, device), lse.to_device(device).unwrap());
            ((out, lse), there)
        });
        let (want, want_lse) = Device::Cpu.kernels().merge_attention(&a.0, &b.0).unwrap();
        let (got, got_lse) = device.kernels().merge_attention(&a.1, &b.1).unwrap();
        assert_near("merged", &got, &want);
        for (got, want) in got_lse.to_f32().iter().zip(want_lse.to_f32()) {
            assert!(*got == want || (got - want).abs() < 1e-4, "{got}, on the CPU {want}");
        }
    }
}
