//! Progress of what takes long, on standard error: bars on a terminal, a line for each step elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal as _;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::failure::printable;
use crate::output::Output;
use crate::units::{short_id, size};

/// Bars are drawn for at most so many blobs at a time; the rest is on its way without one.
const BARS_MAX: usize = 16;

/// Shows reports.
#[derive(Debug)]
pub(crate) struct Progress(Shown);

#[derive(Debug)]
enum Shown {
    Bars { all: MultiProgress, by_subject: HashMap<String, ProgressBar> },
    Lines { last: HashMap<String, String> },
    Nothing,
}

/// One report of the daemon.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Report<'a> {
    /// Digest of a blob, or empty for the whole.
    pub(crate) subject: &'a str,
    pub(crate) phase: &'a str,
    pub(crate) done: u64,
    /// 0 where it is not known.
    pub(crate) total: u64,
}

impl Progress {
    pub(crate) fn new(output: Output) -> Self {
        Self(match (output.is_quiet(), std::io::stderr().is_terminal()) {
            (true, _) => Shown::Nothing,
            (false, true) => Shown::Bars { all: MultiProgress::new(), by_subject: HashMap::new() },
            (false, false) => Shown::Lines { last: HashMap::new() },
        })
    }

    pub(crate) fn report(&mut self, report: Report<'_>) {
        match &mut self.0 {
            Shown::Nothing => {}
            Shown::Lines { last } => {
                if let Some(line) = line(last, report) {
                    eprintln!("{line}");
                }
            }
            Shown::Bars { all, by_subject } => bar(all, by_subject, report),
        }
    }

    /// Takes the bars away: what follows is the result.
    pub(crate) fn finish(self) {
        if let Shown::Bars { all, .. } = self.0 {
            // It fails where the terminal has gone, and then there is nothing to take away.
            let _ = all.clear();
        }
    }
}

/// The line for a report, if it is the first of its phase.
fn line(last: &mut HashMap<String, String>, report: Report<'_>) -> Option<String> {
    let before = last.insert(report.subject.to_owned(), report.phase.to_owned());
    if before.as_deref() == Some(report.phase) || report.phase.is_empty() || report.phase == "done" {
        return None;
    }
    let mut line = printable(report.phase);
    if !report.subject.is_empty() {
        line = format!("{line} {}", printable(short_id(report.subject)));
    }
    if report.total > 0 {
        line = format!("{line} ({})", size(report.total));
    }
    Some(line)
}

fn bar(all: &MultiProgress, by_subject: &mut HashMap<String, ProgressBar>, report: Report<'_>) {
    if !by_subject.contains_key(report.subject) {
        if by_subject.values().filter(|b| !b.is_finished()).count() >= BARS_MAX {
            return;
        }
        by_subject.insert(report.subject.to_owned(), all.add(ProgressBar::no_length()));
    }
    let Some(bar) = by_subject.get(report.subject) else { return };
    let known = report.total > 0;
    let template = if known {
        "{prefix:12} {msg:12} [{bar:30}] {bytes:>11} of {total_bytes:11} {bytes_per_sec}"
    } else {
        "{prefix:12} {msg:12} {spinner} {bytes:>11}"
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    if known {
        bar.set_length(report.total);
    }
    bar.set_prefix(printable(short_id(report.subject)));
    bar.set_message(printable(report.phase));
    bar.set_position(report.done);
    if matches!(report.phase, "done" | "exists") {
        bar.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_for_each_step() {
        let mut last = HashMap::new();
        let mut lines = Vec::new();
        let digest = "sha256:0123456789abcdef";
        for (subject, phase, done, total) in [
            ("", "resolving", 0, 0),
            (digest, "downloading", 0, 12_345_678),
            (digest, "downloading", 5_000_000, 12_345_678),
            ("sha256:ffff", "exists", 0, 0),
            (digest, "unpacking\x1b[0m", 0, 0),
            ("", "done", 0, 0),
        ] {
            lines.extend(line(&mut last, Report { subject, phase, done, total }));
        }
        assert_eq!(
            lines,
            ["resolving", "downloading 0123456789ab (12.3 MB)", "exists ffff", "unpacking?[0m 0123456789ab"]
        );
    }
}
