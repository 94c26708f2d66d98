//! `specforge bench loss`: the fused head and loss alone.

use anyhow::{Result, ensure};
use serde_json::json;
use specforge_tensor::{Device, SoftTargets, Tape, TeacherRows, Tensor};

use super::clock::{Spread, time};
use super::floor::{self, Floor};
use super::{Output, Repeats, count, speed, tflops};

/// Measure the draft's head fused with its loss: logits of draft and teacher, loss, and both gradients.
///
/// The floor is its matrix products alone, replayed. Operations: three products of ROWS x HIDDEN x VOCAB (forward,
/// both gradients) and one of TEACHER-ROWS x HIDDEN x VOCAB. The default is 7 test-time-training steps of llama3-8b on
/// 2048 tokens.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Draft rows with loss, over all test-time-training steps.
    #[arg(long, default_value_t = 14336, value_parser = count)]
    rows: usize,
    /// Teacher rows that they read, each by as many.
    #[arg(long, default_value_t = 2048, value_parser = count)]
    teacher_rows: usize,
    /// Width of the states.
    #[arg(long, default_value_t = 4096, value_parser = count)]
    hidden: usize,
    /// The draft vocabulary.
    #[arg(long, default_value_t = 32000, value_parser = count)]
    vocab: usize,
    #[command(flatten)]
    repeats: Repeats,
    #[command(flatten)]
    output: Output,
}

/// What the loss reads and adds to.
struct Inputs {
    x: Tensor,
    head: Tensor,
    hidden: Tensor,
    teacher_head: Tensor,
    logsumexp: Tensor,
    teacher_row: Tensor,
    weight: Tensor,
    none: Tensor,
    dhead: Tensor,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let (rows, teacher) = (args.rows, args.teacher_rows);
    ensure!(
        teacher <= rows,
        "--teacher-rows {teacher}: expected at most the {rows} draft rows that read them"
    );
    let device = args.output.device()?;
    let mut inputs = Inputs::new(args, device)?;
    let ms = time(device, args.repeats, || inputs.loss(device))?;
    let floor = match device.gpu() {
        Some(gpu) => Some(floor::replay(gpu, &floor::record(gpu, || inputs.loss(device))?)?),
        None => None,
    };
    let flop = 2.0 * (3 * rows + teacher) as f64 * args.hidden as f64 * args.vocab as f64;
    let facts = json!({
        "bench": "loss", "rows": rows, "teacher_rows": teacher, "hidden": args.hidden, "vocab": args.vocab,
        "ms": ms, "flop": flop, "tflops": tflops(flop, ms.median), "floor": floor,
        "over_floor": floor.as_ref().map(|floor| ms.median / floor.ms),
    });
    args.output.print(device, facts, lines(ms, flop, floor.as_ref()))
}

fn lines(ms: Spread, flop: f64, floor: Option<&Floor>) -> Vec<(&'static str, String)> {
    let mut lines = vec![("loss", format!("{}, {}", ms.text(), speed(tflops(flop, ms.median))))];
    let text = |floor: &Floor| {
        let (n, ratio) = (floor.products, ms.median / floor.ms);
        format!("{:.3} ms for {n} matrix products; the loss takes {ratio:.3} times that", floor.ms)
    };
    lines.extend(floor.map(|floor| ("floor", text(floor))));
    lines
}

impl Inputs {
    fn new(args: &Args, device: Device) -> Result<Self> {
        let (rows, teacher, h) = (args.rows, args.teacher_rows, args.hidden);
        let std = (h as f32).powf(-0.5);
        let states = |n, seed| Tensor::random(device, &[n, h], 1.0, seed);
        let matrix = |seed| Tensor::random(device, &[args.vocab, h], std, seed);
        let (hidden, teacher_head) = (states(teacher, 1)?, matrix(2)?);
        let logsumexp = Tape::vocab_stats(&hidden, &teacher_head)?.logsumexp;
        let teacher_row = Tensor::from_u32(device, (0..rows).map(|r| (r * teacher / rows) as u32).collect());
        let column = |value: f32| Tensor::from_f32(device, vec![value; rows], &[rows]);
        let (weight, none) = (column(1.0 / rows as f32)?, column(0.0)?);
        let dhead = Tensor::zeros(device, &[args.vocab, h])?;
        let (x, head) = (states(rows, 3)?, matrix(4)?);
        Ok(Self { x, head, hidden, teacher_head, logsumexp, teacher_row, weight, none, dhead })
    }

    fn loss(&mut self, device: Device) -> Result<()> {
        let targets = SoftTargets {
            teacher: TeacherRows::Hidden { hidden: &self.hidden, head: &self.teacher_head },
            logsumexp: &self.logsumexp,
            teacher_row: &self.teacher_row,
            ce_weight: &self.weight,
            acceptance_weight: &self.none,
            log_acceptance: false,
            wants_dx: true,
            ranks: None,
        };
        // Nobody reads the figures: they come later, on their own.
        Ok(device
            .kernels()
            .soft_target_loss(&self.x, &self.head, &targets, Some((&mut self.dhead, false)))
            .map(drop)?)
    }
}
