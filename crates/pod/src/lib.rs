//! Pods and containers: state machines, OCI specifications, checkpoint and restore, reconciliation.
