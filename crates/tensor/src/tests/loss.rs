//! The fused loss against plain float64 arithmetic, and its gradients against differences.

use std::sync::Arc;

use specforge_testkit::{Lcg, assert_close, assert_close_max};

use super::alone::alone;
use super::finite_difference::{Step, compare};
use super::{bits, matrix};
use crate::{
    DType, Device, Group, GroupLoss, Later, LossFigures, LossRanks, LossRows, Objective, ParamId, Params,
    Result, SoftTargetLoss, Tape, Teacher, Tensor, Var,
};

pub(crate) const OBJECTIVES: [Objective; 3] =
    [Objective::Kl, Objective::LkAlpha, Objective::LkLambda { kl_scale: 0.9, kl_decay: 2.0 }];

/// Everything one loss reads.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) x: Tensor,
    pub(crate) head: Tensor,
    /// The target's last hidden states and the rows of its head that the draft keeps.
    pub(crate) hidden: Tensor,
    pub(crate) teacher_head: Tensor,
    pub(crate) logsumexp: Tensor,
    /// Logits over the draft vocabulary, to be used instead of `hidden` and `teacher_head`.
    pub(crate) logits: Option<Tensor>,
    pub(crate) rows: LossRows,
    pub(crate) objective: Objective,
    pub(crate) group_weight: Vec<f64>,
    /// Whether gradients are wanted for draft rows and head.
    pub(crate) trained: (bool, bool),
}

/// What a run gives: groups, best tokens, and the gradients of draft rows and head.
pub(crate) struct Outcome {
    pub(crate) groups: Vec<GroupLoss>,
    pub(crate) argmax: Vec<u32>,
    pub(crate) dx: Option<Tensor>,
    pub(crate) dhead: Option<Tensor>,
}

impl Case {
    /// `n` draft rows in three groups against a target of `vocab` tokens, of which the draft keeps every `keep`-th.
    pub(crate) fn new(n: usize, width: usize, vocab: usize, keep: usize, objective: Objective) -> Self {
        let mut rng = Lcg::new(31);
        Self::of([n, width, vocab, keep], objective, |n| rng.normals(n, 0.5))
    }

    /// As [`Case::new`], of numbers that are drawn elsewhere.
    pub(crate) fn of(
        [n, width, vocab, keep]: [usize; 4],
        objective: Objective,
        mut draw: impl FnMut(usize) -> Vec<f32>,
    ) -> Self {
        let mut half = |shape: &[usize]| matrix(draw(shape.iter().product()), shape);
        let draft_vocab = vocab.div_ceil(keep);
        let (x, head) = (half(&[n, width]), half(&[draft_vocab, width]));
        // The second teacher row is read by more draft rows than a chunk takes; the third by none.
        let teacher_row: Vec<u32> =
            (0..n).map(|i| if i < 4 { 0 } else { (i as u32 / 34).max(1) + u32::from(i >= 34) }).collect();
        let n_teacher = teacher_row.last().map_or(0, |last| *last as usize + 2);
        let (hidden, whole_head) = (half(&[n_teacher, 12]), half(&[vocab, 12]));
        let kept = Tensor::from_u32(Device::Cpu, (0..vocab as u32).step_by(keep).collect());
        let teacher_head = Device::Cpu.kernels().gather_rows(&whole_head, &kept).unwrap();
        let logsumexp = Tape::vocab_stats(&hidden, &whole_head).unwrap().logsumexp;
        let weight = (0..n).map(|i| if i % 6 == 5 { 0.0 } else { 0.25 + (i % 4) as f32 }).collect();
        let rows = LossRows {
            teacher_row,
            group: (0..n as u32).map(|i| i % 3).collect(),
            weight,
            group_rows: (0..3).map(|g| (n + 2 - g) / 3).collect(),
            total_weight: 7.5,
        };
        let group_weight = vec![1.0, 0.8, 0.64];
        let trained = (true, true);
        Self {
            x,
            head,
            hidden,
            teacher_head,
            logsumexp,
            logits: None,
            rows,
            objective,
            group_weight,
            trained,
        }
    }

    /// The same distributions, given as logits.
    pub(crate) fn with_logits(self) -> Self {
        let (n, vocab) = (self.hidden.rows_cols().0, self.head.rows_cols().0);
        let logits =
            Device::Cpu.kernels().linear(&self.hidden, &[&self.teacher_head], 0..12, &[], None).unwrap();
        assert_eq!(logits.shape(), [n, vocab]);
        Self { logits: Some(logits), ..self }
    }

    pub(crate) fn run(&self) -> Result<Outcome> {
        self.run_on(None)
    }

    /// With heads that ranks share, of which this one has all there is.
    pub(crate) fn run_on(&self, heads: Option<&Arc<dyn Group>>) -> Result<Outcome> {
        self.run_as(LossRanks { heads, rows: None })
    }

    pub(super) fn run_as(&self, ranks: LossRanks<'_>) -> Result<Outcome> {
        let mut params = Params::new();
        let head = params.add("head", self.head.clone(), self.trained.1);
        let tape = Tape::recording(&params);
        let x = if self.trained.0 { tape.leaf(self.x.clone()) } else { tape.input(self.x.clone()) };
        let figures = self.loss(&tape, (&x, head), ranks)?;
        let seeds = tape.take_seeds();
        let leaves = if self.trained.0 { vec![x] } else { vec![] };
        let (grads, dx) = tape.backward_to(seeds, &leaves)?;
        let dhead = grads.get(head).cloned();
        let LossFigures { groups, argmax } = figures.wait()?;
        Ok(Outcome { groups, argmax, dx: dx.into_iter().next(), dhead })
    }

    pub(super) fn loss(
        &self,
        tape: &Tape<'_>,
        (x, head): (&Var, ParamId),
        ranks: LossRanks<'_>,
    ) -> Result<Later<LossFigures>> {
        let loss = SoftTargetLoss {
            x,
            head,
            teacher: self
                .logits
                .as_ref()
                .map_or(Teacher::Hidden { hidden: &self.hidden, head: &self.teacher_head }, Teacher::Logits),
            logsumexp: &self.logsumexp,
            rows: &self.rows,
            objective: self.objective,
            group_weight: &self.group_weight,
        };
        tape.soft_target_loss_shared(&loss, ranks)
    }

    /// All numbers of a run, as bits.
    pub(crate) fn bits(&self) -> Vec<Vec<u32>> {
        let run = self.run().unwrap();
        let groups = run.groups.iter().flat_map(|g| [g.loss, g.acceptance]).map(f64::to_bits);
        let groups = groups.flat_map(|b| [b as u32, (b >> 32) as u32]).collect();
        vec![groups, run.argmax, bits(&run.dx.unwrap()), bits(&run.dhead.unwrap())]
    }

    pub(crate) fn error(&self) -> String {
        self.run().map(|_| ()).unwrap_err().to_string()
    }
}

fn f64s(t: &Tensor) -> Vec<f64> {
    t.to_f32().into_iter().map(f64::from).collect()
}

/// Cross-entropy, acceptance and best token of each row in float64, for these draft rows and this head.
fn plain_rows(case: &Case, x: &[f64], head: &[f64]) -> Vec<(f64, f64, u32)> {
    let product = |a: &[f64], m: &[f64]| -> Vec<f64> {
        m.chunks(a.len()).map(|row| row.iter().zip(a).map(|(x, y)| x * y).sum()).collect()
    };
    let sum_exp = |z: &[f64]| z.iter().map(|v| v.exp()).sum::<f64>();
    let [hidden, teacher_head, logsumexp] = [&case.hidden, &case.teacher_head, &case.logsumexp].map(f64s);
    let k = case.x.rows_cols().1;
    let row = |(r, &t): (usize, &u32)| {
        let (z, t) = (product(&x[r * k..][..k], head), t as usize);
        let teacher = product(&hidden[t * 12..][..12], &teacher_head);
        let (q_sum, p_sum) = (sum_exp(&z), sum_exp(&teacher));
        let cross_entropy: f64 =
            teacher.iter().zip(&z).map(|(t, z)| t.exp() / p_sum * (q_sum.ln() - z)).sum();
        let accepted: f64 =
            teacher.iter().zip(&z).map(|(p, z)| (p - logsumexp[t]).exp().min(z.exp() / q_sum)).sum();
        let best = (0..z.len()).fold(0, |best, i| if z[i] > z[best] { i } else { best });
        (cross_entropy, accepted, best as u32)
    };
    case.rows.teacher_row.iter().enumerate().map(row).collect()
}

/// Each group's figures from those of its rows; the lambda objective's weight as for the mean acceptance in `fixed`,
/// if given.
fn plain_groups(case: &Case, rows: &[(f64, f64, u32)], fixed: Option<&[GroupLoss]>) -> Vec<GroupLoss> {
    let total = case.rows.total_weight;
    let group = |g: usize| {
        let mine = || (0..rows.len()).filter(move |&r| case.rows.group[r] as usize == g);
        let count = mine().count() as f64;
        let kl: f64 = mine().map(|r| f64::from(case.rows.weight[r]) * rows[r].0).sum();
        let acceptance: f64 = mine().map(|r| rows[r].1).sum();
        let loss = match case.objective {
            Objective::Kl => kl,
            Objective::LkAlpha => -total * mine().map(|r| rows[r].1.ln()).sum::<f64>() / count,
            Objective::LkLambda { kl_scale, kl_decay } => {
                let w = kl_scale * (-kl_decay * fixed.map_or(acceptance, |f| f[g].acceptance) / count).exp();
                w * kl + total * (1.0 - w) * (1.0 - acceptance / count)
            }
        };
        GroupLoss { loss, acceptance, count }
    };
    (0..case.group_weight.len()).map(group).collect()
}

fn check_values(name: &str, case: &Case) {
    let (run, plain) = (case.run().unwrap(), plain_rows(case, &f64s(&case.x), &f64s(&case.head)));
    assert_eq!(run.argmax, plain.iter().map(|r| r.2).collect::<Vec<_>>(), "{name}");
    for (g, (got, want)) in run.groups.iter().zip(plain_groups(case, &plain, None)).enumerate() {
        let figures = |g: GroupLoss| [g.loss, g.acceptance, g.count].map(|v| v as f32);
        assert_close(&format!("{name}, group {g}"), &figures(*got), &figures(want), 1e-6, 5e-6);
    }
}

#[test]
fn losses_agree_with_plain_arithmetic() {
    // Three vocabulary sizes: several chunks, one chunk, one row per chunk.
    for (vocab, keep) in [(40, 1), (120, 3), (7, 2), (1500, 1)] {
        for objective in OBJECTIVES {
            let case = Case::new(70, 8, vocab, keep, objective);
            check_values(&format!("{objective:?}, {vocab} / {keep}"), &case);
            check_values(&format!("{objective:?}, {vocab} / {keep}, logits"), &case.with_logits());
        }
    }
}

/// The differences are those of the plain float64 form, which `losses_agree_with_plain_arithmetic` ties to the fused
/// one: the acceptance has a kink wherever draft and target cross, and only steps that float32 could not resolve are
/// small enough to cross hardly any. What is left is the rounding of the float32 gradients.
#[test]
fn gradients_agree_with_differences() {
    let step = Step { h: 1e-5, tolerance: 1e-4, outputs: 1e-7 };
    for kind in OBJECTIVES {
        for (vocab, keep, logits) in [(40, 1, false), (120, 3, false), (40, 1, true), (120, 3, true)] {
            let case = Case::new(70, 8, vocab, keep, kind);
            let case = if logits { case.with_logits() } else { case };
            let (run, x, head) = (case.run().unwrap(), f64s(&case.x), f64s(&case.head));
            let objective = |x: &[f64], head: &[f64]| {
                let groups = plain_groups(&case, &plain_rows(&case, x, head), Some(&run.groups));
                groups.iter().zip(&case.group_weight).map(|(g, weight)| g.loss * weight).sum::<f64>()
            };
            let name = format!("{kind:?}, {vocab} / {keep}, logits {logits}");
            let (dx, dhead) = (run.dx.as_ref().unwrap(), run.dhead.as_ref().unwrap());
            compare(&format!("{name}, x"), &case.x.f32s(), &dx.f32s(), step, |x| objective(x, &head));
            compare(&format!("{name}, head"), &case.head.f32s(), &dhead.f32s(), step, |head| {
                objective(&x, head)
            });
        }
    }
}

#[test]
fn each_gradient_is_there_whether_or_not_the_other_is_wanted() {
    for objective in OBJECTIVES {
        let case = Case::new(40, 8, 40, 2, objective);
        let both = case.run().unwrap();
        let frozen_head = Case { trained: (true, false), ..case.clone() }.run().unwrap();
        assert_eq!(bits(&frozen_head.dx.unwrap()), bits(both.dx.as_ref().unwrap()));
        assert!(frozen_head.dhead.is_none());
        let fixed_rows = Case { trained: (false, true), ..case.clone() }.run().unwrap();
        assert_eq!(bits(&fixed_rows.dhead.unwrap()), bits(both.dhead.as_ref().unwrap()));
        let neither = Case { trained: (false, false), ..case }.run().unwrap();
        assert_eq!((neither.groups, neither.argmax), (both.groups, both.argmax));
    }
}

#[test]
fn storage_of_two_bytes_is_widened() {
    let half = |t: &Tensor| t.cast(DType::Bf16).unwrap();
    let wide = |t: &Tensor| half(t).cast(DType::F32).unwrap();
    let case = Case::new(40, 8, 120, 3, Objective::Kl);
    let with = |f: &dyn Fn(&Tensor) -> Tensor| {
        let case = case.clone();
        Case { head: f(&case.head), hidden: f(&case.hidden), teacher_head: f(&case.teacher_head), ..case }
    };
    assert_eq!(with(&half).bits(), with(&wide).bits());
}

#[test]
fn a_row_without_overlap_has_no_gradient_of_its_logarithm() {
    let mut case = Case::new(3, 8, 2, 1, Objective::LkAlpha);
    // The draft is certain of the first token, the target of the second.
    case.x = matrix(vec![40.0; 24], &[3, 8]);
    case.head = matrix([[40.0; 8], [-40.0; 8]].concat(), &[2, 8]);
    case = case.with_logits();
    case.logits = Some(matrix([[-5e3, 5e3]; 2].concat(), &[2, 2]));
    case.logsumexp = matrix(vec![5e3; 2], &[2]);
    let run = case.run().unwrap();
    assert!(run.groups.iter().all(|g| g.loss.is_finite() && g.acceptance < 1e-30));
    assert!(run.dx.unwrap().f32s().iter().chain(run.dhead.unwrap().f32s().iter()).all(|v| v.is_finite()));
}

/// An acceptance so small that the quotient with it is above all float32: the gradient stays a number.
#[test]
fn a_row_of_hardly_any_overlap_has_a_finite_gradient() {
    for far in [86.0, 88.0, 92.0, 98.0, 102.0] {
        let mut case = Case::new(3, 8, 2, 1, Objective::LkAlpha);
        case.x = matrix([[1.0; 1], [0.0; 1]].concat().repeat(12), &[3, 8]);
        case.head = matrix([[far / 4.0; 8], [0.0; 8]].concat(), &[2, 8]);
        case = case.with_logits();
        case.logits = Some(matrix([[-5e3, 5e3]; 2].concat(), &[2, 2]));
        case.logsumexp = matrix(vec![5e3; 2], &[2]);
        case.group_weight = vec![1e3; 3];
        let ranks = alone();
        for run in [case.run().unwrap(), case.run_on(Some(&ranks)).unwrap()] {
            let acceptance = run.groups[0].acceptance;
            assert!(
                run.groups.iter().all(|g| g.loss.is_finite()) && acceptance < 1e-36,
                "{far}: {acceptance}"
            );
            let (dx, dhead) = (run.dx.unwrap(), run.dhead.unwrap());
            assert!(dx.f32s().iter().chain(dhead.f32s().iter()).all(|v| v.is_finite()), "{far}");
            assert!(acceptance < 1.2e-38 || dhead.f32s().iter().any(|v| v.abs() > 1.0), "{far}: {dhead:?}");
        }
    }
}

/// The loss over a shared vocabulary is computed another way: with one rank it must come to the same.
#[test]
fn parallel_loss_of_one_rank_is_the_loss() {
    for objective in OBJECTIVES {
        for case in [Case::new(40, 8, 30, 2, objective), Case::new(40, 8, 30, 2, objective).with_logits()] {
            let (want, got) = (case.run().unwrap(), case.run_on(Some(&alone())).unwrap());
            assert_eq!(got.argmax, want.argmax, "{objective:?}");
            for (got, want) in got.groups.iter().zip(&want.groups) {
                assert!((got.loss - want.loss).abs() < 1e-5 * want.loss.abs(), "{objective:?}");
                assert!((got.acceptance - want.acceptance).abs() < 1e-5 * want.acceptance, "{objective:?}");
            }
            for (got, want) in [(got.dx, want.dx), (got.dhead, want.dhead)] {
                assert_close_max("gradient", &got.unwrap().to_f32(), &want.unwrap().to_f32(), 1e-5);
            }
        }
    }
}
