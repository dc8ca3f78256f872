//! The life of a container as data: which operation its phase admits, and how an event changes its record.
//!
//! ```text
//!   Created ──start──▶ Running ──exit──▶ Exited
//!      └──────start failed──────────────────▲
//! ```
//!
//! Nothing here touches the kernel or the disk.

use crate::error::{Error, Kind, Result};
use crate::record::{ContainerRecord, Phase};

/// Exit code of a container that could not be started (containerd's).
pub(crate) const START_FAILED_CODE: i32 = 128;
/// Exit code of a container whose end nobody saw: the node rebooted, or its shim was lost.
pub(crate) const UNKNOWN_CODE: i32 = 255;

/// What a caller wants to do with a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Start,
    Stop,
    Exec,
    Attach,
    Checkpoint,
    ReopenLog,
    Update,
}

/// Whether there is something left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Go on.
    Proceed,
    /// The wish is fulfilled already: answer success.
    Fulfilled,
}

/// What happened to a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Started { pid: u32, at: i64 },
    StartFailed { message: String, at: i64 },
    Exited { code: i32, oom: bool, at: i64 },
    Lost { message: String, at: i64 },
}

/// Whether a container in `phase` admits `operation`, as the comments of CRI say.
pub(crate) fn admit(operation: Operation, phase: Phase, id: &str) -> Result<Admission> {
    match (operation, phase) {
        (Operation::Start, Phase::Created) => Ok(Admission::Proceed),
        (Operation::Stop, Phase::Running) => Ok(Admission::Proceed),
        // "This call is idempotent, and must not return an error if the container has already been stopped."
        (Operation::Stop, Phase::Created | Phase::Exited) => Ok(Admission::Fulfilled),
        (Operation::Exec | Operation::Attach | Operation::Checkpoint | Operation::ReopenLog, Phase::Running) => {
            Ok(Admission::Proceed)
        }
        (Operation::Update, Phase::Created | Phase::Running) => Ok(Admission::Proceed),
        (
            Operation::Start
            | Operation::Exec
            | Operation::Attach
            | Operation::Checkpoint
            | Operation::ReopenLog
            | Operation::Update,
            _,
        ) => {
            let (verb, needed) = match operation {
                Operation::Start => ("start", "created"),
                Operation::Exec => ("execute a command in", "running"),
                Operation::Attach => ("attach to", "running"),
                Operation::Checkpoint => ("checkpoint", "running"),
                Operation::Update => ("update", "created or running"),
                _ => ("reopen the log of", "running"),
            };
            let is = name(phase);
            Err(Error::new(
                Kind::FailedPrecondition,
                format!("cannot {verb} container {id}: it is {is}, and must be {needed}"),
            ))
        }
    }
}

/// The record after `event`. An event that cannot follow changes nothing: an exit is final.
pub(crate) fn apply(record: &mut ContainerRecord, event: Event) {
    match event {
        Event::Started { pid, at } if record.phase() == Phase::Created => {
            record.set_phase(Phase::Running);
            record.pid = pid;
            record.started_at = at;
        }
        Event::StartFailed { message, at } if record.phase() == Phase::Created => {
            end(record, START_FAILED_CODE, "StartError", message, at);
        }
        Event::Exited { code, oom, at } if record.phase() == Phase::Running => {
            let reason = match (oom, code) {
                (true, _) => "OOMKilled",
                (false, 0) => "Completed",
                (false, _) => "Error",
            };
            end(record, code, reason, String::new(), at);
        }
        Event::Lost { message, at } if record.phase() == Phase::Running => {
            end(record, UNKNOWN_CODE, "Unknown", message, at);
        }
        _ => {}
    }
}

fn end(record: &mut ContainerRecord, code: i32, reason: &str, message: String, at: i64) {
    record.set_phase(Phase::Exited);
    record.pid = 0;
    record.exit_code = code;
    record.reason = reason.to_owned();
    record.message = message;
    record.finished_at = at;
    if record.started_at == 0 {
        record.started_at = at;
    }
}

fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Created => "created",
        Phase::Running => "running",
        Phase::Exited => "exited",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (1u32..9, 1i64..9).prop_map(|(pid, at)| Event::Started { pid, at }),
            (1i64..9).prop_map(|at| Event::StartFailed { message: "x".into(), at }),
            (0i32..256, any::<bool>(), 1i64..9).prop_map(|(code, oom, at)| Event::Exited { code, oom, at }),
            (1i64..9).prop_map(|at| Event::Lost { message: "x".into(), at }),
        ]
    }

    proptest! {
        /// Whatever happens, a container moves forward only, and an exit is final.
        #[test]
        fn phases_only_move_forward(events in proptest::collection::vec(event(), 0..8)) {
            let mut record = ContainerRecord::default();
            for event in events {
                let before = record.clone();
                apply(&mut record, event);
                prop_assert!(record.phase() >= before.phase());
                if before.phase() == Phase::Exited {
                    prop_assert_eq!(&record, &before);
                }
                prop_assert_eq!(record.pid != 0, record.phase() == Phase::Running);
            }
        }
    }

    #[test]
    fn stop_is_idempotent_and_start_is_not() {
        assert_eq!(admit(Operation::Stop, Phase::Exited, "c").expect("stop"), Admission::Fulfilled);
        assert_eq!(admit(Operation::Start, Phase::Created, "c").expect("start"), Admission::Proceed);
        let error = admit(Operation::Start, Phase::Running, "c").expect_err("refused");
        assert_eq!(error.kind(), Kind::FailedPrecondition);
        assert_eq!(error.to_string(), "cannot start container c: it is running, and must be created");
    }

    #[test]
    fn an_exit_by_the_oom_killer_says_so() {
        let mut record = ContainerRecord::default();
        apply(&mut record, Event::Started { pid: 5, at: 1 });
        apply(&mut record, Event::Exited { code: 137, oom: true, at: 2 });
        assert_eq!((record.reason.as_str(), record.exit_code, record.pid), ("OOMKilled", 137, 0));
    }
}
