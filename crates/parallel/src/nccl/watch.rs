//! Looks after calls that a device has been asked for and nobody waits for.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use specforge_cuda::{Communicator, Event, Gpu};
use specforge_tensor::Result;

use crate::watch::Alarm;

/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What one rank has asked for.
#[derive(Debug, Clone)]
pub(super) struct Watch {
    gpu: &'static Gpu,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    /// Calls that the device has not passed yet, as far as is known, and when they were asked for.
    pending: VecDeque<(&'static str, Event, Instant)>,
    /// A call that the host itself is in.
    host: Option<(&'static str, Instant)>,
    /// When the last call was found done.
    progress: Instant,
    communicators: Vec<Arc<Communicator>>,
}

impl Watch {
    /// Looks after rank `rank` of `size` for the rest of the process.
    pub(super) fn start(
        gpu: &'static Gpu,
        (rank, size): (usize, usize),
        patience: Duration,
        alarm: Alarm,
    ) -> Self {
        let (pending, host, progress, communicators) = (VecDeque::new(), None, Instant::now(), Vec::new());
        let state = Arc::new(Mutex::new(State { pending, host, progress, communicators }));
        let watch = Self { gpu, state };
        let looking = watch.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(LOOK_EVERY);
                let mut state = looking.lock();
                if let Some((op, why)) = state.look(gpu, patience) {
                    // The calls end, and what waits for them goes on; the alarm ends the process before it gets far.
                    alarm(&format!("rank {rank} of {size}, {op}: {why}"));
                    state.communicators.iter().for_each(|communicator| communicator.abort());
                    return;
                }
            }
        });
        watch
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another communicator whose errors are asked for.
    pub(super) fn add(&self, communicator: Arc<Communicator>) {
        self.lock().communicators.push(communicator);
    }

    /// A call was just asked for.
    pub(super) fn asked(&self, op: &'static str) -> Result<()> {
        let event = self.gpu.record()?;
        self.lock().pending.push_back((op, event, Instant::now()));
        Ok(())
    }

    /// Does something that waits on the host.
    pub(super) fn waiting_for<T>(&self, op: &'static str, f: impl FnOnce() -> T) -> T {
        self.lock().host = Some((op, Instant::now()));
        let done = f();
        self.lock().host = None;
        done
    }
}

impl State {
    /// What is wrong, and with which call.
    fn look(&mut self, gpu: &Gpu, patience: Duration) -> Option<(&'static str, String)> {
        while self.pending.front().is_some_and(|(_, event, _)| event.is_passed(gpu)) {
            self.pending.pop_front();
            self.progress = Instant::now();
        }
        let first = self.pending.front().map(|(op, _, asked)| (*op, (*asked).max(self.progress)));
        let error = self.communicators.iter().find_map(|communicator| communicator.asynchronous_error());
        if let Some(error) = error {
            return Some((first.map_or("between calls", |(op, _)| op), error));
        }
        let late = |(_, since): &(&'static str, Instant)| since.elapsed() > patience;
        let (op, since) = self.host.into_iter().chain(first).find(late)?;
        let seconds = since.elapsed().as_secs_f64();
        let why = "another rank hangs, is gone, or is slower than parallel.timeout allows";
        Some((op, format!("not done after {seconds:.1} s: {why}")))
    }
}
