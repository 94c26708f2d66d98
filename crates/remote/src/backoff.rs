//! How long to wait before trying again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// Waits that double from try to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// Tries after the first one.
    pub retries: u32,
    /// Before the second try.
    pub first: Duration,
    /// The longest wait.
    pub most: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { retries: 5, first: Duration::from_secs(1), most: Duration::from_mins(1) }
    }
}

impl Backoff {
    /// The wait after failure number `failure`, from 1: what the server asked for if it is longer, never beyond the
    /// longest. A quarter is spread by `salt`, so that requests that failed together do not come back together.
    pub fn delay(&self, failure: u32, asked: Option<Duration>, salt: u64) -> Duration {
        let doubled = self.first.saturating_mul(1 << (failure.max(1) - 1).min(16));
        let share = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
        let spread = doubled.mul_f64(0.75 + share as f64 / 1024.0);
        spread.max(asked.unwrap_or_default()).min(self.most)
    }
}

/// Sleeps, unless or until everything is to stop.
pub(crate) fn sleep(time: Duration, stop: &AtomicBool) -> Result<()> {
    let end = Instant::now() + time;
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Stopped);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(Duration::from_millis(50)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_respect_the_server() {
        let second = Duration::from_secs;
        let backoff = Backoff { retries: 3, first: second(1), most: second(10) };
        for (failure, low, high) in
            [(1, 0.75, 1.0), (2, 1.5, 2.0), (3, 3.0, 4.0), (9, 10.0, 10.0), (99, 10.0, 10.0)]
        {
            for salt in 0..20 {
                let delay = backoff.delay(failure, None, salt).as_secs_f64();
                assert!((low..=high).contains(&delay), "{failure}: {delay}");
            }
        }
        assert_eq!(backoff.delay(1, Some(second(4)), 0), second(4));
        assert_eq!(backoff.delay(1, Some(second(400)), 0), second(10));
        let differ =
            (0..8).map(|salt| backoff.delay(1, None, salt)).collect::<std::collections::BTreeSet<_>>();
        assert!(differ.len() > 4);
    }
}
