//! The gRPC services of CRI and of administration: validate, call, map errors.
