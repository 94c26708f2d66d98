//! The fused loss and the statistics over a vocabulary.
//!
//! Logits are bfloat16 on a device. With numbers drawn from {-1/2, 0, 1/2} every logit is a multiple of 1/4 that
//! bfloat16 holds, so that both sides compute the loss of the same logits, down to which of two probabilities is the
//! smaller: the figures agree like float32 does, and the gradients up to the rounding of their own storage.

use specforge_testkit::{Lcg, assert_close};

use super::{TOLERANCE, assert_near, assert_near_within, device, rounded, upload};
use crate::tests::alone::alone;
use crate::tests::loss::{Case, OBJECTIVES, Outcome};
use crate::tests::{bits, matrix, rows};
use crate::{DType, Device, GroupLoss, LossRows, Objective, Tape, Tensor};

/// With logits that are rounded, differences of probabilities are wrong by up to twice as much.
const ROUNDED_LOGITS: f64 = 2.0 * TOLERANCE;

/// Small numbers whose products bfloat16 holds.
fn exact(sizes: [usize; 4], objective: Objective) -> Case {
    let mut rng = Lcg::new(31);
    Case::of(sizes, objective, |n| (0..n).map(|_| rng.below(3) as f32 * 0.5 - 0.5).collect())
}

/// Normal numbers.
fn random([n, width, vocab, keep]: [usize; 4], objective: Objective) -> Case {
    let case = Case::new(n, width, vocab, keep, objective);
    let [x, head, hidden, teacher_head] =
        [&case.x, &case.head, &case.hidden, &case.teacher_head].map(rounded);
    Case { x, head, hidden, teacher_head, ..case }
}

fn on(case: &Case, device: Device) -> Case {
    let [x, head, hidden, teacher_head] =
        [&case.x, &case.head, &case.hidden, &case.teacher_head].map(|t| upload(t, device));
    let logsumexp = case.logsumexp.to_device(device).unwrap();
    let logits = case.logits.as_ref().map(|t| upload(t, device));
    Case { x, head, hidden, teacher_head, logsumexp, logits, ..case.clone() }
}

fn figures(groups: &[GroupLoss]) -> Vec<f32> {
    groups.iter().flat_map(|g| [g.loss, g.acceptance, g.count]).map(|v| v as f32).collect()
}

/// Figures and gradients of a case with exact logits.
fn check(name: &str, case: &Case, device: Device) {
    let (want, got) = (case.run().unwrap(), on(case, device).run().unwrap());
    assert_close(&format!("{name}, figures"), &figures(&got.groups), &figures(&want.groups), 1e-4, 1e-4);
    assert_eq!(got.argmax, want.argmax, "{name}");
    let pairs = [(&got.dx, &want.dx, "draft rows"), (&got.dhead, &want.dhead, "head")];
    for (got, want, what) in pairs {
        assert_eq!(got.is_some(), want.is_some(), "{name}, gradient of the {what}");
        if let (Some(got), Some(want)) = (got, want) {
            near_gradient(&format!("{name}, gradient of the {what}"), got, want, TOLERANCE);
        }
    }
}

/// Gradients of a loss are small where a vocabulary is large: what counts is their own size.
fn near_gradient(name: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    let values = want.to_f32();
    let size = (values.iter().map(|v| v * v).sum::<f32>() / values.len().max(1) as f32).sqrt();
    let scaled =
        |t: &Tensor| matrix(t.to_f32().iter().map(|v| v / size.max(f32::MIN_POSITIVE)).collect(), t.shape());
    assert_near_within(name, &scaled(got), &scaled(want), tolerance);
}

#[test]
fn cuda_losses_agree_over_vocabularies() {
    let Some(device) = device() else { return };
    // Rows, width, the target's vocabulary, and which part of it the draft has: 12, 1000, 32 000 and 1001 tokens.
    for sizes in
        [[70, 8, 12, 1], [70, 64, 1000, 1], [70, 20, 3001, 3], [40, 64, 64_000, 2], [6, 16, 32_000, 1]]
    {
        for objective in OBJECTIVES {
            let case = exact(sizes, objective);
            check(&format!("{objective:?}, {sizes:?}"), &case, device);
            check(&format!("{objective:?}, {sizes:?}, logits"), &case.with_logits(), device);
        }
    }
}

#[test]
fn cuda_losses_agree_where_a_row_exceeds_shared_memory() {
    let Some(device) = device() else { return };
    for objective in OBJECTIVES {
        for vocab in [130_000, 130_001] {
            let case = exact([5, 8, vocab, 1], objective);
            check(&format!("{objective:?}, {vocab}"), &case, device);
            check(&format!("{objective:?}, {vocab}, logits"), &case.with_logits(), device);
        }
    }
}

#[test]
fn cuda_losses_give_each_gradient_whether_or_not_the_other_is_wanted() {
    let Some(device) = device() else { return };
    for objective in OBJECTIVES {
        let case = exact([70, 64, 3000, 3], objective);
        for trained in [(true, true), (true, false), (false, true), (false, false)] {
            check(&format!("{objective:?}, {trained:?}"), &Case { trained, ..case.clone() }, device);
        }
        let there = on(&case, device);
        let run = |trained| Case { trained, ..there.clone() }.run().unwrap();
        let (both, only_rows, only_head) = (run((true, true)), run((true, false)), run((false, true)));
        assert_eq!(bits(&only_rows.dx.unwrap()), bits(both.dx.as_ref().unwrap()));
        assert_eq!(bits(&only_head.dhead.unwrap()), bits(both.dhead.as_ref().unwrap()));
    }
}

#[test]
fn cuda_losses_of_rounded_logits_are_close() {
    let Some(device) = device() else { return };
    for sizes in [[70, 32, 1000, 1], [70, 16, 9000, 3]] {
        for objective in OBJECTIVES {
            let case = random(sizes, objective);
            for case in [case.clone(), case.with_logits()] {
                let name = format!("{objective:?}, {sizes:?}");
                let (want, got): (Outcome, Outcome) = (case.run().unwrap(), on(&case, device).run().unwrap());
                assert_close(&name, &figures(&got.groups), &figures(&want.groups), 1e-3, 1e-2);
                if objective == Objective::Kl {
                    near_gradient(&name, &got.dx.unwrap(), &want.dx.unwrap(), ROUNDED_LOGITS);
                    near_gradient(&name, &got.dhead.unwrap(), &want.dhead.unwrap(), ROUNDED_LOGITS);
                }
            }
        }
    }
}

#[test]
fn cuda_losses_give_the_same_bits_again() {
    let Some(device) = device() else { return };
    for objective in OBJECTIVES {
        for sizes in [[70, 64, 9000, 3], [5, 8, 130_000, 1]] {
            let case = on(&random(sizes, objective), device);
            let first = case.bits();
            assert!((0..3).all(|_| case.bits() == first), "{objective:?}, {sizes:?}");
        }
    }
}

#[test]
fn cuda_losses_without_rows_are_zero() {
    let Some(device) = device() else { return };
    for objective in OBJECTIVES {
        check("no rows", &exact([0, 8, 40, 2], objective), device);
        // Rows of the teacher that nothing reads change nothing.
        let unread = exact([40, 8, 40, 2], objective);
        let rows = LossRows { group_rows: vec![0; 3], total_weight: 1.0, ..LossRows::default() };
        check("no rows read", &Case { rows, x: matrix(vec![], &[0, 8]), ..unread }, device);
    }
}

#[test]
fn a_cuda_row_without_overlap_has_no_gradient_of_its_logarithm() {
    let Some(device) = device() else { return };
    let mut case = Case::new(3, 8, 2, 1, Objective::LkAlpha);
    // The draft is certain of the first token, the target of the second.
    case.x = matrix(vec![40.0; 24], &[3, 8]);
    case.head = matrix([[40.0; 8], [-40.0; 8]].concat(), &[2, 8]);
    case = case.with_logits();
    case.logits = Some(matrix([[-4992.0, 4992.0]; 2].concat(), &[2, 2]));
    case.logsumexp = matrix(vec![4992.0; 2], &[2]);
    let run = on(&case, device).run().unwrap();
    assert!(run.groups.iter().all(|g| g.loss.is_finite() && g.acceptance < 1e-30));
    let gradients = [run.dx.unwrap(), run.dhead.unwrap()];
    assert!(gradients.iter().all(|t| t.to_f32().iter().all(|v| v.is_finite())));
}

#[test]
fn cuda_vocabulary_statistics_agree_and_the_first_of_equals_wins() {
    let Some(device) = device() else { return };
    let mut rng = Lcg::new(6);
    let sizes =
        [(1, 1, 3), (5, 31, 3), (70, 200, 5), (40, 1000, 64), (33, 32_000, 8), (9, 150_001, 16), (0, 10, 8)];
    for (n, vocab, k) in sizes {
        let name = format!("{n} rows of {vocab}");
        // Small integers make the products exact and ties frequent, within blocks and across them.
        let mut whole = |shape: &[usize]| {
            matrix((0..shape.iter().product()).map(|_| rng.below(3) as f32 - 1.0).collect(), shape)
        };
        let (hidden, head) = (whole(&[n, k]), whole(&[vocab, k]));
        let want = Tape::vocab_stats(&hidden, &head).unwrap();
        let logits = Device::Cpu.kernels().linear(&hidden, &[&head], 0..k, &[], None).unwrap();
        let all = [
            Tape::vocab_stats(&upload(&hidden, device), &upload(&head, device)).unwrap(),
            Tape::logit_stats(&upload(&logits, device)).unwrap(),
            Tape::logit_stats(&logits.to_device(device).unwrap()).unwrap(),
        ];
        for got in all {
            assert_eq!(got.argmax.to_u32(), want.argmax.to_u32(), "{name}");
            assert_eq!(got.logsumexp.dtype(), DType::F32);
            assert_close(&name, &got.logsumexp.to_f32(), &want.logsumexp.f32s(), 1e-5, 1e-5);
        }
    }
    let spread = matrix(vec![-300.0, 500.0, -300.0, 80.0, 0.0, -1e4], &[2, 3]).to_device(device).unwrap();
    assert_eq!(Tape::logit_stats(&spread).unwrap().logsumexp.to_f32(), [500.0, 80.0]);
}

#[test]
fn cuda_losses_take_statistics_that_the_device_computed() {
    let Some(device) = device() else { return };
    let case = exact([70, 64, 1000, 1], Objective::Kl);
    let there = on(&case, device);
    let stats = Tape::vocab_stats(&there.hidden, &there.teacher_head).unwrap();
    let (want, got) = (case.run().unwrap(), Case { logsumexp: stats.logsumexp, ..there }.run().unwrap());
    assert_close("figures", &figures(&got.groups), &figures(&want.groups), 1e-4, 1e-4);
    // Row numbers that the device computed go back into it.
    let head = upload(&case.teacher_head, device);
    let best = device.kernels().gather_rows(&head, &stats.argmax).unwrap();
    let index = rows(stats.argmax.to_u32());
    let plain = Device::Cpu.kernels().gather_rows(&case.teacher_head, &index).unwrap();
    assert_near("the best tokens' rows", &best, &plain);
}

/// The kernels of a shared vocabulary, on one rank, against the CPU's loss of the same logits.
#[test]
fn cuda_parallel_losses_agree() {
    let Some(device) = device() else { return };
    for sizes in [[70, 8, 12, 1], [70, 64, 1000, 1], [70, 20, 3001, 3], [40, 64, 64_000, 2]] {
        for objective in OBJECTIVES {
            let name = format!("{objective:?}, {sizes:?}");
            let case = exact(sizes, objective);
            let (want, got) = (case.run().unwrap(), on(&case, device).run_on(Some(&alone())).unwrap());
            assert_close(&name, &figures(&got.groups), &figures(&want.groups), 1e-4, 1e-4);
            assert_eq!(got.argmax, want.argmax, "{name}");
            for (got, want) in [(&got.dx, &want.dx), (&got.dhead, &want.dhead)] {
                near_gradient(&name, got.as_ref().unwrap(), want.as_ref().unwrap(), TOLERANCE);
            }
        }
    }
}
