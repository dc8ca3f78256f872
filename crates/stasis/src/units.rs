//! Sizes, times and IDs as people read them.

use jiff::Timestamp;

/// Characters of an ID in a table: as in other container tools, and enough to be unique on a node.
const SHORT_ID: usize = 12;

/// Bytes in decimal units, with three significant digits: `12.3 MB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = bytes as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// A short time in the unit that fits: `850 µs`, `12.3 ms`, `4.56 s`.
pub(crate) fn micros(us: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    let value = us as f64;
    match us {
        0..1000 => format!("{us} µs"),
        1000..1_000_000 => format!("{:.1} ms", value / 1e3),
        _ => format!("{:.2} s", value / 1e6),
    }
}

/// How long ago something was, in its largest unit.
pub(crate) fn age(then_ns: i64, now: Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(then_ns / 1_000_000_000).max(0);
    let (value, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{value} {unit}{} ago", if value == 1 { "" } else { "s" })
}

/// CRI's nanoseconds as RFC 3339; none for 0, which is "not yet".
pub(crate) fn rfc3339(ns: i64) -> Option<String> {
    (ns != 0).then(|| Timestamp::from_nanosecond(ns.into()).ok().map(|t| t.to_string())).flatten()
}

/// The beginning of an ID, without the algorithm of a digest.
pub(crate) fn short_id(id: &str) -> &str {
    let id = ["sha256:", "sha512:"].iter().find_map(|algorithm| id.strip_prefix(algorithm)).unwrap_or(id);
    id.get(..SHORT_ID).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let texts = [0, 999, 1000, 1234, 9_999, 12_345, 99_960, 999_400, 999_600, 12_345_678, u64::MAX].map(size);
        assert_eq!(
            texts,
            [
                "0 B", "999 B", "1.00 kB", "1.23 kB", "10.0 kB", "12.3 kB", "100 kB", "999 kB", "1.00 MB", "12.3 MB",
                "18.4 EB"
            ]
        );
    }

    #[test]
    fn times() {
        assert_eq!(
            [0, 999, 1000, 156_040, 1_000_000, 4_560_000].map(micros),
            ["0 µs", "999 µs", "1.0 ms", "156.0 ms", "1.00 s", "4.56 s"]
        );
        let now = Timestamp::from_second(1_000_000).unwrap();
        let ago = |s: i64| age((1_000_000 - s) * 1_000_000_000, now);
        assert_eq!(
            [-5, 0, 1, 59, 60, 7200, 86_400].map(ago),
            [
                "0 seconds ago",
                "0 seconds ago",
                "1 second ago",
                "59 seconds ago",
                "1 minute ago",
                "2 hours ago",
                "1 day ago"
            ]
        );
        assert_eq!(rfc3339(1_500_000_000_000_000_000).unwrap(), "2017-07-14T02:40:00Z");
        assert_eq!(rfc3339(0), None);
    }

    #[test]
    fn ids() {
        assert_eq!(short_id("sha256:0123456789abcdef"), "0123456789ab");
        assert_eq!(short_id("0123"), "0123");
        assert_eq!(short_id("registry.local/app:1"), "registry.loc");
    }
}
