//! Client of OCI registries: pull and push of manifests and blobs with credentials, mirrors and loopback HTTP.
