//! Execution of OCI runtimes (runc, crun): typed arguments, results and errors.
