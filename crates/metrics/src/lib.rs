//! Counters and histograms that many threads add to without a lock, and OpenMetrics text
//! (<https://prometheus.io/docs/specs/om/open_metrics_spec/>, 1.0) that a Prometheus reads.
//!
//! It knows no metric by name: each crate keeps its own and writes them when it is asked. Times are seconds.

mod text;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use text::{CONTENT_TYPE, Kind, Text};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one more.
    pub fn add_one(&self) {
        self.add(1);
    }

    /// Counts so many more.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the buckets of calls and operations, in seconds: from the lists, which take a millisecond, to the
/// kubelet's patience of two minutes.
pub const CALL_BOUNDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];

/// How long things took, by buckets.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    /// One for each bound, and one for what is longer than all of them.
    buckets: Vec<AtomicU64>,
    nanoseconds: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new(CALL_BOUNDS)
    }
}

impl Histogram {
    /// With these upper bounds, in seconds, ascending.
    pub fn new(bounds: &'static [f64]) -> Self {
        let buckets = std::iter::repeat_with(AtomicU64::default).take(bounds.len() + 1).collect();
        Self { bounds, buckets, nanoseconds: AtomicU64::new(0) }
    }

    /// Counts something that took so long.
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_observation_is_in_the_first_bucket_that_holds_it() {
        let histogram = Histogram::new(&[0.01, 0.1]);
        for millis in [5, 10, 11, 500] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut text = Text::default();
        text.family("t_seconds", Kind::Histogram, "Time.");
        text.histogram(&[("rpc", "Version")], &histogram);
        let expected = "\
# TYPE t_seconds histogram
# UNIT t_seconds seconds
# HELP t_seconds Time.
t_seconds_bucket{rpc=\"Version\",le=\"0.01\"} 2
t_seconds_bucket{rpc=\"Version\",le=\"0.1\"} 3
t_seconds_bucket{rpc=\"Version\",le=\"+Inf\"} 4
t_seconds_count{rpc=\"Version\"} 4
t_seconds_sum{rpc=\"Version\"} 0.526
# EOF
";
        assert_eq!(text.finish(), expected);
    }
}
