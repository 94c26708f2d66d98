//! What holds for every operation: the same bits on any number of threads, and nothing to do for no rows.

use specforge_testkit::Lcg;

use super::adam::{STEP, Trained, step};
use super::loss::Case;
use super::{Op, bits, matrix, normal, rows, zoo};
use crate::{Across, DType, Device, LossRows, Objective, Tape, Tensor};

fn with_threads<T: Send>(n: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(f)
}

/// Asserts that `f` gives the same bits on 1, 2 and 4 threads, and on another try.
fn check<T: PartialEq + Send>(name: &str, f: impl Fn() -> T + Sync) {
    let expected = with_threads(1, &f);
    for threads in [2, 4, 4] {
        assert!(with_threads(threads, &f) == expected, "{name}: {threads} threads give other bits than one");
    }
}

#[test]
fn every_operation_gives_the_same_bits_on_any_number_of_threads() {
    for n in [3, 1000] {
        for (name, op) in zoo(n) {
            check(&format!("{name}, {n} rows"), || {
                let (value, _, gradients) = op.gradients(5);
                [vec![bits(&value)], gradients.iter().map(bits).collect()].concat()
            });
        }
    }
    let mut rng = Lcg::new(9);
    let (x, w) = (normal(&mut rng, &[20, 200]), normal(&mut rng, &[3000, 200]));
    let wide = Op::new(vec![x], vec![w], |t, v, p| t.linear(&v[0], &crate::Weight::of(p[0])));
    check("linear with few rows", || {
        let (value, _, gradients) = wide.gradients(5);
        [vec![bits(&value)], gradients.iter().map(bits).collect()].concat()
    });
}

#[test]
fn losses_and_statistics_give_the_same_bits_on_any_number_of_threads() {
    for objective in [Objective::Kl, Objective::LkAlpha, Objective::LkLambda { kl_scale: 1.0, kl_decay: 3.0 }]
    {
        for width in [8, 600] {
            let case = Case::new(150, width, 120, 3, objective);
            check(&format!("{objective:?}, {width} wide"), || case.bits());
        }
    }
    let mut rng = Lcg::new(9);
    let (hidden, head) = (normal(&mut rng, &[300, 500]), normal(&mut rng, &[200, 500]));
    check("vocab_stats", || {
        let stats = Tape::vocab_stats(&hidden, &head).unwrap();
        [bits(&stats.argmax), bits(&stats.logsumexp)]
    });
    let logits = normal(&mut rng, &[300, 500]);
    check("logit_stats", || {
        let stats = Tape::logit_stats(&logits).unwrap();
        [bits(&stats.argmax), bits(&stats.logsumexp)]
    });
}

#[test]
fn optimizer_steps_and_norms_give_the_same_bits_on_any_number_of_threads() {
    let mut rng = Lcg::new(9);
    let shape = [70, 1000];
    let (param, grad) = (normal(&mut rng, &shape), normal(&mut rng, &shape));
    let grads = [grad.clone(), grad];
    check("adamw", || {
        let mut all = [param.clone(), param.cast(DType::Bf16).unwrap()].map(Trained::new);
        let norm = step(&mut all, &grads, 1, &STEP).unwrap();
        (norm.to_bits(), all.map(|t| t.bits()))
    });
}

#[test]
fn no_rows_give_no_rows_and_no_gradient() {
    for (name, op) in zoo(0) {
        let (value, _, gradients) = op.gradients(1);
        assert_eq!(value.rows_cols().0, 0, "{name}");
        let shapes: Vec<_> = op.leaves.iter().chain(&op.params).map(Tensor::shape).collect();
        assert_eq!(gradients.iter().map(Tensor::shape).collect::<Vec<_>>(), shapes, "{name}");
        assert!(gradients.iter().all(|g| g.f32s().iter().all(|&v| v == 0.0)), "{name}");
    }
}

#[test]
fn a_loss_without_rows_is_zero() {
    for objective in [Objective::Kl, Objective::LkAlpha, Objective::LkLambda { kl_scale: 1.0, kl_decay: 3.0 }]
    {
        let case = Case::new(0, 8, 40, 2, objective);
        let [groups, argmax, dx, dhead] = &case.bits()[..] else { panic!("four kinds of numbers") };
        assert!(argmax.is_empty() && dx.is_empty());
        assert!(dhead.iter().all(|&b| b == 0));
        // Without rows the lambda objective still has its constant, `(1 - w) (1 - 0)` with w = 1 here.
        assert!(groups.iter().all(|&b| b << 1 == 0), "{objective:?}: {groups:?}");
        // Rows of the teacher that nothing reads change nothing.
        let mut unread = Case::new(40, 8, 40, 2, objective);
        unread.rows = LossRows { group_rows: vec![0; 3], total_weight: 1.0, ..LossRows::default() };
        unread.x = matrix(vec![], &[0, 8]);
        assert!(unread.bits()[3].iter().all(|&b| b == 0));
    }
    let stats = Tape::vocab_stats(&matrix(vec![], &[0, 8]), &matrix(vec![0.0; 80], &[10, 8])).unwrap();
    assert_eq!((stats.argmax.len(), stats.logsumexp.len()), (0, 0));
    assert_eq!(Tape::logit_stats(&matrix(vec![], &[0, 8])).unwrap().argmax.len(), 0);
    assert_eq!(Device::Cpu.kernels().adamw(&mut [], &STEP, &Across::default()).unwrap().wait().unwrap(), 0.0);
    assert_eq!(rows([]).len(), 0);
}
