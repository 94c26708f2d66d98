//! A draft, a source of features and hooks under the test's control.

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use serde_json::json;
use specforge_methods::{Batch, DraftMethod, Drafter, Frozen, MethodConfig, PendingLoss, VocabMap};
use specforge_models::{Capture, TargetInfo};
use specforge_nn::optimizer::AdamWConfig;
use specforge_nn::schedule::ScheduleConfig;
use specforge_tensor::{Device, Params, Tape, Tensor};
use specforge_testkit::{Lcg, SmallTarget};
use specforge_train::features::{RowFeatures, assemble};
use specforge_train::{
    Event, FeatureSource, Hooks, Optimizer, Order, Outcome, Ranks, Result, Settings, State, Trainer,
};

/// Tokens of every row.
pub(crate) const LEN: usize = 10;
const WIDTH: usize = 32;
const VOCAB: usize = 263;

/// A folder for runs, and a method.
pub(crate) struct Fixture {
    pub(crate) folder: tempfile::TempDir,
    method: Box<dyn DraftMethod>,
    pub(crate) params: Params,
    /// What another rank's method is built of.
    info: TargetInfo,
    frozen: Frozen,
    config: MethodConfig,
}

/// The steps in a run's `metrics.jsonl`, and the loss of each.
pub(crate) fn log(folder: &Path) -> Vec<(u64, f64)> {
    let text = fs_err::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let record = |line: &str| {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        (record["step"].as_u64().unwrap(), record["loss"].as_f64().unwrap())
    };
    text.lines().map(record).collect()
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::on(Device::Cpu)
    }

    /// As [`Fixture::new`], trained on a device.
    pub(crate) fn on(device: Device) -> Self {
        Self::built(device, VocabMap::full(VOCAB), &json!({ "ttt-steps": 2 }))
    }

    /// With other settings, and a draft vocabulary that two and four ranks can share.
    pub(crate) fn shareable(eagle3: &serde_json::Value) -> Self {
        Self::built(Device::Cpu, even_vocab(), eagle3)
    }

    fn built(device: Device, vocab: VocabMap, eagle3: &serde_json::Value) -> Self {
        let folder = specforge_testkit::tempdir();
        SmallTarget::llama(1).write(folder.path());
        let info = TargetInfo::read(folder.path()).unwrap();
        let mut lcg = Lcg::new(1);
        let mut draw = || {
            let table =
                Tensor::from_f32(Device::Cpu, lcg.normals(VOCAB * WIDTH, 0.5), &[VOCAB, WIDTH]).unwrap();
            table.cast(device.storage()).unwrap().to_device(device).unwrap()
        };
        let frozen = Frozen { embedding: draw(), head: draw() };
        let config: MethodConfig = serde_json::from_value(json!({ "eagle3": eagle3 })).unwrap();
        let (method, params) = config.build(&info, &frozen, vocab, 1).unwrap();
        Self { folder, method, params, info, frozen, config }
    }

    /// The draft of [`Fixture::shareable`] as a rank has it that shares batches with these.
    pub(crate) fn shared(&self, ranks: &specforge_methods::Ranks) -> (Box<dyn DraftMethod>, Params) {
        self.config.build_on(ranks, &self.info, &self.frozen, even_vocab(), 1).unwrap()
    }

    /// The log of a run of this name.
    pub(crate) fn log(&self, name: &str) -> Vec<(u64, f64)> {
        log(&self.folder.path().join(name))
    }

    /// As [`Fixture::trainer`], on a rank.
    pub(crate) fn ranked(&self, name: &str, ranks: Ranks) -> Trainer<'_> {
        let mut trainer = self.trainer(name);
        let config = trainer.optimizer.config().clone();
        trainer.optimizer = Optimizer::new(config, &trainer.params, Some(ranks)).unwrap();
        trainer
    }

    /// A run of this name, not begun: 12 rows, two in a micro-batch, one micro-batch a step, two epochs.
    pub(crate) fn trainer(&self, name: &str) -> Trainer<'_> {
        // A copy whose stacks are its own, as those of a draft that was just built are.
        let mut params = self.params.clone();
        params.fill(Vec::new()).unwrap();
        self.trainer_of(name, self.method.as_ref(), params)
    }

    /// As [`Fixture::trainer`], of a draft that was built for it.
    pub(crate) fn trainer_of<'a>(
        &self,
        name: &str,
        method: &'a dyn DraftMethod,
        params: Params,
    ) -> Trainer<'a> {
        let folder = self.folder.path().join(name);
        fs_err::create_dir_all(&folder).unwrap();
        let order = Order {
            rows: (0..12).map(|row| (row, LEN)).collect(),
            tokens_per_batch: 2 * LEN,
            accumulation: 1,
            seed: 5,
        };
        let settings = Settings {
            folder,
            total_steps: order.total_steps(2),
            shrink_on_oom: false,
            log_every: 1,
            eval_every: 0,
            save_every: 2,
            keep: 0,
            schedule: ScheduleConfig::default(),
            held_out: vec![vec![12, 13], vec![14]],
        };
        // An epsilon well above the smallest gradients: rounding must not turn an update around.
        let config = AdamWConfig { lr: 1e-2, eps: 1e-4, ..AdamWConfig::default() };
        Trainer {
            method,
            optimizer: Optimizer::new(config, &params, None).unwrap(),
            params,
            order,
            settings,
            state: State::new(json!({ "test": name })),
        }
    }
}

/// The first 200 tokens.
fn even_vocab() -> VocabMap {
    VocabMap::from_offsets(&[0; 200], VOCAB).unwrap()
}

/// Features by row, the same every time; from some row on, something else.
pub(crate) struct Source {
    /// This row has a NaN in its hidden states.
    pub(crate) nan: Option<usize>,
    /// This row cannot be read.
    pub(crate) broken: Option<usize>,
}

/// Nothing special about any row.
pub(crate) fn sound() -> Source {
    Source { nan: None, broken: None }
}

impl FeatureSource for Source {
    fn fetch(&mut self, rows: &[usize]) -> Result<Batch> {
        let broken = rows.iter().find(|row| self.broken == Some(**row));
        if let Some(&row) = broken {
            let reason = "the disk says no".to_owned();
            return Err(specforge_train::Error::Row { row: row as u64, reason });
        }
        assemble(rows, rows.iter().map(|&row| self.row(row)).collect())
    }
}

impl Source {
    fn row(&self, row: usize) -> RowFeatures {
        let mut lcg = Lcg::new(100 + row as u64);
        let mut states = |width: usize| {
            let mut values = lcg.normals(LEN * width, 1.0);
            if self.nan == Some(row) {
                values[3] = f32::NAN;
            }
            let values = values.into_iter().map(bf16::from_f32).collect();
            Tensor::from_bf16(Device::Cpu, values, &[LEN, width]).unwrap()
        };
        let (hidden_states, last_hidden) = (states(3 * WIDTH), states(WIDTH));
        let mut ids = || (0..LEN).map(|_| lcg.below(VOCAB) as u32).collect::<Vec<_>>();
        RowFeatures {
            input_ids: ids(),
            loss_mask: (0..LEN).map(|t| u8::from(t > 2)).collect(),
            hidden_states,
            last_hidden,
            argmax: ids(),
            logsumexp: vec![6.0; LEN],
        }
    }
}

/// A method on a device that has room for so many tokens at once.
#[derive(Debug)]
pub(crate) struct Narrow<'a> {
    pub(crate) method: &'a dyn DraftMethod,
    pub(crate) most: usize,
}

impl DraftMethod for Narrow<'_> {
    fn capture(&self) -> &Capture {
        self.method.capture()
    }

    fn loss(&self, tape: &Tape<'_>, batch: &Batch) -> specforge_methods::Result<PendingLoss> {
        let pending = self.method.loss(tape, batch)?;
        if batch.n_tokens() <= self.most {
            return Ok(pending);
        }
        let (asked, free, total, held, peak) = (1 << 30, 1 << 20, 80 << 30, 79 << 30, 79 << 30);
        let full = specforge_cuda::Error::OutOfMemory { asked, free, total, held, peak };
        Err(specforge_tensor::Error::from(full).into())
    }

    fn drafter<'a>(&'a self, params: &'a Params) -> specforge_methods::Result<Box<dyn Drafter + 'a>> {
        self.method.drafter(params)
    }

    fn vocab(&self) -> &VocabMap {
        self.method.vocab()
    }

    fn export_config(&self) -> BTreeMap<String, serde_json::Value> {
        self.method.export_config()
    }
}

/// Scripted acceptance lengths and a step to stop after.
#[derive(Default)]
pub(crate) struct Script {
    /// What decoding gives, evaluation by evaluation; then nothing.
    pub(crate) acceptance: Vec<Option<f64>>,
    /// Stop is asked for from this step on.
    pub(crate) stop_after: Option<u64>,
    /// Steps seen and the loss of each.
    pub(crate) losses: Vec<f64>,
    /// Evaluations so far.
    pub(crate) evaluations: usize,
}

impl Hooks for Script {
    fn event(&mut self, event: Event<'_>) {
        if let Event::Step { figures, .. } = event {
            self.losses.push(figures.objective.value());
        }
    }

    fn stop_requested(&self) -> bool {
        self.stop_after.is_some_and(|step| self.losses.len() as u64 >= step)
    }

    fn acceptance_length(&mut self, _: &dyn DraftMethod, _: &Params) -> Result<Option<f64>> {
        self.evaluations += 1;
        Ok(self.acceptance.get(self.evaluations - 1).copied().flatten())
    }
}

/// Runs to the end.
pub(crate) fn run(trainer: &mut Trainer<'_>) -> Script {
    let mut script = Script::default();
    assert_eq!(trainer.run(&mut sound(), &mut script).unwrap(), Outcome::Finished);
    script
}

/// All trained weights, by name.
pub(crate) fn weights(trainer: &Trainer<'_>) -> Vec<(String, Vec<f32>)> {
    let trained = trainer.params.iter().filter(|(_, p)| p.trainable);
    trained.map(|(_, p)| (p.name.clone(), p.value.to_f32())).collect()
}

/// Names in a folder, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = fs_err::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
