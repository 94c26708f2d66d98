//! The fused loss with heads that ranks share, see `kernels/loss_shared.cu`: what the ranks combine between the kernels
//! stays on the device.

use std::ops::Range;
use std::sync::Arc;

use super::{Figures, Teacher, head_dgrad, head_wgrad, logits_of, places_of, row_threads, teacher_chunks};
use crate::cuda::launch::{at, at_mut, gpu_of, in_bf16, output, run};
use crate::cuda::units::{LOSS, LOSS_SHARED};
use crate::kernels::{RowLoss, SoftTargets};
use crate::{Combine, DType, Group, Result, Tensor};

/// One chunk: this rank's logits of its draft rows and of the teacher rows that they read.
struct Chunk<'a> {
    rows: Range<usize>,
    first_teacher: usize,
    logits: Tensor,
    teacher_logits: Tensor,
    /// Of draft rows, then of teacher rows: the largest logit and the sum of exponentials of all ranks.
    top: Tensor,
    sum: Tensor,
    /// The best token's place from the end of the draft vocabulary.
    place: Tensor,
    ranks: &'a Arc<dyn Group>,
}

/// As [`super::soft_target_loss`].
pub(super) fn soft_target_loss(
    (x, head): (&Tensor, &Tensor),
    targets: &SoftTargets<'_>,
    ranks: &Arc<dyn Group>,
    mut dhead: Option<(&mut Tensor, bool)>,
) -> Result<RowLoss> {
    let (x, head) = (in_bf16(x)?, in_bf16(head)?);
    let ((n_rows, k), vocab) = (x.rows_cols(), head.rows_cols().0);
    let row_of = targets.teacher_row.u32s().expect("the loss's rows come from the host");
    let teacher = Teacher::new(targets, row_of, vocab)?;
    let local = Tensor::from_u32(x.device(), places_of(row_of));
    let figures = Figures::new(&x, n_rows)?;
    let mut dx = targets.wants_dx.then(|| output(&x, DType::Bf16, &[n_rows, k])).transpose()?;
    let wants_gradient = dx.is_some() || dhead.is_some();
    let places = local.u32s().expect("just made");
    if let Some((dhead, true)) = dhead.as_mut().filter(|_| places.is_empty()) {
        gpu_of(&x).fill_zero(at_mut(dhead)?, 4 * dhead.len())?;
    }
    for rows in teacher_chunks(places, (super::CHUNK / (2 * vocab).max(1)).max(1)) {
        let teacher_rows = places[rows.start] as usize..places[rows.end - 1] as usize + 1;
        let chunk = Chunk::new((&x, &head), &teacher, (rows.clone(), teacher_rows), ranks)?;
        chunk.loss(targets, (&teacher, &local), &figures, wants_gradient)?;
        if let Some(dx) = &dx {
            head_dgrad(&chunk.logits, &head, dx, rows.start)?;
        }
        if let Some((dhead, fresh)) = &mut dhead {
            head_wgrad(&chunk.logits, &x, rows.start, dhead, std::mem::take(fresh))?;
        }
    }
    if let Some(dx) = &mut dx {
        ranks.all_reduce(dx, Combine::Sum)?;
    }
    Ok(RowLoss { figures: figures.read()?, dx })
}

impl<'a> Chunk<'a> {
    /// Logits, and their statistics over the ranks.
    fn new(
        (x, head): (&Tensor, &Tensor),
        teacher: &Teacher<'_>,
        (rows, teacher_rows): (Range<usize>, Range<usize>),
        ranks: &'a Arc<dyn Group>,
    ) -> Result<Self> {
        let (n, m, vocab) = (rows.len(), teacher_rows.len(), head.rows_cols().0);
        let (teacher_logits, _) = teacher.chunk(teacher_rows.start, m)?;
        let logits = output(x, DType::Bf16, &[n, vocab])?;
        logits_of(x, rows.start, head, &logits, n)?;
        let all = |dtype| output(x, dtype, &[n + m]);
        let (own_top, argmax, mut sum) = (all(DType::F32)?, all(DType::U32)?, all(DType::F32)?);
        let mut place = all(DType::U32)?;
        for (logits, first, count) in [(&logits, 0, n), (&teacher_logits, n, m)] {
            let skip = 4 * first as u64;
            let args = args![
                at(&own_top)? + skip,
                at(&argmax)? + skip,
                at(&sum)? + skip,
                at(logits)?,
                count as i32,
                vocab as i32,
                vocab as i64,
                (ranks.rank() * vocab) as i32,
                1i32,
            ];
            run(gpu_of(x), &LOSS, "vocab_stats_b", [count, 1, 1], row_threads(vocab), args)?;
        }
        let mut top = own_top.clone();
        // The clone becomes storage of its own when it is written.
        at_mut(&mut top)?;
        ranks.all_reduce(&mut top, Combine::Max)?;
        let last = (ranks.size() * vocab) as i32;
        let args =
            args![at(&sum)?, at(&place)?, at(&own_top)?, at(&argmax)?, at(&top)?, last, (n + m) as i32,];
        run(gpu_of(x), &LOSS_SHARED, "rescale_stats", [(n + m).div_ceil(256), 1, 1], 256, args)?;
        ranks.all_reduce(&mut sum, Combine::Sum)?;
        ranks.all_reduce(&mut place, Combine::Max)?;
        Ok(Self { rows, first_teacher: teacher_rows.start, logits, teacher_logits, top, sum, place, ranks })
    }

    /// Figures of the chunk; with a gradient its logits become that.
    fn loss(
        &self,
        targets: &SoftTargets<'_>,
        (teacher, local): (&Teacher<'_>, &Tensor),
        figures: &Figures,
        wants_gradient: bool,
    ) -> Result<()> {
        let (n, vocab) = self.logits.rows_cols();
        let skip = 4 * self.rows.start as u64;
        let mut parts = output(&self.logits, DType::F32, &[n, 4])?;
        let common = |parts: u64| -> Result<Vec<specforge_cuda::Arg<'static>>> {
            Ok(args![
                at(&self.logits)?,
                at(&self.teacher_logits)?,
                parts,
                at(&self.top)?,
                at(&self.sum)?,
                at(&teacher.whole)?,
                at(local)? + skip,
                self.first_teacher as i32,
                n as i32,
                vocab as i32,
                vocab as i64,
                vocab as i64,
            ]
            .to_vec())
        };
        let gpu = gpu_of(&self.logits);
        run(gpu, &LOSS_SHARED, "shared_parts", [n, 1, 1], 512, &common(at(&parts)?)?)?;
        self.ranks.all_reduce(&mut parts, Combine::Sum)?;
        let mut args = common(at(&parts)?)?;
        args.extend_from_slice(args![
            at(&figures.cross_entropy)? + skip,
            at(&figures.acceptance)? + skip,
            at(&figures.argmax)? + skip,
            at(&self.place)?,
            at(targets.ce_weight)? + skip,
            at(targets.acceptance_weight)? + skip,
            targets.log_acceptance,
            (self.ranks.size() * vocab) as i32,
            wants_gradient,
        ]);
        run(gpu, &LOSS_SHARED, "shared_gradient", [n, 1, 1], 512, &args)
    }
}
