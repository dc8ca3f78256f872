//! Processes: spawned, watched, killed and reaped.
