//! What `crit` makes of single values: encodings, flags, words, devices, addresses.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::schema::{Field, Shown};

const PROTECTION: &[(&str, u64)] = &[("PROT_READ", 1), ("PROT_WRITE", 2), ("PROT_EXEC", 4)];
const MAPPING: &[(&str, u64)] =
    &[("MAP_SHARED", 0x1), ("MAP_PRIVATE", 0x2), ("MAP_DROPPABLE", 0x8), ("MAP_ANON", 0x20), ("MAP_GROWSDOWN", 0x100)];
const MAPPING_STATUS: &[(&str, u64)] = &[
    ("VMA_AREA_REGULAR", 1),
    ("VMA_AREA_STACK", 1 << 1),
    ("VMA_AREA_VSYSCALL", 1 << 2),
    ("VMA_AREA_VDSO", 1 << 3),
    ("VMA_AREA_HEAP", 1 << 5),
    ("VMA_FILE_PRIVATE", 1 << 6),
    ("VMA_FILE_SHARED", 1 << 7),
    ("VMA_ANON_SHARED", 1 << 8),
    ("VMA_ANON_PRIVATE", 1 << 9),
    ("VMA_AREA_SYSVIPC", 1 << 10),
    ("VMA_AREA_SOCKET", 1 << 11),
    ("VMA_AREA_VVAR", 1 << 12),
    ("VMA_AREA_AIORING", 1 << 13),
    ("VMA_AREA_MEMFD", 1 << 14),
    ("VMA_AREA_SHSTK", 1 << 15),
    ("VMA_AREA_UPROBES", 1 << 17),
    ("VMA_UNSUPP", 1 << 31),
];
const OPEN: &[(&str, u64)] = &[
    ("O_WRONLY", 0o1),
    ("O_RDWR", 0o2),
    ("O_CREAT", 0o100),
    ("O_EXCL", 0o200),
    ("O_NOCTTY", 0o400),
    ("O_TRUNC", 0o1000),
    ("O_APPEND", 0o2000),
    ("O_NONBLOCK", 0o4000),
    ("O_DSYNC", 0o10000),
    ("FASYNC", 0o20000),
    ("O_DIRECT", 0o40000),
    ("O_LARGEFILE", 0o100_000),
    ("O_DIRECTORY", 0o200_000),
    ("O_NOFOLLOW", 0o400_000),
    ("O_NOATIME", 0o1_000_000),
    ("O_CLOEXEC", 0o2_000_000),
];
const SEALS: &[(&str, u64)] =
    &[("F_SEAL_SEAL", 1), ("F_SEAL_SHRINK", 2), ("F_SEAL_GROW", 4), ("F_SEAL_WRITE", 8), ("F_SEAL_FUTURE_WRITE", 16)];
const PAGES: &[(&str, u64)] = &[("PE_PARENT", 1), ("PE_LAZY", 2), ("PE_PRESENT", 4)];

const FAMILIES: &[(i128, &str)] = &[(1, "UNIX"), (2, "INET"), (10, "INET6"), (16, "NETLINK"), (17, "PACKET")];
const SOCKET_TYPES: &[(i128, &str)] = &[(1, "STREAM"), (2, "DGRAM"), (3, "RAW"), (5, "SEQPACKET"), (10, "PACKET")];
const SOCKET_STATES: &[(i128, &str)] = &[
    (1, "ESTABLISHED"),
    (2, "SYN_SENT"),
    (3, "SYN_RECV"),
    (4, "FIN_WAIT1"),
    (5, "FIN_WAIT2"),
    (6, "TIME_WAIT"),
    (7, "CLOSE"),
    (8, "CLOSE_WAIT"),
    (9, "LAST_ACK"),
    (10, "LISTEN"),
];
const PROTOCOLS: &[(i128, &str)] = &[(0, "IP"), (6, "TCP"), (17, "UDP"), (136, "UDPLITE")];
/// These are crit's words, not CRIU's: to CRIU 2 is dead and 3 stopped.
const TASK_STATES: &[(i128, &str)] = &[(1, "Alive"), (3, "Zombie"), (6, "Stopped")];

/// Length of a line of base64 and quoted-printable, as Python breaks them.
const LINE: usize = 76;

/// A number as text; none if it stays a number.
pub(crate) fn number(field: &Field, number: i128, hex: bool) -> Option<String> {
    if hex {
        return Some(hexadecimal(number));
    }
    match field.shown {
        Shown::Device => Some(format!("{}:{}", number >> 20, number & 0xf_ffff)),
        Shown::OldDevice => Some(old_device(number)),
        Shown::Flags(map) => Some(flags(map, number)),
        Shown::Word(_) => words(field.name).iter().find(|(value, _)| *value == number).map(|(_, w)| (*w).to_owned()),
        _ => None,
    }
}

/// As Python's "0x%x".
fn hexadecimal(number: i128) -> String {
    if number < 0 { format!("-{:#x}", -number) } else { format!("{number:#x}") }
}

/// `dev_t` as the C library splits it.
fn old_device(number: i128) -> String {
    let major = (number >> 8) & 0xfff | (number >> 32) & 0xffff_f000;
    let minor = number & 0xff | (number >> 12) & 0xffff_ff00;
    format!("{major}:{minor}")
}

fn flags(map: &str, number: i128) -> String {
    let map = match map {
        "mmap.prot" => PROTECTION,
        "mmap.flags" => MAPPING,
        "mmap.status" => MAPPING_STATUS,
        "rfile.flags" => OPEN,
        "pmap.flags" => PAGES,
        "seals.flags" => SEALS,
        _ => return hexadecimal(number),
    };
    let Ok(bits) = u64::try_from(number) else { return hexadecimal(number) };
    let mut words: Vec<String> =
        map.iter().filter(|(_, bit)| bits & bit != 0).map(|(name, _)| (*name).to_owned()).collect();
    let known: u64 = map.iter().map(|(_, bit)| bit).sum();
    if bits & !known != 0 {
        words.push(format!("{:#x}", bits & !known));
    }
    words.join(" | ")
}

fn words(field: &str) -> &'static [(i128, &'static str)] {
    match field {
        "family" => FAMILIES,
        "type" => SOCKET_TYPES,
        "state" => SOCKET_STATES,
        "proto" => PROTOCOLS,
        "task_state" => TASK_STATES,
        _ => &[],
    }
}

/// An address of one or four words, each in network order.
pub(crate) fn address(words: &[u32]) -> String {
    match words {
        [one] => Ipv4Addr::from(one.swap_bytes()).to_string(),
        [a, b, c, d, ..] => {
            let number = [a, b, c, d].iter().fold(0u128, |number, word| number << 32 | u128::from(word.swap_bytes()));
            // Of Python 3.13: embedded IPv4 addresses keep their dots.
            Ipv6Addr::from(number).to_string()
        }
        _ => String::new(),
    }
}

/// Base64 in lines, each with its end.
pub(crate) fn base64(data: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(data.len() * 4 / 3 + data.len() / 57 + 8);
    for line in data.chunks(LINE / 4 * 3) {
        for group in line.chunks(3) {
            let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
            for at in 0..4 {
                let index = bits >> (18 - 6 * at) & 63;
                text.push(if at <= group.len() { char::from(ALPHABET[index as usize]) } else { '=' });
            }
        }
        text.push('\n');
    }
    text
}

/// The name of a unix socket, as Python's `quopri` writes it.
pub(crate) fn quoted_printable(data: &[u8]) -> String {
    let mut text = String::new();
    let mut line = 0;
    for (at, byte) in data.iter().enumerate() {
        let next = data.get(at + 1);
        let breaks = |byte: Option<&u8>| matches!(byte, None | Some(b'\n' | b'\r'));
        let lone_dot = *byte == b'.' && line == 0 && matches!(next, None | Some(b'\n' | b'\r' | 0));
        let trailing = matches!(*byte, b' ' | b'\t') && breaks(next);
        let control = *byte < 33 && !matches!(*byte, b'\r' | b'\n' | b'\t' | b' ');
        if *byte > 126 || *byte == b'=' || lone_dot || trailing || control {
            if line + 3 >= LINE {
                text.push_str("=\n");
                line = 0;
            }
            text.push_str(&format!("={byte:02X}"));
            line += 3;
        } else if matches!(*byte, b'\n' | b'\r') {
            text.push(char::from(*byte));
            line = 0;
        } else {
            if next.is_some_and(|next| *next != b'\n') && line + 1 >= LINE {
                text.push_str("=\n");
                line = 0;
            }
            text.push(char::from(*byte));
            line += 1;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_told_as_python_tells_them() {
        assert_eq!(base64(b""), "");
        assert_eq!(base64(b"a"), "YQ==\n");
        assert_eq!(base64(&[b'x'; 58]).lines().map(str::len).collect::<Vec<_>>(), [76, 4]);
        assert_eq!(quoted_printable(b"\0abstract=name "), "=00abstract=3Dname=20");
        assert_eq!(quoted_printable(b"."), "=2E");
        assert_eq!(quoted_printable(&[b'y'; 80]).lines().next().map(str::len), Some(76));
        assert_eq!(address(&[0x0100_007f]), "127.0.0.1");
        assert_eq!(address(&[0, 0, 0, 0]), "::");
        assert_eq!(address(&[0, 0, 0, 0x0100_0000]), "::1");
        assert_eq!(address(&[0, 0, 0xffff_0000, 0x0100_007f]), "::ffff:127.0.0.1");
        assert_eq!(flags("mmap.prot", 5), "PROT_READ | PROT_EXEC");
        assert_eq!(flags("pmap.flags", 0xc), "PE_PRESENT | 0x8");
        assert_eq!(old_device(0x0801), "8:1");
    }
}
