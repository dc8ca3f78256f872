//! From errors to gRPC statuses: the one place where it is decided which failure has which code.

use stasis_pod::{Checkpoints, Kind};
use tonic::{Code, Status};

/// The status of a failed operation on pods or containers.
pub(crate) fn from_pod(error: stasis_pod::Error) -> Status {
    let code = match error.kind() {
        Kind::NotFound => Code::NotFound,
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::PermissionDenied => Code::PermissionDenied,
        Kind::DeadlineExceeded => Code::DeadlineExceeded,
        Kind::ResourceExhausted => Code::ResourceExhausted,
        Kind::Unavailable => Code::Unavailable,
        Kind::Unimplemented => Code::Unimplemented,
        Kind::Internal => Code::Internal,
        Kind::Unknown => Code::Unknown,
    };
    Status::new(code, error.to_string())
}

/// The status of a failed operation on images.
pub(crate) fn from_image(error: stasis_image::Error) -> Status {
    use stasis_image::Kind;
    let code = match error.kind() {
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::PermissionDenied => Code::PermissionDenied,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::Unavailable => Code::Unavailable,
        Kind::ResourceExhausted => Code::ResourceExhausted,
        Kind::DataLoss => Code::DataLoss,
        Kind::Internal => Code::Internal,
    };
    Status::new(code, error.to_string())
}

/// The status of a streaming request that gets no URL.
pub(crate) fn from_streaming(error: stasis_streaming::Error) -> Status {
    use stasis_streaming::Error;
    let code = match &error {
        Error::Invalid(_) => Code::InvalidArgument,
        Error::TooManyOpen(_) => Code::ResourceExhausted,
        Error::Listen { .. } | Error::Tls { .. } => Code::Internal,
    };
    Status::new(code, error.to_string())
}

/// The status of blocking work that panicked or was cut off by the end of the daemon.
pub(crate) fn interrupted(error: tokio::task::JoinError) -> Status {
    Status::internal(format!("the operation ended abnormally: {error}"))
}

/// The status of a method that is not built yet, in the words that the kubelet's tests look for.
pub(crate) fn unbuilt(method: &str) -> Status {
    Status::unimplemented(format!("method {method} not implemented"))
}

/// Refuses checkpoints where the node makes none.
///
/// Code and text are those by which the kubelet's conformance test "Checkpoint Container" knows a node without the
/// feature; the first text must be the end of the message, the second may be followed by more.
pub(crate) fn refuse_checkpoint(possible: Checkpoints, container: &str) -> Result<(), Status> {
    match possible {
        Checkpoints::Available => Ok(()),
        Checkpoints::Forbidden => {
            tracing::warn!(container, "checkpoints are off: `level` under [checkpoint] is \"none\"");
            Err(Status::unknown("checkpoint/restore support not available"))
        }
        Checkpoints::Unavailable(why) => Err(Status::unknown(format!(
            "CRIU binary not found or too old (<31600). Failed to checkpoint container {container}: {why}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_error_has_its_code() {
        for (kind, code) in [
            (Kind::NotFound, Code::NotFound),
            (Kind::InvalidArgument, Code::InvalidArgument),
            (Kind::AlreadyExists, Code::AlreadyExists),
            (Kind::FailedPrecondition, Code::FailedPrecondition),
            (Kind::PermissionDenied, Code::PermissionDenied),
            (Kind::DeadlineExceeded, Code::DeadlineExceeded),
            (Kind::ResourceExhausted, Code::ResourceExhausted),
            (Kind::Unavailable, Code::Unavailable),
            (Kind::Unimplemented, Code::Unimplemented),
            (Kind::Internal, Code::Internal),
            (Kind::Unknown, Code::Unknown),
        ] {
            let status = from_pod(stasis_pod::Error::new(kind, "words"));
            assert_eq!((status.code(), status.message()), (code, "words"));
        }
    }

    /// As the kubelet wraps the text of the status.
    fn as_kubelet_reports(status: &Status) -> String {
        let code = format!("{:?}", status.code());
        format!("checkpointing of ns/pod/ctr failed (rpc error: code = {code} desc = {})", status.message())
    }

    #[test]
    fn a_node_without_checkpoints_says_so_in_the_words_of_the_kubelets_test() {
        assert!(refuse_checkpoint(Checkpoints::Available, "c").is_ok());
        let forbidden = refuse_checkpoint(Checkpoints::Forbidden, "c").unwrap_err();
        assert!(
            as_kubelet_reports(&forbidden)
                .contains("(rpc error: code = Unknown desc = checkpoint/restore support not available)")
        );
        let missing = refuse_checkpoint(Checkpoints::Unavailable("no criu in PATH".into()), "c").unwrap_err();
        assert!(as_kubelet_reports(&missing).contains(
            "(rpc error: code = Unknown desc = CRIU binary not found or too old (<31600). Failed to checkpoint container"
        ));
        assert!(missing.message().ends_with("container c: no criu in PATH"));
        assert!(as_kubelet_reports(&unbuilt("X")).contains("code = Unimplemented desc = method X not implemented)"));
    }
}
