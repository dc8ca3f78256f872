//! The text: families, each with its kind, unit and help, then its samples; `# EOF` at the end.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;

use crate::Histogram;

/// What an HTTP answer with this text calls itself.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The units that a metric's name may end in.
const UNITS: [&str; 2] = ["seconds", "bytes"];

/// What a family's numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// They only grow; the samples are called `NAME_total`.
    Counter,
    /// They rise and fall.
    Gauge,
    /// They are counts in buckets.
    Histogram,
    /// Facts in labels; the samples are called `NAME_info`, and are 1.
    Info,
}

/// The text in the making.
#[derive(Debug, Default)]
pub struct Text {
    text: String,
    name: String,
    suffix: &'static str,
}

impl Text {
    /// Begins a family; its samples follow.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let (word, suffix) = match kind {
            Kind::Counter => ("counter", "_total"),
            Kind::Gauge => ("gauge", ""),
            Kind::Histogram => ("histogram", ""),
            Kind::Info => ("info", "_info"),
        };
        self.line(format_args!("# TYPE {name} {word}"));
        if let Some(unit) = UNITS.iter().find(|unit| name.ends_with(&format!("_{unit}"))) {
            self.line(format_args!("# UNIT {name} {unit}"));
        }
        self.line(format_args!("# HELP {name} {}", escaped(help)));
        name.clone_into(&mut self.name);
        self.suffix = suffix;
    }

    /// A sample of the family.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: u64) {
        let (name, suffix, labels) = (self.name.clone(), self.suffix, written(labels, None));
        self.line(format_args!("{name}{suffix}{labels} {value}"));
    }

    /// The samples of a histogram.
    pub fn histogram(&mut self, labels: &[(&str, &str)], histogram: &Histogram) {
        let name = self.name.clone();
        let bounds = histogram.bounds.iter().map(|bound| format!("{bound:?}")).chain(["+Inf".to_owned()]);
        let mut count = 0;
        for (bound, bucket) in bounds.zip(&histogram.buckets) {
            count += bucket.load(Ordering::Relaxed);
            let labels = written(labels, Some(&bound));
            self.line(format_args!("{name}_bucket{labels} {count}"));
        }
        let labels = written(labels, None);
        let seconds = std::time::Duration::from_nanos(histogram.nanoseconds.load(Ordering::Relaxed)).as_secs_f64();
        self.line(format_args!("{name}_count{labels} {count}"));
        self.line(format_args!("{name}_sum{labels} {seconds:?}"));
    }

    /// The whole text.
    pub fn finish(mut self) -> String {
        self.line(format_args!("# EOF"));
        self.text
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{line}");
    }
}

/// `{name="value",…}`, or nothing.
fn written(labels: &[(&str, &str)], bound: Option<&str>) -> String {
    let all = labels.iter().copied().chain(bound.map(|bound| ("le", bound)));
    let pairs: Vec<_> = all.map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\n', "\\n").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_of_every_kind_are_written_as_the_standard_says() {
        let mut text = Text::default();
        text.family("stasis_build", Kind::Info, "What runs.");
        text.sample(&[("version", "0.1.0")], 1);
        text.family("stasis_calls", Kind::Counter, "Calls.");
        text.sample(&[("rpc", "Version"), ("code", "OK")], 7);
        text.family("stasis_layer_bytes", Kind::Gauge, "A \"size\"\\.");
        text.sample(&[], 9);
        text.sample(&[("name", "a\"b\\c\nd")], 10);
        let expected = r#"# TYPE stasis_build info
# HELP stasis_build What runs.
stasis_build_info{version="0.1.0"} 1
# TYPE stasis_calls counter
# HELP stasis_calls Calls.
stasis_calls_total{rpc="Version",code="OK"} 7
# TYPE stasis_layer_bytes gauge
# UNIT stasis_layer_bytes bytes
# HELP stasis_layer_bytes A \"size\"\\.
stasis_layer_bytes 9
stasis_layer_bytes{name="a\"b\\c\nd"} 10
# EOF
"#;
        assert_eq!(text.finish(), expected);
    }
}
