//! The processor time used a second, between one reading and the next.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Shortest time over which a rate is told. Two clients that ask in turn would else each see a few milliseconds only.
const WINDOW_MIN: Duration = Duration::from_secs(1);

/// What was read last.
#[derive(Debug, Default)]
pub(crate) struct Rate(Mutex<Option<Sample>>);

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    usage: u64,
    /// Nanoseconds a second, over the window that ended with this sample.
    rate: Option<u64>,
}

impl Rate {
    /// The rate in nanoseconds a second, as the usage is now `usage` nanoseconds; none at the first reading, and none
    /// where the counter went back.
    pub(crate) fn of(&self, usage: u64, at: Instant) -> Option<u64> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = match *last {
            Some(last) if at.saturating_duration_since(last.at) < WINDOW_MIN => return last.rate,
            Some(last) => usage.checked_sub(last.usage).and_then(|used| {
                let window = at.duration_since(last.at).as_nanos();
                u64::try_from(u128::from(used) * 1_000_000_000 / window).ok()
            }),
            None => None,
        };
        *last = Some(Sample { at, usage, rate });
        rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_between_two_readings() {
        let (rate, begin) = (Rate::default(), Instant::now());
        let at = |millis| begin + Duration::from_millis(millis);
        assert_eq!(rate.of(5_000_000_000, at(0)), None, "nothing to compare with");
        assert_eq!(rate.of(5_400_000_000, at(200)), None, "too short a window");
        assert_eq!(rate.of(6_000_000_000, at(2000)), Some(500_000_000));
        assert_eq!(rate.of(6_100_000_000, at(2500)), Some(500_000_000), "that of the last window");
        assert_eq!(rate.of(8_000_000_000, at(3000)), Some(2_000_000_000));
        assert_eq!(rate.of(1_000_000_000, at(5000)), None, "the counter began anew");
        assert_eq!(rate.of(2_000_000_000, at(7000)), Some(500_000_000));
    }
}
