//! How the end of a process is told on the error stream: from version 4 on as a Kubernetes Status in JSON, before as
//! text, and nothing where all is well.

use serde_json::json;

use crate::backend::Failure;

/// How a session ended.
pub(crate) type Outcome = Result<Option<u32>, Failure>;

/// The bytes for the error stream.
pub(crate) fn encode(outcome: &Outcome, json: bool) -> Vec<u8> {
    match (outcome, json) {
        (Ok(None | Some(0)), false) => Vec::new(),
        (Ok(Some(code)), false) => command_failed(*code).into_bytes(),
        (Err(failure), false) => failure.to_string().into_bytes(),
        (outcome, true) => status(outcome).to_string().into_bytes(),
    }
}

fn status(outcome: &Outcome) -> serde_json::Value {
    match outcome {
        Ok(None | Some(0)) => json!({ "metadata": {}, "status": "Success" }),
        Ok(Some(code)) => json!({
            "metadata": {},
            "status": "Failure",
            "message": command_failed(*code),
            "reason": "NonZeroExitCode",
            "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
        }),
        Err(failure) => json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("Internal error occurred: {failure}"),
            "reason": "InternalError",
            "details": { "causes": [{ "message": failure.to_string() }] },
            "code": 500,
        }),
    }
}

fn command_failed(code: u32) -> String {
    format!("command terminated with non-zero exit code: exit status {code}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_as_clients_read_them() {
        let text = |outcome: Outcome, json| String::from_utf8(encode(&outcome, json)).unwrap();
        assert_eq!(text(Ok(Some(0)), true), r#"{"metadata":{},"status":"Success"}"#);
        assert_eq!(text(Ok(None), false), "");
        assert_eq!(text(Ok(Some(3)), false), "command terminated with non-zero exit code: exit status 3");
        assert_eq!(text(Err(Failure("no shim".into())), false), "no shim");
        let failed: serde_json::Value = serde_json::from_str(&text(Ok(Some(3)), true)).unwrap();
        assert_eq!((failed["reason"].as_str(), failed["status"].as_str()), (Some("NonZeroExitCode"), Some("Failure")));
        assert_eq!(failed["details"]["causes"][0], json!({ "reason": "ExitCode", "message": "3" }));
        let broken: serde_json::Value = serde_json::from_str(&text(Err(Failure("no shim".into())), true)).unwrap();
        assert_eq!((broken["reason"].as_str(), broken["code"].as_u64()), (Some("InternalError"), Some(500)));
    }
}
