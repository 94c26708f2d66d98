//! The loop: fetch, step, and once in a while log, evaluate and save. It knows no method by name, no device, and not
//! where features come from.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use specforge_methods::{Batch, DraftMethod};
use specforge_nn::schedule::ScheduleConfig;
use specforge_tensor::{Device, Group, Later, Params};

use crate::checkpoint::Best;
use crate::hooks::{Event, Held, Hooks, Outcome};
use crate::log::Log;
use crate::round::{Round, fetch, locked};
use crate::saving::{Saving, Snapshot};
use crate::step::{PendingStep, evaluate, step};
use crate::tally::{Tally, from_first};
use crate::window::Window;
use crate::{Checkpoint, Checkpoints, Error, FeatureSource, Figures, Optimizer, Order, Result, State};

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
    pub optimizer: Optimizer,
    /// The order of rows.
    pub order: Order,
    /// The settings.
    pub settings: Settings,
    /// Where the run stands.
    pub state: State,
}

impl Trainer<'_> {
    /// Takes up a saved step: on as many ranks as before, the run goes on to the same bits as one that never stopped;
    /// on another number, to the same rows in the same order.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        checkpoint.restore(&mut self.params, &mut self.optimizer)?;
        self.state = State { identity: self.state.identity.clone(), ..checkpoint.state.clone() };
        Ok(())
    }

    /// Runs to the end, or until a hook asks to stop. All ranks call this, and end with every parameter whole.
    pub fn run(&mut self, source: &mut dyn FeatureSource, hooks: &mut dyn Hooks) -> Result<Outcome> {
        let checkpoints = Checkpoints::open(self.settings.folder.join("checkpoints"), self.settings.keep)?;
        let is_first = self.data().is_none_or(|data| data.is_first);
        if is_first {
            checkpoints.recover()?;
        }
        if let Some(ranks) = self.optimizer.ranks() {
            ranks.mesh.world.barrier()?;
        }
        let log =
            if is_first { Some(Log::resume(&self.settings.folder, self.state.position.step)?) } else { None };
        let saving = Saving::new(checkpoints.clone());
        let mut course = Course { log, window: Window::new(), saving, stop: false };
        let outcome = self.run_epochs(source, &mut course, hooks);
        if outcome.is_err() && self.optimizer.ranks().is_some() {
            // What the others would add to a checkpoint may never come.
            return outcome.map_err(|e| with_last_good(e, &checkpoints));
        }
        let saved = course.saving.finish();
        let outcome = outcome.map_err(|e| with_last_good(e, &checkpoints))?;
        show_saved(saved?, hooks);
        self.optimizer.gather(&mut self.params)?;
        Ok(outcome)
    }

    fn run_epochs(
        &mut self,
        source: &mut dyn FeatureSource,
        course: &mut Course,
        hooks: &mut dyn Hooks,
    ) -> Result<Outcome> {
        while self.state.position.step < self.settings.total_steps {
            let epoch = self.order.epoch(self.state.position.epoch);
            if epoch.is_empty() {
                return Err(Error::NoRows("no row is left for training".to_owned()));
            }
            let outcome = self.run_epoch(source, &epoch, course, hooks)?;
            if outcome == Outcome::Stopped {
                return Ok(outcome);
            }
            source.end_of_epoch()?;
        }
        Ok(Outcome::Finished)
    }

    /// The rest of an epoch. Batches are fetched ahead on a thread of their own while the last one is trained on, unless
    /// ranks meet in a fetch.
    fn run_epoch(
        &mut self,
        source: &mut dyn FeatureSource,
        epoch: &[Vec<Vec<usize>>],
        course: &mut Course,
        hooks: &mut dyn Hooks,
    ) -> Result<Outcome> {
        let left = (self.settings.total_steps - self.state.position.step) as usize;
        let peers = source.meets();
        let steps = epoch.iter().skip(self.state.position.epoch_step as usize).take(left);
        let steps: Vec<_> = steps.map(|step| self.rounds(step, peers.clone())).collect();
        let counts: Vec<usize> = steps.iter().map(Vec::len).collect();
        let (source, device) = (Mutex::new(source), self.device());
        if peers.is_some() {
            let mut batches = steps.iter().flatten().map(|round| fetch(&source, round, device));
            return self.run_steps((&counts, epoch.len()), &mut batches, (&source, course), hooks);
        }
        std::thread::scope(|scope| {
            let (sender, batches) = sync_channel::<Result<Option<Batch>>>(1);
            let (source, planned) = (&source, &steps);
            scope.spawn(move || {
                for round in planned.iter().flatten() {
                    // The receiver is gone once the run stops; then so is the reason to fetch.
                    if sender.send(fetch(source, round, device)).is_err() {
                        return;
                    }
                }
            });
            // Moved in: the thread ends when this does.
            let mut batches = batches.into_iter();
            self.run_steps((&counts, epoch.len()), &mut batches, (source, course), hooks)
        })
    }

    /// Steps of so many micro-batches each, the last ones of an epoch of `epoch_steps`.
    fn run_steps(
        &mut self,
        (counts, epoch_steps): (&[usize], usize),
        batches: &mut dyn Iterator<Item = Result<Option<Batch>>>,
        (source, course): (&Mutex<&mut dyn FeatureSource>, &mut Course),
        hooks: &mut dyn Hooks,
    ) -> Result<Outcome> {
        let mut in_flight = None;
        for n_batches in counts {
            let end_of_epoch = self.state.position.epoch_step + 1 == epoch_steps as u64;
            let issued = self.one_step(batches, *n_batches, end_of_epoch, hooks)?;
            // Figures are read one step late, while the device works on the next one.
            let before = in_flight.replace(issued);
            self.settle(before, course, hooks)?;
            if self.is_due(course, hooks) {
                self.settle(in_flight.take(), course, hooks)?;
                if self.after_step(source, course, hooks)? {
                    return Ok(Outcome::Stopped);
                }
            }
        }
        self.settle(in_flight, course, hooks)?;
        Ok(Outcome::Finished)
    }

    /// Where the draft is trained.
    fn device(&self) -> Device {
        let trained = self.params.iter().find(|(_, param)| param.trainable);
        trained.map_or(Device::Cpu, |(_, param)| param.value.device())
    }

    /// The ranks that rows are dealt to, if there are several.
    fn data(&self) -> Option<Data> {
        self.optimizer.ranks().map(|ranks| Data {
            group: ranks.mesh.data.clone(),
            sequence: ranks.mesh.sequence.clone(),
            device: ranks.mesh.device,
            is_first: ranks.mesh.is_first(),
        })
    }

    /// What of a step's micro-batches this rank has, one after the other, each with what the ranks have that it fetches
    /// together with.
    fn rounds(&self, step: &[Vec<usize>], peers: Option<Range<usize>>) -> Vec<Round> {
        let (rank, size) = self.data().map_or((0, 1), |data| (data.group.rank(), data.group.size()));
        let peers = peers.unwrap_or(rank..rank + 1);
        let own = rank - peers.start;
        let rounds = self.order.rounds(step, peers, size).into_iter();
        rounds.map(|rows| Round { rows, own }).collect()
    }

    /// Asks for the next step.
    fn one_step(
        &mut self,
        batches: &mut dyn Iterator<Item = Result<Option<Batch>>>,
        n_batches: usize,
        end_of_epoch: bool,
        hooks: &dyn Hooks,
    ) -> Result<Issued> {
        let started = Instant::now();
        let factor = self.settings.schedule.lr_factor(self.state.position.step, self.settings.total_steps);
        let (lr, shrink) = (self.optimizer.config().lr * factor, self.settings.shrink_on_oom);
        let batches = (0..n_batches).map(|_| batches.next().expect("every batch is fetched"));
        let pending = step(self.method, (&mut self.params, &mut self.optimizer), batches, (lr, shrink))?;
        let own = Tally { tokens: pending.tokens, stop: hooks.stop_requested() };
        let tally = match self.optimizer.ranks() {
            Some(ranks) => own.over(&ranks.mesh)?,
            // Alone, whether to stop is asked after the step.
            None => Later::ready(Tally { stop: false, ..own }),
        };
        let position = &mut self.state.position;
        position.step += 1;
        (position.epoch, position.epoch_step) =
            if end_of_epoch { (position.epoch + 1, 0) } else { (position.epoch, position.epoch_step + 1) };
        Ok(Issued { pending, tally, lr, started, step: self.state.position.step })
    }

    /// Takes in the figures of a step, waiting for them if need be.
    fn settle(&mut self, issued: Option<Issued>, course: &mut Course, hooks: &mut dyn Hooks) -> Result<()> {
        show_saved(course.saving.poll()?, hooks);
        let Some(Issued { pending, tally, lr, started, step }) = issued else { return Ok(()) };
        let done = pending.wait()?;
        let tally = tally.wait()?;
        course.stop |= tally.stop;
        self.state.tokens += tally.tokens;
        let window = &mut course.window;
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

    /// Whether the run is to stop: all ranks agree, one step after the first was asked to.
    fn stop_requested(&self, course: &Course, hooks: &dyn Hooks) -> bool {
        if self.optimizer.ranks().is_some() { course.stop } else { hooks.stop_requested() }
    }

    /// Whether anything is to be done after this step.
    fn is_due(&self, course: &Course, hooks: &dyn Hooks) -> bool {
        let settings = &self.settings;
        let every = [settings.eval_every, settings.log_every, settings.save_every];
        every.into_iter().any(|every| self.due(every)) || self.stop_requested(course, hooks)
    }

    /// Once in a while: log, evaluate, save. Returns whether to stop.
    fn after_step(
        &mut self,
        source: &Mutex<&mut dyn FeatureSource>,
        course: &mut Course,
        hooks: &mut dyn Hooks,
    ) -> Result<bool> {
        let step = self.state.position.step;
        let stop = !self.is_last() && self.stop_requested(course, hooks);
        let held =
            if self.due(self.settings.eval_every) { Some(self.evaluate(source, hooks)?) } else { None };
        if held.is_some() || self.due(self.settings.log_every) {
            self.record(held.as_ref(), course, hooks)?;
        }
        let best = held.is_some() && self.state.best.is_some_and(|best| best.step == step);
        if self.due(self.settings.save_every) || stop || best {
            self.optimizer.gather(&mut self.params)?;
            let snapshot = Snapshot::take(&self.params, &self.optimizer, &self.state)?;
            show_saved(course.saving.start(snapshot)?, hooks);
        }
        Ok(stop)
    }

    /// A line of the log: figures of all ranks since the last one.
    fn record(&self, held: Option<&Held>, course: &mut Course, hooks: &mut dyn Hooks) -> Result<()> {
        let mut window = std::mem::replace(&mut course.window, Window::new());
        if let Some(data) = self.data() {
            window.figures = data.over(window.figures)?;
        }
        let record = window.record(&self.state.position, held);
        if let Some(log) = &course.log {
            log.write(&record)?;
        }
        hooks.event(Event::Record(&record));
        Ok(())
    }

    fn evaluate(&mut self, source: &Mutex<&mut dyn FeatureSource>, hooks: &mut dyn Hooks) -> Result<Held> {
        self.optimizer.gather(&mut self.params)?;
        let data = self.data();
        let figures = match self.settings.held_out.as_slice() {
            [] => None,
            rows => {
                let peers = locked(source)?.meets();
                let own = self.rounds(rows, peers);
                let batches = own.iter().map(|round| fetch(source, round, self.device()));
                // Half a batch on one of the ranks that share it would be out of step with the others.
                let halve = self.optimizer.ranks().is_none_or(|ranks| ranks.per_batch() == 1);
                let figures = evaluate(self.method, &self.params, batches, halve)?;
                Some(data.as_ref().map_or(Ok(figures.clone()), |data| data.over(figures.clone()))?)
            }
        };
        let mut decoded = hooks.acceptance_length(self.method, &self.params)?;
        let mut estimate = figures.as_ref().map(Figures::estimated_acceptance_length);
        if let Some(ranks) = self.optimizer.ranks() {
            // Whether this step is the best one is for the first rank to say.
            [decoded, estimate] =
                from_first(ranks.mesh.world.as_ref(), ranks.mesh.device, [decoded, estimate])?;
        }
        self.note_best(decoded, estimate);
        let held = Held { figures, acceptance_length: decoded };
        hooks.event(Event::Evaluated(&held));
        Ok(held)
    }

    fn note_best(&mut self, decoded: Option<f64>, estimate: Option<f64>) {
        let Some(acceptance_length) = decoded.or(estimate) else { return };
        let decoded = decoded.is_some();
        let better = |best: Best| (decoded, acceptance_length) > (best.decoded, best.acceptance_length);
        if self.state.best.is_none_or(better) {
            let step = self.state.position.step;
            self.state.best = Some(Best { step, acceptance_length, decoded });
        }
    }
}

/// The ranks that rows are dealt to.
#[derive(Debug)]
struct Data {
    group: Arc<dyn Group>,
    /// Those that share this rank's rows.
    sequence: Arc<dyn Group>,
    device: Device,
    is_first: bool,
}

impl Data {
    /// Figures of all ranks.
    fn over(&self, figures: Figures) -> Result<Figures> {
        let of_rows = figures.over_sequence(self.sequence.as_ref(), self.device)?;
        of_rows.over(self.group.as_ref(), self.device)
    }
}

/// What goes along with a run.
#[derive(Debug)]
struct Course {
    /// Of the first rank alone.
    log: Option<Log>,
    window: Window,
    saving: Saving,
    /// A rank was asked to stop.
    stop: bool,
}

fn show_saved(folder: Option<PathBuf>, hooks: &mut dyn Hooks) {
    if let Some(folder) = folder {
        hooks.event(Event::Saved(&folder));
    }
}

/// A step that was asked for.
#[derive(Debug)]
struct Issued {
    pending: PendingStep,
    tally: Later<Tally>,
    lr: f64,
    started: Instant,
    step: u64,
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
