//! Messages and services of CRI v1 (0.37) and of the administration interface stasis.v1, generated.
//!
//! The protos stand in `proto/`; `build.rs` compiles them. Nothing is written by hand here.

/// CRI v1: `runtime.v1`, <https://github.com/kubernetes/cri-api>.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, unreachable_pub)]
pub mod runtime {
    tonic::include_proto!("runtime.v1");
}

/// The administration interface: `stasis.v1`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used, unreachable_pub)]
pub mod stasis {
    tonic::include_proto!("stasis.v1");
}
