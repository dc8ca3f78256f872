//! Content-addressed blobs on disk: ingest, verify, commit, read, delete.
