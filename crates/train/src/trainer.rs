//! The loop: fetch, step, and once in a while log, evaluate and save. It knows no method by name, no device, and not
//! where features come from.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

use specforge_methods::{Batch, DraftMethod};
use specforge_nn::optimizer::AdamW;
use specforge_nn::schedule::ScheduleConfig;
use specforge_tensor::{Device, Params};

use crate::checkpoint::Best;
use crate::log::{HeldRecord, Log};
use crate::step::{PendingStep, evaluate, step};
use crate::{Checkpoint, Checkpoints, Error, FeatureSource, Figures, Order, Record, Result, State};

/// How a run goes, beyond its order of rows.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The run's folder: `metrics.jsonl` and `checkpoints/` are in it.
    pub folder: PathBuf,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Whether a step that does not fit into device memory is taken again in smaller portions.
    pub shrink_on_oom: bool,
    /// Steps between records; at least 1.
    pub log_every: u64,
    /// Steps between evaluations; 0: at the end only.
    pub eval_every: u64,
    /// Steps between checkpoints; 0: at the end only.
    pub save_every: u64,
    /// Checkpoints kept besides the best; 0: all.
    pub keep: usize,
    /// The learning rate over the run.
    pub schedule: ScheduleConfig,
    /// Rows held out for evaluation, as micro-batches.
    pub held_out: Vec<Vec<usize>>,
}

/// A run: what is trained, on what, and how.
#[derive(Debug)]
pub struct Trainer<'a> {
    /// The method.
    pub method: &'a dyn DraftMethod,
    /// Its weights.
    pub params: Params,
    /// The optimizer.
    pub optimizer: AdamW,
    /// The order of rows.
    pub order: Order,
    /// The settings.
    pub settings: Settings,
    /// Where the run stands.
    pub state: State,
}

/// Figures on held-out rows.
#[derive(Debug, Clone)]
pub struct Held {
    /// Losses and metrics; `None` where no row is held out.
    pub figures: Option<Figures>,
    /// From decoding held-out prompts, if the run can.
    pub acceptance_length: Option<f64>,
}

/// What happens in a run, for whoever shows it.
#[derive(Debug)]
pub enum Event<'a> {
    /// A step was taken; the figures are the step's own.
    Step {
        /// Steps so far.
        step: u64,
        /// Steps of the whole run.
        total: u64,
        /// The step's figures.
        figures: &'a Figures,
        /// Seconds the step took.
        seconds: f64,
    },
    /// A record was written.
    Record(&'a Record),
    /// Held-out rows were evaluated.
    Evaluated(&'a Held),
    /// A checkpoint was saved.
    Saved(&'a std::path::Path),
}

/// What the loop asks of its caller.
pub trait Hooks {
    /// Shows an event.
    fn event(&mut self, event: Event<'_>);

    /// Whether to stop after this step, save and return.
    fn stop_requested(&self) -> bool;

    /// The acceptance length of the draft from decoding held-out prompts; `None` where no target is at hand.
    fn acceptance_length(&mut self, method: &dyn DraftMethod, params: &Params) -> Result<Option<f64>>;
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// It was asked to stop, and saved.
    Stopped,
}

impl Trainer<'_> {
    /// Takes up a saved step: the run goes on to the same bits as one that never stopped.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        self.optimizer = checkpoint.restore(&mut self.params, self.optimizer.config().clone())?;
        self.state = State { identity: self.state.identity.clone(), ..checkpoint.state.clone() };
        Ok(())
    }

    /// Runs to the end, or until a hook asks to stop.
    pub fn run(&mut self, source: &mut dyn FeatureSource, hooks: &mut dyn Hooks) -> Result<Outcome> {
        let checkpoints = Checkpoints::open(self.settings.folder.join("checkpoints"), self.settings.keep)?;
        checkpoints.recover()?;
        let log = Log::resume(&self.settings.folder, self.state.position.step)?;
        let mut window = Window::new();
        while self.state.position.step < self.settings.total_steps {
            let epoch = self.order.epoch(self.state.position.epoch);
            if epoch.is_empty() {
                return Err(Error::NoRows("no row is left for training".to_owned()));
            }
            let outcome = self.run_epoch(source, &epoch, (&checkpoints, &log, &mut window), hooks)?;
            if outcome == Outcome::Stopped {
                return Ok(outcome);
            }
            source.end_of_epoch()?;
        }
        Ok(Outcome::Finished)
    }

    /// The rest of an epoch. Batches are fetched ahead on a thread of their own while the last one is trained on.
    fn run_epoch(
        &mut self,
        source: &mut dyn FeatureSource,
        epoch: &[Vec<Vec<usize>>],
        (checkpoints, log, window): (&Checkpoints, &Log, &mut Window),
        hooks: &mut dyn Hooks,
    ) -> Result<Outcome> {
        let left = (self.settings.total_steps - self.state.position.step) as usize;
        let steps: Vec<_> = epoch.iter().skip(self.state.position.epoch_step as usize).take(left).collect();
        let (source, device) = (Mutex::new(source), self.device());
        std::thread::scope(|scope| {
            let (sender, batches) = sync_channel::<Result<Batch>>(1);
            let (source, planned) = (&source, &steps);
            scope.spawn(move || {
                for rows in planned.iter().flat_map(|micro_batches| micro_batches.iter()) {
                    // The receiver is gone once the run stops; then so is the reason to fetch.
                    if sender.send(fetch(source, rows, device)).is_err() {
                        return;
                    }
                }
            });
            let mut in_flight = None;
            for micro_batches in &steps {
                let end_of_epoch = self.state.position.epoch_step + 1 == epoch.len() as u64;
                let issued = self.one_step(&batches, micro_batches.len(), end_of_epoch, checkpoints)?;
                // Figures are read one step late, while the device works on the next one.
                let before = in_flight.replace(issued);
                self.settle(before, window, hooks, checkpoints)?;
                if self.is_due(hooks) {
                    self.settle(in_flight.take(), window, hooks, checkpoints)?;
                    if self.after_step(source, checkpoints, (log, window), hooks)? {
                        return Ok(Outcome::Stopped);
                    }
                }
            }
            self.settle(in_flight, window, hooks, checkpoints)?;
            Ok(Outcome::Finished)
        })
    }

    /// Where the draft is trained.
    fn device(&self) -> Device {
        let trained = self.params.iter().find(|(_, param)| param.trainable);
        trained.map_or(Device::Cpu, |(_, param)| param.value.device())
    }

    /// Asks for the next step.
    fn one_step(
        &mut self,
        batches: &Receiver<Result<Batch>>,
        n_batches: usize,
        end_of_epoch: bool,
        checkpoints: &Checkpoints,
    ) -> Result<Issued> {
        let started = Instant::now();
        let factor = self.settings.schedule.lr_factor(self.state.position.step, self.settings.total_steps);
        let (lr, shrink) = (self.optimizer.config().lr * factor, self.settings.shrink_on_oom);
        let batches = (0..n_batches).map(|_| batches.recv().expect("the fetching thread sends every batch"));
        let pending = step(self.method, (&mut self.params, &mut self.optimizer), batches, (lr, shrink));
        let pending = pending.map_err(|e| with_last_good(e, checkpoints))?;
        let position = &mut self.state.position;
        position.step += 1;
        (position.epoch, position.epoch_step) =
            if end_of_epoch { (position.epoch + 1, 0) } else { (position.epoch, position.epoch_step + 1) };
        Ok(Issued { pending, lr, started, step: self.state.position.step })
    }

    /// Takes in the figures of a step, waiting for them if need be.
    fn settle(
        &mut self,
        issued: Option<Issued>,
        window: &mut Window,
        hooks: &mut dyn Hooks,
        checkpoints: &Checkpoints,
    ) -> Result<()> {
        let Some(Issued { pending, lr, started, step }) = issued else { return Ok(()) };
        let done = pending.wait().map_err(|e| with_last_good(e, checkpoints))?;
        self.state.tokens += done.figures.tokens;
        let since = window.settled.map_or(started, |settled| settled.max(started));
        let (seconds, total) = (since.elapsed().as_secs_f64(), self.settings.total_steps);
        window.settled = Some(Instant::now());
        hooks.event(Event::Step { step, total, figures: &done.figures, seconds });
        window.add(&done.figures, lr, done.grad_norm);
        Ok(())
    }

    fn is_last(&self) -> bool {
        self.state.position.step == self.settings.total_steps
    }

    /// Whether something is due every so many steps.
    fn due(&self, every: u64) -> bool {
        self.is_last() || every > 0 && self.state.position.step.is_multiple_of(every)
    }

    /// Whether anything is to be done after this step.
    fn is_due(&self, hooks: &dyn Hooks) -> bool {
        let settings = &self.settings;
        let every = [settings.eval_every, settings.log_every, settings.save_every];
        every.into_iter().any(|every| self.due(every)) || hooks.stop_requested()
    }

    /// Once in a while: log, evaluate, save. Returns whether to stop.
    fn after_step(
        &mut self,
        source: &Mutex<&mut dyn FeatureSource>,
        checkpoints: &Checkpoints,
        (log, window): (&Log, &mut Window),
        hooks: &mut dyn Hooks,
    ) -> Result<bool> {
        let step = self.state.position.step;
        let stop = !self.is_last() && hooks.stop_requested();
        let held =
            if self.due(self.settings.eval_every) { Some(self.evaluate(source, hooks)?) } else { None };
        if held.is_some() || self.due(self.settings.log_every) {
            let record = window.take(&self.state.position, held.as_ref());
            log.write(&record)?;
            hooks.event(Event::Record(&record));
        }
        let best = held.is_some() && self.state.best.is_some_and(|best| best.step == step);
        if self.due(self.settings.save_every) || stop || best {
            let folder = checkpoints.save(&self.params, &self.optimizer, &self.state)?;
            hooks.event(Event::Saved(&folder));
        }
        Ok(stop)
    }

    fn evaluate(&mut self, source: &Mutex<&mut dyn FeatureSource>, hooks: &mut dyn Hooks) -> Result<Held> {
        let figures = match self.settings.held_out.as_slice() {
            [] => None,
            rows => {
                let batches = rows.iter().map(|rows| fetch(source, rows, self.device()));
                Some(evaluate(self.method, &self.params, batches)?)
            }
        };
        let acceptance_length = hooks.acceptance_length(self.method, &self.params)?;
        let estimate = figures.as_ref().map(Figures::estimated_acceptance_length);
        if let Some(reached) = acceptance_length.or(estimate) {
            let decoded = acceptance_length.is_some();
            let better = |best: Best| (decoded, reached) > (best.decoded, best.acceptance_length);
            if self.state.best.is_none_or(better) {
                let step = self.state.position.step;
                self.state.best = Some(Best { step, acceptance_length: reached, decoded });
            }
        }
        let held = Held { figures, acceptance_length };
        hooks.event(Event::Evaluated(&held));
        Ok(held)
    }
}

/// A step that was asked for.
#[derive(Debug)]
struct Issued {
    pending: PendingStep,
    lr: f64,
    started: Instant,
    step: u64,
}

fn fetch(source: &Mutex<&mut dyn FeatureSource>, rows: &[usize], device: Device) -> Result<Batch> {
    let mut source =
        source.lock().map_err(|_| Error::Mode("the source of features failed before".to_owned()))?;
    Ok(source.fetch(rows)?.to_device(device)?)
}

/// Names the last good checkpoint in an error that stops the run for numerical reasons.
fn with_last_good(error: Error, checkpoints: &Checkpoints) -> Error {
    match error {
        Error::NotFinite { step, what, value, rows, .. } => {
            let latest = checkpoints.latest().ok().flatten();
            let checkpoint = latest.map_or("none yet".to_owned(), |c| c.folder.display().to_string());
            Error::NotFinite { step, what, value, rows, checkpoint }
        }
        other => other,
    }
}

/// Figures since the last record.
#[derive(Debug)]
struct Window {
    figures: Figures,
    lr: f64,
    grad_norm: f64,
    started: Instant,
    /// When the last step's figures came.
    settled: Option<Instant>,
}

impl Window {
    fn new() -> Self {
        Self { figures: Figures::default(), lr: 0.0, grad_norm: 0.0, started: Instant::now(), settled: None }
    }

    fn add(&mut self, figures: &Figures, lr: f64, grad_norm: f64) {
        self.figures.merge(figures);
        (self.lr, self.grad_norm) = (lr, grad_norm);
    }

    fn take(&mut self, position: &crate::Position, held: Option<&Held>) -> Record {
        let Self { figures, lr, grad_norm, started, .. } = std::mem::replace(self, Self::new());
        Record {
            step: position.step,
            epoch: position.epoch,
            loss: figures.objective.value(),
            accuracy: figures.values("accuracy"),
            acceptance: figures.values("acceptance"),
            lr,
            grad_norm,
            tokens_per_second: figures.tokens as f64 / started.elapsed().as_secs_f64().max(1e-9),
            held_out: held.map(|held| {
                let (figures, values) = (held.figures.as_ref(), |name: &str| {
                    held.figures.as_ref().map_or_else(Vec::new, |figures| figures.values(name))
                });
                HeldRecord {
                    loss: figures.map(|figures| figures.objective.value()),
                    accuracy: values("accuracy"),
                    acceptance: values("acceptance"),
                    estimated_acceptance_length: figures.map(Figures::estimated_acceptance_length),
                    acceptance_length: held.acceptance_length,
                }
            }),
        }
    }
}
