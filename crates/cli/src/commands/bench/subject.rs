//! What `bench step` measures: a draft with its optimizer, its features, and one training step.

use anyhow::Result;
use specforge_methods::eagle3::{Config, Eagle3};
use specforge_methods::{Batch, DraftMethod, Exchange, Frozen, Loss, Ratio, Teacher, VocabMap};
use specforge_models::{Target, TargetInfo};
use specforge_nn::optimizer::{AdamWConfig, StepReport};
use specforge_tensor::{Combine, DType, Device, Later, Params, Tape, Tensor};
use specforge_train::features::teacher_is_read;
use specforge_train::{Optimizer, Ranks, Sent, backward};

use super::data::Data;

/// Parts of a step, in their order.
pub(in crate::commands) const PHASES: [&str; 4] = ["target", "forward", "backward", "optimizer"];

/// A draft in training.
pub(in crate::commands) struct Subject {
    method: Eagle3,
    params: Params,
    optimizer: Optimizer,
    features: Features,
}

/// Where features come from.
#[derive(Debug, Clone, Copy)]
pub(in crate::commands) enum Source {
    /// They lie on the device, as if read from a store.
    Store,
    /// The target computes them in every step; its weights are stored as this, or as the device has them.
    Target(Option<DType>),
}

/// What a step takes its features from.
enum Features {
    Offline(Batch),
    /// The target runs one step ahead, as the trainer lets it: the host has read its best tokens by then.
    Online {
        target: Box<Target>,
        data: Data,
        read: Vec<u32>,
        ahead: Option<Computed>,
    },
}

/// What the target was asked for.
struct Computed {
    hidden_states: Tensor,
    last_hidden: Tensor,
    logsumexp: Tensor,
    best: Later<Vec<u32>>,
}

/// What a step gives when the device has got there.
pub(in crate::commands) struct Pending {
    loss: Later<Loss>,
    report: Later<StepReport>,
}

impl Subject {
    /// A draft for this target over this batch; or what one of several ranks has of it, of which those that share the batch
    /// exchange rows like this.
    pub(in crate::commands) fn new(
        (info, vocab): (&TargetInfo, VocabMap),
        config: &Config,
        data: Data,
        source: Source,
        (device, ranks): (Device, Option<(Ranks, Exchange)>),
    ) -> Result<Self> {
        let target = match source {
            Source::Store => None,
            Source::Target(storage) => Some(Target::random(info.clone(), device, storage)?),
        };
        let frozen = match &target {
            Some(target) => Frozen { embedding: target.embedding().clone(), head: target.head().clone() },
            None => random_frozen(info, device)?,
        };
        let draw = |name: &str, shape: &[usize]| {
            Ok(Tensor::random(device, shape, config.initializer_range as f32, seed_of(name))?)
        };
        let of_batch = ranks.as_ref().map(|(ranks, exchange)| ranks.of_batch(*exchange)).unwrap_or_default();
        let (method, params) = Eagle3::drawn(&of_batch, config, info, &frozen, vocab, draw)?;
        let ranks = ranks.map(|(ranks, _)| ranks);
        let optimizer = Optimizer::new(AdamWConfig::default(), &params, ranks)?;
        let features = match target {
            Some(target) => {
                Features::Online { target: Box::new(target), read: read_rows(&data), data, ahead: None }
            }
            None => Features::Offline(random_batch(&method, &data, &frozen)?),
        };
        Ok(Self { method, params, optimizer, features })
    }

    /// One step as `specforge train` takes it; `lap` is called after each of [`PHASES`].
    pub(in crate::commands) fn step(&mut self, lap: &mut dyn FnMut() -> Result<()>) -> Result<Pending> {
        let computed = self.features.next(&self.method)?;
        let batch = match (&computed, &self.features) {
            (Some(batch), _) | (None, Features::Offline(batch)) => batch,
            (None, Features::Online { .. }) => unreachable!("the target has run"),
        };
        lap()?;
        self.optimizer.gather(&mut self.params)?;
        let tape = Tape::recording(&self.params);
        let pending = self.method.loss(&tape, batch)?;
        lap()?;
        let grads = backward(tape, &mut self.optimizer, &self.params)?;
        lap()?;
        let lr = self.optimizer.config().lr;
        let report = self.optimizer.step(&mut self.params, &grads, (pending.weight, lr))?;
        lap()?;
        Ok(Pending { loss: pending.loss, report })
    }

    /// The loss of a batch, of which those that share its rows have a share each. All ranks call this.
    pub(in crate::commands) fn of_batch(&self, share: Ratio) -> Result<f64> {
        let Some(Ranks { mesh, .. }) = self.optimizer.ranks() else { return Ok(share.value()) };
        let mut sums = Tensor::from_f64(mesh.device, vec![share.sum, share.weight])?;
        mesh.sequence.all_reduce(&mut sums, Combine::Sum)?;
        let sums = sums.later_f64()?.wait()?;
        Ok(Ratio { sum: sums[0], weight: sums[1] }.value())
    }

    /// What left this rank in each of the first steps, which were so many; nothing alone.
    pub(in crate::commands) fn sent(&self, steps: u32) -> Option<Sent> {
        self.optimizer.ranks().map(|_| self.optimizer.sent().per_step(u64::from(steps)))
    }
}

impl Pending {
    /// This rank's share of the loss; waits for the step. One that is not finite says that what was measured is no
    /// training.
    pub(in crate::commands) fn wait(self) -> Result<Ratio> {
        let (loss, report) = (self.loss.wait()?.objective, self.report.wait()?);
        let finite = loss.sum.is_finite() && report.grad_norm.is_finite();
        anyhow::ensure!(finite, "the step gave loss {} and gradient norm {}", loss.sum, report.grad_norm);
        Ok(loss)
    }
}

impl Features {
    /// The batch of this step, and the target on its way to the next one's.
    fn next(&mut self, method: &Eagle3) -> Result<Option<Batch>> {
        let Self::Online { target, data, read, ahead } = self else { return Ok(None) };
        let now = match ahead.take() {
            Some(computed) => computed,
            None => compute(target, data, read, method)?,
        };
        let argmax = place_best(&now.best.wait()?, read, data.n_tokens(), (method.vocab(), target.info()));
        *ahead = Some(compute(target, data, read, method)?);
        let teacher = Teacher::LastHidden { hidden: now.last_hidden, argmax, logsumexp: now.logsumexp };
        Ok(Some(data.batch(now.hidden_states, teacher)))
    }
}

/// Asks the target for the features of a batch.
fn compute(target: &Target, data: &Data, read: &[u32], method: &Eagle3) -> Result<Computed> {
    // 1. The forward pass with capture.
    let documents: Vec<&[u32]> = data.bounds.iter().map(|b| &data.input_ids[b.clone()]).collect();
    let captured = target.forward(&documents, method.capture())?;
    let last_hidden = captured.last_hidden.expect("EAGLE3 captures the last hidden state");
    // 2. Best token and log-sum-exp of the rows that a loss may read.
    let (none, device, n) = (Params::new(), target.device(), read.len());
    let (tape, index) = (Tape::inference(&none), Tensor::from_u32(device, read.to_vec()));
    let rows = tape.gather_rows(&tape.input(last_hidden.clone()), &index)?;
    let stats = Tape::vocab_stats(rows.value(), target.head())?;
    let mut logsumexp = Tensor::zeros(device, &[data.n_tokens(), 1])?;
    let from = Tensor::from_u32(device, (0..n as u32).collect());
    device.kernels().copy_rows(&mut logsumexp, &index, &stats.logsumexp.reshape(&[n, 1])?, &from)?;
    let logsumexp = logsumexp.reshape(&[data.n_tokens()])?;
    // 3. The host has to know the best tokens to know which rows are live.
    let best = stats.argmax.later_u32()?;
    Ok(Computed { hidden_states: captured.hidden_states, last_hidden, logsumexp, best })
}

/// Best tokens by row. Random weights seldom choose a token of the draft vocabulary, a trained target nearly always
/// does: each goes to a draft token near it, so that the rows with loss are those of the mask.
fn place_best(best: &[u32], read: &[u32], n: usize, (vocab, info): (&VocabMap, &TargetInfo)) -> Vec<u32> {
    let near = |token: u32| vocab.target_ids()[token as usize * vocab.len() / info.vocab_size];
    let mut all = vec![0; n];
    read.iter().zip(best).for_each(|(&t, &token)| all[t as usize] = near(token));
    all
}

/// Rows whose teacher a loss may read.
fn read_rows(data: &Data) -> Vec<u32> {
    let of = |b: &std::ops::Range<usize>| {
        let (mask, start) = (&data.loss_mask[b.clone()], b.start);
        (0..mask.len()).filter(|&t| teacher_is_read(mask, t)).map(|t| (start + t) as u32).collect::<Vec<_>>()
    };
    data.bounds.iter().flat_map(of).collect()
}

/// Embedding and head whose products with normed states are of size 1.
fn random_frozen(info: &TargetInfo, device: Device) -> Result<Frozen> {
    let (shape, std) = ([info.vocab_size, info.hidden_size], (info.hidden_size as f32).powf(-0.5));
    let embedding = Tensor::random(device, &shape, std, 1)?;
    let head =
        if info.tie_word_embeddings { embedding.clone() } else { Tensor::random(device, &shape, std, 2)? };
    // Offline the embedding stays on the host, as `specforge train` leaves it there.
    Ok(Frozen { embedding: embedding.to_device(Device::Cpu)?, head })
}

/// Features as if read from a store: every best token is one that the draft can name.
fn random_batch(method: &Eagle3, data: &Data, frozen: &Frozen) -> Result<Batch> {
    let (device, width, n) = (frozen.head.device(), frozen.head.rows_cols().1, data.n_tokens());
    let hidden_states = Tensor::random(device, &[n, method.capture().layers.len() * width], 1.0, 3)?;
    let hidden = Tensor::random(device, &[n, width], 1.0, 4)?;
    let kept = method.vocab().target_ids();
    let argmax = data.input_ids.iter().map(|&id| kept[id as usize % kept.len()]).collect();
    let logsumexp = Tape::vocab_stats(&hidden, &frozen.head)?.logsumexp;
    Ok(data.batch(hidden_states, Teacher::LastHidden { hidden, argmax, logsumexp }))
}

/// Another seed for every weight (FNV-1a of its name).
fn seed_of(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}
