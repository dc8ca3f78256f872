//! What a CRIU log means: the line that decided, and what to do about it.
//!
//! CRIU reports a failure as a cascade: the cause first, then one line for every function that gave up because of it,
//! and before all that sometimes complaints that change nothing. The last line (`Dumping FAILED.`) is what runtimes
//! show, and it says nothing. Here the complaints and the consequences are told apart from the cause by tables; new
//! knowledge is a new row, not new code.

mod known;

use std::fmt;

pub use known::{Known, known_failures};

/// Longest line that is repeated to people, in characters; a path in it can be 4 KiB long.
const LINE_MAX: usize = 400;

/// Errors that CRIU reports and gets over.
const NOISE: [&str; 5] = [
    // Without CAP_SYS_RESOURCE; the limit is only wished for.
    "RLIMIT_NOFILE",
    "Can't set RLIMIT",
    "setrlimit",
    // Optional probes.
    "This is not fatal",
    "Can't keep kdat cache",
];

/// Errors that only say that something below failed.
const CONSEQUENCES: [&str; 13] = [
    "Dumping FAILED",
    "Restoring FAILED",
    "Pre-dumping FAILED",
    "failed with -1",
    "failed with 1",
    "Can't dump threads",
    "Namespaces dumping finished with error",
    "Unable to restore freezer state",
    "Killing processes because of failure",
    "Unexpected EOF",
    "exited, status=",
    "killed by signal",
    "Can't cure",
];

/// Why CRIU failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    /// The line that decided, without its time stamp; empty if the log holds no error.
    pub line: String,
    /// A stable name for programs, such as `io-uring`; `unknown` for a line without an entry.
    pub code: &'static str,
    /// What the line means.
    pub meaning: &'static str,
    /// What can be done about it.
    pub hint: &'static str,
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.meaning, self.hint)?;
        if !self.line.is_empty() {
            write!(f, " (CRIU: {})", self.line)?;
        }
        Ok(())
    }
}

/// Finds the decisive error in a CRIU log. Of the errors that are neither noise nor consequences the first one with an
/// entry in the table decides, else the first one.
pub fn diagnose(log: &str) -> Diagnosis {
    let errors: Vec<&str> = log.lines().filter_map(error).filter(|line| !mentions(line, &NOISE)).collect();
    let causes = || errors.iter().filter(|line| !mentions(line, &CONSEQUENCES));
    // Consequences too may be known (a failed helper program), but only if nothing better is there.
    let known = |line: &&&str| known_failures().iter().any(|known| known.matches(line));
    let line = causes().find(known).or_else(|| causes().next()).or_else(|| errors.first()).copied().unwrap_or_default();
    let entry = known_failures().iter().find(|known| known.matches(line));
    let shown = line.chars().take(LINE_MAX).collect();
    match entry {
        Some(known) => Diagnosis { line: shown, code: known.code, meaning: known.meaning, hint: known.hint },
        None if line.is_empty() => Diagnosis {
            line: shown,
            code: "no-error",
            meaning: "CRIU failed without an error in its log",
            hint: "it was probably killed: look for signals, memory limits and the kernel's log",
        },
        None => Diagnosis {
            line: shown,
            code: "unknown",
            meaning: "CRIU failed in a way that Stasis has no explanation for",
            hint: "search for the line in CRIU's issue tracker",
        },
    }
}

/// The text of an error line, without time stamp: `Error (criu/mem.c:12): what happened`, also from the parts that run
/// inside the dumped process (`pie: 7: Error …`).
fn error(line: &str) -> Option<&str> {
    let at = line.find("Error (")?;
    let before = line[..at].trim_start();
    let stamped = before.is_empty() || before.starts_with('(') || before.starts_with("pie: ");
    stamped.then(|| line[at..].trim_end())
}

fn mentions(line: &str, parts: &[&str]) -> bool {
    parts.iter().any(|part| line.contains(part))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
