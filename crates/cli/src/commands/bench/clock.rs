//! Points in time, on the device's own clock where it has one, and what a series of times comes to.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use specforge_cuda::Event;
use specforge_tensor::Device;

use super::Repeats;

/// A point in the work of a device.
pub(super) enum Mark {
    /// The CPU works while it is asked, so its clock says it.
    Host(Instant),
    /// A GPU works later: the point is in its stream.
    Device(Event),
}

/// Milliseconds of one thing done several times.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Mark {
    pub(super) fn now(device: Device) -> Result<Self> {
        match device.gpu() {
            None => Ok(Self::Host(Instant::now())),
            Some(gpu) => Ok(Self::Device(gpu.record()?)),
        }
    }

    /// Milliseconds since an earlier mark of the same device; waits until this one is passed.
    fn ms_since(&self, earlier: &Self) -> Result<f64> {
        match (self, earlier) {
            (Self::Device(end), Self::Device(start)) => Ok(end.milliseconds_since(start)?),
            (Self::Host(end), Self::Host(start)) => Ok(end.duration_since(*start).as_secs_f64() * 1e3),
            _ => unreachable!("marks of one series are of one device"),
        }
    }
}

/// Milliseconds from each mark to the next.
pub(super) fn laps(marks: &[Mark]) -> Result<Vec<f64>> {
    marks.windows(2).map(|pair| pair[1].ms_since(&pair[0])).collect()
}

/// The middle of some times; of an even number the mean of the two in the middle.
pub(super) fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    f64::midpoint(low, high)
}

impl Spread {
    pub(super) fn of(times: &[f64]) -> Self {
        let min = times.iter().copied().fold(f64::INFINITY, f64::min);
        Self { median: median(times), min, max: times.iter().copied().fold(0.0, f64::max) }
    }

    /// `12.34 ms (12.30 to 12.51)`.
    pub(super) fn text(&self) -> String {
        format!("{:.3} ms ({:.3} to {:.3})", self.median, self.min, self.max)
    }
}

/// Times of `work`, done again and again without a pause.
pub(super) fn time(device: Device, repeats: Repeats, mut work: impl FnMut() -> Result<()>) -> Result<Spread> {
    (0..repeats.warmup).try_for_each(|_| work())?;
    let mut marks = vec![Mark::now(device)?];
    for _ in 0..repeats.steps {
        work()?;
        marks.push(Mark::now(device)?);
    }
    Ok(Spread::of(&laps(&marks)?))
}

#[cfg(test)]
mod tests {
    use super::Spread;

    #[test]
    fn the_median_is_the_middle() {
        let spread = |times: &[f64]| Spread::of(times);
        assert_eq!(spread(&[3.0, 1.0, 9.0]).median, 3.0);
        assert_eq!(spread(&[4.0, 1.0, 2.0, 9.0]).median, 3.0);
        assert_eq!((spread(&[3.0, 1.0]).min, spread(&[3.0, 1.0]).max), (1.0, 3.0));
    }
}
