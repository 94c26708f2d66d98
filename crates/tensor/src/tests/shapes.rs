//! Wrong calls and what they are told.

use super::loss::Case;
use super::{heads, matrix, rows};
use crate::{
    Attention, AttentionShape, Collected, DType, Device, KeyValue, Objective, Params, Part, Result, Rope,
    Spans, Tape, Tensor, Var, Weight,
};

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(Device::Cpu, shape).unwrap()
}

fn check(result: Result<Var>, message: &str) {
    assert_eq!(result.map(|v| v.value().shape().to_vec()).unwrap_err().to_string(), message);
}

#[test]
fn wrong_operands_are_named() {
    let mut params = Params::new();
    let w = params.add("w", zeros(&[4, 6]), true);
    let b = params.add("b", zeros(&[5]), true);
    let empty = params.add("empty", zeros(&[0]), true);
    let (narrow, four) = (params.add("narrow", zeros(&[3, 5]), true), params.add("four", zeros(&[4]), true));
    let tape = Tape::recording(&params);
    let x = |shape: &[usize]| tape.input(zeros(shape));
    check(tape.linear(&x(&[2, 5]), &Weight::of(w)), "linear: input has shape [2, 5], expected [.., 6]");
    check(
        tape.linear(&x(&[2, 6]), &Weight::of(w).with_bias(Some(b))),
        "linear: bias has shape [5], expected [4]",
    );
    check(
        tape.linear(&x(&[2, 4]), &Weight::of(w).columns(4..8)),
        "linear: weight has shape [4, 6], expected [.., 8]",
    );
    check(
        tape.linear(&x(&[2, 3]), &Weight::of(w).columns(2..4)),
        "linear: input has shape [2, 3], expected [.., 2]",
    );
    check(
        tape.rms_norm(&x(&[2, 12]), b, 1e-5),
        "rms_norm: weight has shape [5], expected [D] with D above 0 that divides the row width 12",
    );
    check(
        tape.rms_norm(&x(&[2, 0]), empty, 1e-5),
        "rms_norm: weight has shape [0], expected [D] with D above 0 that divides the row width 0",
    );
    check(
        tape.linear(&x(&[2, 6]), &Weight::stacked(&[&Weight::of(w), &Weight::of(narrow)])),
        "linear: weight has shape [3, 5], expected [.., 6]",
    );
    let both = [Weight::of(w).with_bias(Some(four)), Weight::of(w).with_bias(Some(b))];
    check(
        tape.linear(&x(&[2, 6]), &Weight::stacked(&[&both[0], &both[1]])),
        "linear: bias has shape [5], expected [4]",
    );
    check(
        tape.linear_add(&x(&[2, 6]), &Weight::of(w), &x(&[2, 5])),
        "linear: residual has shape [2, 5], expected [2, 4]",
    );
}

#[test]
fn wrong_rotations_are_named() {
    let params = Params::new();
    let tape = Tape::recording(&params);
    let x = |shape: &[usize]| tape.input(zeros(shape));
    let rope = |n_heads: usize, head_dim: usize, sin: usize, positions: Vec<u32>| {
        let (cos, sin, positions) = (zeros(&[9, 4]), zeros(&[9, sin]), rows(positions));
        Rope { n_heads, head_dim, cos, sin, positions }
    };
    check(
        tape.rope(&x(&[2, 12]), &rope(2, 8, 4, vec![0, 1])),
        "rope: input has shape [2, 12], expected [R, 2 * 8 or more] and tables of at most 4 columns",
    );
    check(
        tape.rope(&x(&[2, 12]), &rope(2, 6, 4, vec![0, 1])),
        "rope: input has shape [2, 12], expected [R, 2 * 6 or more] and tables of at most 3 columns",
    );
    check(tape.rope(&x(&[2, 8]), &rope(1, 8, 3, vec![0, 1])), "rope: sin has shape [9, 3], expected [9, 4]");
    check(tape.rope(&x(&[2, 8]), &rope(1, 8, 4, vec![0])), "rope: positions has shape [1], expected [2]");
    check(
        tape.rope(&x(&[2, 8]), &rope(1, 8, 4, vec![0, 9])),
        "rope: index 9 is outside the 9 rows of the cos table",
    );
    let added = |table: &[usize], first: usize, index: Tensor| {
        tape.rope_added(&x(&[2, 8]), &rope(1, 8, 4, vec![0, 1]), &Part::new(&x(table), first), &index)
    };
    check(added(&[3, 7], 0, rows([0, 1])), "rope: table has shape [3, 7], expected [.., 8 or more]");
    check(added(&[3, 9], 2, rows([0, 1])), "rope: table has shape [3, 9], expected [.., 10 or more]");
    check(added(&[3, 8], 0, rows([0])), "rope: index has shape [1], expected [2]");
    check(added(&[3, 8], 0, rows([0, 3])), "rope: index 3 is outside the 3 rows of the table");
    check(added(&[3, 8], 0, zeros(&[2])), "rope: the table is F32, expected U32");
}

#[test]
fn wrong_rows_are_named() {
    let mut params = Params::new();
    let w = params.add("w", zeros(&[4, 6]), true);
    let tape = Tape::recording(&params);
    let x = |shape: &[usize]| tape.input(zeros(shape));
    let part = |from: Tensor, to: Tensor| vec![Collected { source: x(&[3, 6]), from, to }];
    check(tape.swiglu(&x(&[2, 7])), "swiglu: gate and up has shape [2, 7], expected [R, 2 I]");
    check(tape.add(&x(&[2, 8]), &x(&[3, 8])), "add: right side has shape [3, 8], expected [2, 8]");
    check(
        tape.embedding(w, &rows([0, 4])),
        "embedding: index 4 is outside the 4 rows of the embedding table",
    );
    check(
        tape.embedding(w, &rows([u32::MAX])),
        "embedding: index 4294967295 is outside the 4 rows of the embedding table",
    );
    check(tape.embedding(w, &zeros(&[2])), "embedding: the embedding table is F32, expected U32");
    check(
        tape.gather_rows(&x(&[3, 2]), &rows([3])),
        "gather_rows: index 3 is outside the 3 rows of the input",
    );
    check(tape.columns(&x(&[2, 6]), 3..7), "columns: input has shape [2, 6], expected at least 7 columns");
    check(
        tape.collect_rows(part(rows([0, 1]), rows([0])), 4),
        "collect_rows: destination rows has shape [1], expected [2]",
    );
    check(
        tape.collect_rows(part(rows([0, 3]), rows([0, 1])), 4),
        "collect_rows: index 3 is outside the 3 rows of the source",
    );
    check(
        tape.collect_rows(part(rows([0, 1]), rows([0, 4])), 4),
        "collect_rows: index 4 is outside the 4 rows of the collection",
    );
}

#[test]
fn wrong_attentions_are_named() {
    struct Call {
        shape: AttentionShape,
        query: [usize; 2],
        first: usize,
        key: [usize; 2],
        value: [usize; 2],
        lo: Tensor,
        hi: Tensor,
        extra: ([usize; 2], [usize; 2], Option<Tensor>),
    }
    let right = || Call {
        shape: heads(4, 2, 3),
        query: [2, 12],
        first: 0,
        key: [5, 6],
        value: [5, 6],
        lo: rows([0, 1]),
        hi: rows([2, 5]),
        extra: ([2, 6], [2, 6], None),
    };
    let attend = |call: Call| {
        let params = Params::new();
        let tape = Tape::recording(&params);
        let x = |shape: [usize; 2]| tape.input(zeros(&shape));
        let extras = [(KeyValue::new(&x(call.extra.0), &x(call.extra.1)), call.extra.2)];
        let result = tape.attention(&Attention {
            shape: call.shape,
            query: Part::new(&x(call.query), call.first),
            base: &KeyValue::new(&x(call.key), &x(call.value)),
            spans: &Spans { lo: call.lo, hi: call.hi },
            extras: &extras,
        });
        result.map(|v| v.value().shape().to_vec()).map_err(|e| e.to_string())
    };
    assert_eq!(attend(right()), Ok(vec![2, 12]));
    let check = |call: Call, message: &str| assert_eq!(attend(call), Err(format!("attention: {message}")));
    check(
        Call { shape: heads(4, 3, 3), ..right() },
        "heads has shape [4, 3], expected a multiple of the key heads",
    );
    check(
        Call { shape: heads(4, 0, 3), ..right() },
        "heads has shape [4, 0], expected a multiple of the key heads",
    );
    check(Call { query: [2, 11], ..right() }, "query has shape [2, 11], expected [.., 12 or more]");
    check(Call { first: 3, ..right() }, "query has shape [2, 12], expected [.., 15 or more]");
    check(Call { key: [5, 5], ..right() }, "key has shape [5, 5], expected [.., 6 or more]");
    check(Call { value: [4, 6], ..right() }, "value has shape [4, 6], expected [5, ..]");
    check(Call { lo: rows([0]), ..right() }, "span starts has shape [1], expected [2]");
    check(Call { hi: rows([0, 1, 2]), ..right() }, "span ends has shape [3], expected [2]");
    check(Call { lo: zeros(&[2]), ..right() }, "the keys and their end is F32, expected U32");
    check(Call { lo: rows([6, 0]), ..right() }, "index 6 is outside the 6 rows of the keys and their end");
    check(Call { hi: rows([1, 6]), ..right() }, "index 6 is outside the 6 rows of the keys and their end");
    let extra = |key, value, index| Call { extra: (key, value, index), ..right() };
    check(extra([2, 5], [2, 6], None), "extra key has shape [2, 5], expected [.., 6 or more]");
    check(extra([2, 6], [1, 6], None), "extra value has shape [1, 6], expected [2, ..]");
    check(extra([3, 6], [3, 6], None), "extra key has shape [3, 6], expected [2, ..]");
    check(extra([3, 6], [3, 6], Some(rows([0]))), "extra index has shape [1], expected [2]");
    check(extra([3, 6], [3, 6], Some(rows([0, 3]))), "index 3 is outside the 3 rows of the extra keys");
    // A backward finds queries by the order of their spans; without one any order will do.
    assert_eq!(attend(Call { lo: rows([1, 0]), ..right() }), Ok(vec![2, 12]));
    let params = Params::new();
    let tape = Tape::recording(&params);
    let (q, kv) = (tape.leaf(zeros(&[3, 12])), tape.input(zeros(&[5, 6])));
    let spans = Spans { lo: rows([0, 0, 0]), hi: rows([1, 5, 4]) };
    let base = KeyValue::new(&kv, &kv);
    let attention =
        Attention { shape: heads(4, 2, 3), query: Part::new(&q, 0), base: &base, spans: &spans, extras: &[] };
    let message =
        "attention: span ends has shape [5, 4], expected bounds that never decrease, got these from row 1 on";
    assert_eq!(tape.attention(&attention).unwrap_err().to_string(), message);
}

#[test]
fn wrong_losses_are_named() {
    let check = |change: &dyn Fn(&mut Case), message: &str| {
        let mut case = Case::new(8, 6, 20, 2, Objective::Kl);
        change(&mut case);
        assert_eq!(case.error(), format!("soft_target_loss: {message}"));
    };
    check(&|c| c.x = zeros(&[8, 5]), "draft rows has shape [8, 5], expected [.., 6]");
    check(
        &|c| c.teacher_head = zeros(&[10, 11]),
        "teacher hidden states has shape [3, 12], expected [.., 11]",
    );
    check(&|c| c.head = zeros(&[9, 6]), "draft head has shape [9, 6], expected [10, H] like the teacher's");
    check(
        &|c| c.logits = Some(zeros(&[3, 9])),
        "draft head has shape [10, 6], expected [9, H] like the teacher's",
    );
    check(&|c| c.logsumexp = zeros(&[4]), "logsumexp has shape [4], expected [3]");
    check(
        &|c| c.rows.weight.truncate(7),
        "loss rows has shape [8, 8, 7], expected [8; 3], ascending teacher rows",
    );
    check(
        &|c| c.rows.teacher_row.swap(0, 7),
        "loss rows has shape [8, 8, 8], expected [8; 3], ascending teacher rows",
    );
    check(&|c| c.rows.teacher_row[7] = 3, "index 3 is outside the 3 rows of the teacher");
    check(&|c| c.rows.group[0] = 3, "index 3 is outside the 3 rows of the group weights");
    check(
        &|c| c.rows.group_rows.truncate(2),
        "rows of groups has shape [2], expected [3] like the group weights",
    );
    let message = |result: Result<crate::VocabStats>| result.map(|_| ()).unwrap_err().to_string();
    assert_eq!(
        message(Tape::vocab_stats(&zeros(&[2, 3]), &zeros(&[5, 4]))),
        "vocab_stats: hidden states has shape [2, 3], expected [.., 4]"
    );
    assert_eq!(message(Tape::logit_stats(&rows([1]))), "logit_stats: logits is U32, expected a float type");
}

#[test]
fn wrong_tensors_are_named() {
    let message = |result: Result<Tensor>| result.map(|_| ()).unwrap_err().to_string();
    assert_eq!(
        message(Tensor::from_f32(Device::Cpu, vec![0.0; 5], &[2, 3])),
        "tensor: data has shape [2, 3], expected 5 elements"
    );
    assert_eq!(
        message(zeros(&[2, 3]).reshape(&[7])),
        "reshape: the new shape has shape [7], expected 6 elements"
    );
    assert_eq!(message(zeros(&[2]).cast(DType::U32)), "cast: the new type is U32, expected a float type");
    let append = |more: &Tensor| zeros(&[2, 3]).append_rows(more).unwrap_err().to_string();
    assert_eq!(append(&zeros(&[2, 4])), "append_rows: rows has shape [2, 4], expected [.., 3]");
    assert_eq!(
        append(&zeros(&[1, 3]).cast(DType::Bf16).unwrap()),
        "append_rows: rows is Bf16, expected the same type"
    );
    assert_eq!(
        Device::from_name("gpu9").unwrap_err().to_string(),
        "device \"gpu9\" is not known: use \"auto\", \"cpu\", \"cuda\" or \"cuda:N\""
    );
}

#[test]
fn rows_are_appended_and_dropped_without_touching_shared_storage() {
    let mut cache = matrix(vec![1.0, 2.0], &[1, 2]);
    let shared = cache.clone();
    cache.append_rows(&matrix(vec![3.0, 4.0, 5.0, 6.0], &[2, 2])).unwrap();
    assert_eq!((cache.shape(), cache.to_f32()), (&[3, 2][..], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    cache.truncate_rows(2);
    cache.truncate_rows(9);
    assert_eq!((cache.shape(), cache.to_f32()), (&[2, 2][..], vec![1.0, 2.0, 3.0, 4.0]));
    assert_eq!((shared.shape(), shared.to_f32()), (&[1, 2][..], vec![1.0, 2.0]));
}
