//! What is found of the engines and of the kernel, what is missing, what that disables, and the remedy.
//!
//! Needs no daemon: `stasisd doctor` and the daemon's Admin service both call [`examine`].

mod kernel;
mod programs;
#[cfg(test)]
mod tests;

use std::path::Path;

use stasis_cri_api::stasis::Finding;
use stasis_cri_api::stasis::finding::Level;

use crate::config::Config;
use crate::engines::Engines;

/// Looks at everything. Runs the engines for their versions, which takes up to a second; changes nothing.
pub(crate) fn examine(config: &Config) -> Vec<Finding> {
    let engines = Engines::locate(config);
    vec![
        programs::runc(config, &engines),
        programs::criu(config, &engines),
        programs::shim(config, &engines),
        programs::network(config, &engines),
        kernel::cgroup(),
        kernel::overlayfs(Path::new("/"), &config.root),
        kernel::run_tmpfs(),
        kernel::soft_dirty(),
        kernel::userfaultfd(Path::new("/")),
        kernel::seccomp(Path::new("/")),
        kernel::apparmor(Path::new("/")),
        kernel::selinux(Path::new("/")),
        kernel::oom_score_adj(Path::new("/")),
    ]
}

/// The findings as lines for a terminal: a mark, the subject, what was found, where; below it what to do.
pub(crate) fn report(findings: &[Finding]) -> String {
    let mut report = String::new();
    for finding in findings {
        let mark = match finding.level() {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Error => "ERROR",
        };
        let path = if finding.path.is_empty() { String::new() } else { format!("  {}", finding.path) };
        report.push_str(&format!("{mark:8}{:14}{}{path}\n", finding.subject, finding.found));
        if !finding.consequence.is_empty() {
            report.push_str(&format!("{:22}{}\n", "", finding.consequence));
        }
    }
    report
}

/// All is well with `subject`.
fn fine(subject: &str, found: impl Into<String>) -> Finding {
    Finding { subject: subject.into(), level: Level::Ok.into(), found: found.into(), ..Finding::default() }
}

/// Something less works: `consequence` says what, and the remedy.
fn warning(subject: &str, found: impl Into<String>, consequence: impl Into<String>) -> Finding {
    Finding { level: Level::Warning.into(), consequence: consequence.into(), ..fine(subject, found) }
}

/// Pods cannot run: `consequence` says why, and the remedy.
fn error(subject: &str, found: impl Into<String>, consequence: impl Into<String>) -> Finding {
    Finding { level: Level::Error.into(), consequence: consequence.into(), ..fine(subject, found) }
}

/// The finding is about a file.
fn at(path: &Path, finding: Finding) -> Finding {
    Finding { path: path.display().to_string(), ..finding }
}
