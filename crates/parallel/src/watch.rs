//! A thread that notices when a rank waits for too long: a call between ranks cannot end by itself if one is gone.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Told once that the ranks cannot go on, and why; the process must end.
pub type Alarm = fn(&str);

/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What a rank waits for at the moment.
#[derive(Debug, Clone)]
pub struct Watch {
    waiting: Arc<Mutex<Option<(&'static str, Instant)>>>,
}

impl Watch {
    /// Looks after rank `rank` of `size` for the rest of the process.
    pub fn start((rank, size): (usize, usize), patience: Duration, alarm: Alarm) -> Self {
        let watch = Self { waiting: Arc::default() };
        let waiting = watch.waiting.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(LOOK_EVERY);
                let now = *waiting.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some((op, since)) = now.filter(|(_, since)| since.elapsed() > patience) {
                    let seconds = since.elapsed().as_secs_f64();
                    alarm(&format!(
                        "rank {rank} of {size}, {op}: not done after {seconds:.1} s: another rank hangs, is gone, or is \
                         slower than parallel.timeout allows"
                    ));
                    return;
                }
            }
        });
        watch
    }

    /// Does something that waits for others.
    pub fn during<T>(&self, op: &'static str, f: impl FnOnce() -> T) -> T {
        let set = |now| *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = now;
        set(Some((op, Instant::now())));
        let done = f();
        set(None);
        done
    }
}
