//! The fused head and soft-target loss, and statistics over a vocabulary. Logits exist a chunk at a time.

mod shared;

use specforge_cuda::{Arg, Gemm, GemmType, Launch, Operand, Readback};

use super::launch::{at, at_mut, gpu_of, in_bf16, letter, output, run};
use super::units::{LOSS, PLAIN};
use super::{gemm, rows};
use crate::kernels::{RowFigures, RowLoss, SoftTargets, TeacherRows, VocabStats};
use crate::ops::teacher_chunks;
use crate::{DType, Later, Result, Tensor};

/// Bytes of the logits that exist at once. Few in this crate's tests, so that they cross chunks.
const CHUNK: usize = if cfg!(test) { 1 << 18 } else { 256 << 20 };

fn plain(address: u64, ld: usize) -> Operand {
    Operand { address, ld, transposed: false }
}

/// Logits `x[first..first + n] · headᵀ`, `[n, vocab]`, of the type of `logits`.
fn logits_of(x: &Tensor, first: usize, head: &Tensor, logits: &Tensor, n: usize) -> Result<()> {
    let (vocab, k) = head.rows_cols();
    let a = plain(at(x)? + (2 * first * k) as u64, k);
    let b = Operand { transposed: true, ..plain(at(head)?, k) };
    let output = if letter(logits) == 'f' { GemmType::F32 } else { GemmType::Bf16 };
    let (d, input) = (plain(at(logits)?, vocab), GemmType::Bf16);
    gemm::product(x, &Gemm { m: n, n: vocab, k, a, b, input, d, output, c: None, bias: None, scales: None })
}

/// `dx[first..] = dlogits · head`.
fn head_dgrad(dlogits: &Tensor, head: &Tensor, dx: &Tensor, first: usize) -> Result<()> {
    let ((n, vocab), k) = (dlogits.rows_cols(), head.rows_cols().1);
    let (a, b) = (plain(at(dlogits)?, vocab), plain(at(head)?, k));
    let (d, t) = (plain(at(dx)? + (2 * first * k) as u64, k), GemmType::Bf16);
    let gemm = Gemm { m: n, n: k, k: vocab, a, b, input: t, d, output: t, c: None, bias: None, scales: None };
    Ok(gpu_of(dx).gemm(&gemm)?)
}

/// `dhead += dlogitsᵀ · x[first..]`, or `=` where it is fresh.
fn head_wgrad(dlogits: &Tensor, x: &Tensor, first: usize, dhead: &mut Tensor, fresh: bool) -> Result<()> {
    let ((n, vocab), k) = (dlogits.rows_cols(), x.rows_cols().1);
    let a = Operand { transposed: true, ..plain(at(dlogits)?, vocab) };
    let b = plain(at(x)? + (2 * first * k) as u64, k);
    let d = plain(at_mut(dhead)?, k);
    let (input, output) = (GemmType::Bf16, GemmType::F32);
    let gemm = Gemm {
        m: vocab,
        n: k,
        k: n,
        a,
        b,
        input,
        d,
        output,
        c: (!fresh).then_some(d),
        bias: None,
        scales: None,
    };
    Ok(gpu_of(x).gemm(&gemm)?)
}

/// Threads for a row of statistics.
fn row_threads(vocab: usize) -> usize {
    if vocab <= 16384 { 256 } else { 1024 }
}

pub(super) fn vocab_stats(hidden: &Tensor, head: &Tensor) -> Result<VocabStats> {
    let (hidden, head) = (in_bf16(hidden)?, in_bf16(head)?);
    let (n, vocab) = (hidden.rows_cols().0, head.rows_cols().0);
    let stats = Stats::new(&hidden, n)?;
    // Whole tiles of the product: 523 rows take the time of 768.
    let most = (CHUNK / (4 * vocab).max(1)).max(1);
    let step = if most > 256 { most / 256 * 256 } else { most }.min(n.max(1));
    let logits = output(&hidden, DType::F32, &[step, vocab])?;
    for first in (0..n).step_by(step) {
        let count = step.min(n - first);
        logits_of(&hidden, first, &head, &logits, count)?;
        stats.add(&logits, first, count)?;
    }
    stats.finish()
}

pub(super) fn logit_stats(logits: &Tensor) -> Result<VocabStats> {
    let n = logits.rows_cols().0;
    let stats = Stats::new(logits, n)?;
    stats.add(logits, 0, n)?;
    stats.finish()
}

struct Stats {
    top: Tensor,
    argmax: Tensor,
    sum: Tensor,
}

impl Stats {
    fn new(like: &Tensor, n: usize) -> Result<Self> {
        let of = |dtype| output(like, dtype, &[n]);
        Ok(Self { top: of(DType::F32)?, argmax: of(DType::U32)?, sum: of(DType::F32)? })
    }

    fn add(&self, logits: &Tensor, first: usize, n: usize) -> Result<()> {
        let (vocab, skip) = (logits.rows_cols().1, 4 * first as u64);
        let kernel = if letter(logits) == 'f' { "vocab_stats_f" } else { "vocab_stats_b" };
        let args = args![
            at(&self.top)? + skip,
            at(&self.argmax)? + skip,
            at(&self.sum)? + skip,
            at(logits)?,
            n as i32,
            vocab as i32,
            vocab as i64,
            0i32,
            1i32,
        ];
        run(gpu_of(logits), &LOSS, kernel, [n, 1, 1], row_threads(vocab), args)
    }

    fn finish(self) -> Result<VocabStats> {
        let n = self.top.len();
        let logsumexp = output(&self.top, DType::F32, &[n])?;
        let args = args![at(&logsumexp)?, at(&self.top)?, at(&self.sum)?, n as i32];
        run(gpu_of(&self.top), &LOSS, "vocab_stats_finish", [n.div_ceil(256), 1, 1], 256, args)?;
        Ok(VocabStats { top: self.top, argmax: self.argmax, logsumexp })
    }
}

/// The teacher of the rows that the loss reads, each once.
struct Teacher<'a> {
    source: TeacherRows<'a>,
    /// Hidden states (or logits) of those rows.
    values: Tensor,
    /// Their log-sum-exp over the whole vocabulary.
    whole: Tensor,
    vocab: usize,
}

impl<'a> Teacher<'a> {
    fn new(targets: &SoftTargets<'a>, teacher_row: &[u32], vocab: usize) -> Result<Self> {
        let mut read = teacher_row.to_vec();
        read.dedup();
        let (TeacherRows::Hidden { hidden: all, .. } | TeacherRows::Logits(all)) = targets.teacher;
        let is_all = read.len() == all.rows_cols().0;
        let index = Tensor::from_u32(all.device(), read);
        let column = targets.logsumexp.reshape(&[targets.logsumexp.len(), 1])?;
        let (values, whole) = if is_all {
            (in_bf16(all)?, column)
        } else {
            (in_bf16(&rows::gather(all, &index)?)?, rows::gather(&column, &index)?)
        };
        Ok(Self { source: targets.teacher, values, whole: whole.cast(DType::F32)?, vocab })
    }

    /// Logits over the draft vocabulary and their log-sum-exp of `n` of the rows from `first` on.
    fn chunk(&self, first: usize, n: usize) -> Result<(Tensor, Tensor)> {
        let logits = match self.source {
            TeacherRows::Hidden { head, .. } => {
                let logits = output(&self.values, DType::Bf16, &[n, self.vocab])?;
                logits_of(&self.values, first, &in_bf16(head)?, &logits, n)?;
                logits
            }
            TeacherRows::Logits(_) => self.values.rows(first..first + n)?,
        };
        let lse = output(&logits, DType::F32, &[n])?;
        let args = args![at(&lse)?, at(&logits)?, n as i32, self.vocab as i32, self.vocab as i64];
        run(gpu_of(&logits), &LOSS, "row_lse_b", [n, 1, 1], row_threads(self.vocab), args)?;
        Ok((logits, lse))
    }
}

/// What the rows give, filled chunk by chunk.
struct Figures {
    cross_entropy: Tensor,
    acceptance: Tensor,
    argmax: Tensor,
}

impl Figures {
    fn new(like: &Tensor, n: usize) -> Result<Self> {
        let figure = |dtype| output(like, dtype, &[n]);
        Ok(Self {
            cross_entropy: figure(DType::F32)?,
            acceptance: figure(DType::F32)?,
            argmax: figure(DType::U32)?,
        })
    }

    fn read(&self) -> Result<Later<RowFigures>> {
        let start = |t: &Tensor| -> Result<Readback> { Ok(gpu_of(t).read_back(at(t)?, 4 * t.len())?) };
        let [ce, acceptance, argmax] = [&self.cross_entropy, &self.acceptance, &self.argmax].map(start);
        let (ce, acceptance, argmax) = (ce?, acceptance?, argmax?);
        Ok(Later::new(move || {
            Ok(RowFigures {
                cross_entropy: bytemuck::allocation::pod_collect_to_vec(ce.wait()?),
                acceptance: bytemuck::allocation::pod_collect_to_vec(acceptance.wait()?),
                argmax: bytemuck::allocation::pod_collect_to_vec(argmax.wait()?),
            })
        }))
    }
}

pub(super) fn soft_target_loss(
    x: &Tensor,
    head: &Tensor,
    targets: &SoftTargets<'_>,
    mut dhead: Option<(&mut Tensor, bool)>,
) -> Result<RowLoss> {
    if let Some(ranks) = targets.ranks {
        return shared::soft_target_loss((x, head), targets, ranks, dhead);
    }
    let (x, head) = (in_bf16(x)?, in_bf16(head)?);
    let ((n_rows, k), vocab) = (x.rows_cols(), head.rows_cols().0);
    let row_of = targets.teacher_row.u32s().expect("the loss's rows come from the host");
    let teacher = Teacher::new(targets, row_of, vocab)?;
    let local = Tensor::from_u32(x.device(), places_of(row_of));
    let figures = Figures::new(&x, n_rows)?;
    let dx = targets.wants_dx.then(|| output(&x, DType::Bf16, &[n_rows, k])).transpose()?;
    let wants_gradient = dx.is_some() || dhead.is_some();
    let places = local.u32s().expect("just made");
    if let Some((dhead, true)) = dhead.as_mut().filter(|_| places.is_empty()) {
        gpu_of(&x).fill_zero(at_mut(dhead)?, 4 * dhead.len())?;
    }
    // Chunks of one size: short products are slow ones.
    let most = (CHUNK / (2 * vocab).max(1)).max(1);
    let even = n_rows.div_ceil(n_rows.div_ceil(most).max(1)) + most / 256;
    for rows in teacher_chunks(places, even.min(most).max(1)) {
        let (first, end) = (places[rows.start] as usize, places[rows.end - 1] as usize + 1);
        let (teacher_logits, teacher_lse) = teacher.chunk(first, end - first)?;
        let logits = output(&x, DType::Bf16, &[rows.len(), vocab])?;
        logits_of(&x, rows.start, &head, &logits, rows.len())?;
        let skip = 4 * rows.start as u64;
        let args = args![
            at(&logits)?,
            at(&figures.cross_entropy)? + skip,
            at(&figures.acceptance)? + skip,
            at(&figures.argmax)? + skip,
            at(&teacher_logits)?,
            at(&teacher_lse)?,
            at(&teacher.whole)?,
            at(&local)? + skip,
            at(targets.ce_weight)? + skip,
            at(targets.acceptance_weight)? + skip,
            first as i32,
            targets.log_acceptance,
            rows.len() as i32,
            vocab as i32,
            vocab as i64,
            vocab as i64,
            wants_gradient,
        ];
        row_losses(&x, (rows.len(), vocab), args)?;
        if let Some(dx) = &dx {
            head_dgrad(&logits, &head, dx, rows.start)?;
        }
        if let Some((dhead, fresh)) = &mut dhead {
            head_wgrad(&logits, &x, rows.start, dhead, std::mem::take(fresh))?;
        }
    }
    Ok(RowLoss { figures: figures.read()?, dx })
}

/// The place of each row of an ascending list among its distinct rows.
fn places_of(rows: &[u32]) -> Vec<u32> {
    let mut place = 0;
    let next = |i: usize| {
        place += u32::from(i > 0 && rows[i] != rows[i - 1]);
        place
    };
    (0..rows.len()).map(next).collect()
}

/// Loss, figures and gradient of a chunk's rows: each row is kept in shared memory where it fits.
fn row_losses(x: &Tensor, (rows, vocab): (usize, usize), args: &[Arg<'_>]) -> Result<()> {
    let gpu = gpu_of(x);
    let row = (2 * vocab).next_multiple_of(16);
    // The kernel has a few sums of its own there.
    let fits = row + 2048 <= gpu.properties().shared_memory;
    let (kernel, shared) = if fits { ("soft_target", row) } else { ("soft_target_large", 0) };
    let grid = [rows, 1, 1];
    Ok(gpu.launch(&Launch { unit: &LOSS, defines: PLAIN, kernel, grid, block: 512, shared }, args)?)
}
