//! What must be in a request before anything is done with it. What a value means is checked where it is used.

use std::net::IpAddr;
use std::time::Duration;

use tonic::Status;

/// A field that must not be empty.
///
/// # Errors
/// `InvalidArgument` that names the field.
pub(crate) fn required<'r>(value: &'r str, field: &str) -> Result<&'r str, Status> {
    if value.is_empty() { Err(Status::invalid_argument(format!("{field} is empty"))) } else { Ok(value) }
}

/// A message that must be there.
///
/// # Errors
/// `InvalidArgument` that names the field.
pub(crate) fn present<T>(value: Option<T>, field: &str) -> Result<T, Status> {
    value.ok_or_else(|| Status::invalid_argument(format!("{field} is missing")))
}

/// A path on this host that must be absolute: a relative one would depend on where the daemon was started.
///
/// # Errors
/// `InvalidArgument` that names the field.
pub(crate) fn absolute<'r>(value: &'r str, field: &str) -> Result<&'r std::path::Path, Status> {
    let path = std::path::Path::new(required(value, field)?);
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(Status::invalid_argument(format!("{field} {value:?} is not an absolute path")))
    }
}

/// A number that must not be negative.
///
/// # Errors
/// `InvalidArgument` that names the field.
pub(crate) fn not_negative(value: i64, field: &str) -> Result<u64, Status> {
    u64::try_from(value).map_err(|_| Status::invalid_argument(format!("{field} is {value}; it must not be negative")))
}

/// A time limit in seconds; zero is none.
///
/// # Errors
/// `InvalidArgument` that names the field.
pub(crate) fn seconds(value: i64, field: &str) -> Result<Option<Duration>, Status> {
    let seconds = not_negative(value, field)?;
    Ok((seconds > 0).then(|| Duration::from_secs(seconds)))
}

/// Ranges of addresses, separated by commas, as the kubelet sends them: `10.1.0.0/24,fd00::/64`; empty for none.
///
/// # Errors
/// `InvalidArgument` that names the field and the range that is none.
pub(crate) fn address_ranges(value: &str, field: &str) -> Result<(), Status> {
    let is_range = |range: &str| {
        let (address, bits) = range.split_once('/')?;
        let most = if address.parse::<IpAddr>().ok()?.is_ipv4() { 32 } else { 128 };
        bits.parse::<u8>().ok().filter(|bits| *bits <= most)
    };
    let mut ranges = value.split(',').map(str::trim).filter(|_| !value.is_empty());
    match ranges.find(|range| is_range(range).is_none()) {
        Some(wrong) => Err(Status::invalid_argument(format!("{field}: {wrong:?} is no range of addresses"))),
        None => Ok(()),
    }
}

/// A TCP port.
///
/// # Errors
/// `InvalidArgument` for what is none.
pub(crate) fn port_number(value: i32) -> Result<u16, Status> {
    let port = u16::try_from(value).ok().filter(|port| *port > 0);
    port.ok_or_else(|| Status::invalid_argument(format!("port {value} is no TCP port: they go from 1 to 65535")))
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let check = |status: Status, message: &str| {
            assert_eq!((status.code(), status.message()), (Code::InvalidArgument, message));
        };
        check(required("", "container_id").unwrap_err(), "container_id is empty");
        check(present::<()>(None, "config").unwrap_err(), "config is missing");
        check(absolute("a/b", "path").unwrap_err(), "path \"a/b\" is not an absolute path");
        check(absolute("", "path").unwrap_err(), "path is empty");
        check(seconds(-1, "timeout").unwrap_err(), "timeout is -1; it must not be negative");
        for ranges in ["", "10.1.0.0/24", "10.1.0.0/24, fd00::/64"] {
            address_ranges(ranges, "cidr").unwrap();
        }
        check(address_ranges("10.1.0.0/24,x", "cidr").unwrap_err(), "cidr: \"x\" is no range of addresses");
        check(address_ranges("10.1.0.0/33", "cidr").unwrap_err(), "cidr: \"10.1.0.0/33\" is no range of addresses");
        check(port_number(0).unwrap_err(), "port 0 is no TCP port: they go from 1 to 65535");
        assert_eq!(port_number(65535).unwrap(), 65535);
        assert_eq!(required("x", "y").unwrap(), "x");
        assert_eq!(seconds(0, "timeout").unwrap(), None);
        assert_eq!(seconds(7, "timeout").unwrap(), Some(Duration::from_secs(7)));
    }
}
