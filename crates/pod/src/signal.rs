//! Signals by name and number: as images and requests name them, as the kernel numbers them, as CRI tells them.

use stasis_cri_api::runtime::Signal;

pub(crate) const SIGTERM: u32 = 15;
pub(crate) const SIGKILL: u32 = 9;
/// First and last of the real-time signals, as libc has them.
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

/// Names of the signals from 1 on.
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR", "SYS",
];

/// Name of an ordinary signal; nothing for another number.
fn name(number: u32) -> &'static str {
    let index = usize::try_from(number).ok().and_then(|number| number.checked_sub(1));
    index.and_then(|index| SIGNALS.get(index)).copied().unwrap_or_default()
}

/// Number of a signal that an image or a request names: `TERM`, `SIGTERM`, `15`, `SIGRTMIN+3`.
pub(crate) fn number(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse::<u32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = name.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let real_time = |base: u32, offset: &str| match offset {
        "" => Some(base),
        offset => base.checked_add_signed(offset.parse().ok()?),
    };
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(offset), _) => real_time(RTMIN, offset)?,
        (_, Some(offset)) => real_time(RTMAX, offset)?,
        _ => match name {
            "IOT" => 6,
            "CLD" => 17,
            "POLL" => 29,
            name => u32::try_from(SIGNALS.iter().position(|known| *known == name)?).ok()? + 1,
        },
    };
    (1..=RTMAX).contains(&number).then_some(number)
}

/// Number of a signal that a request names in CRI's own way (`SIGNAL_SIGRTMINPLUS3`); none for the runtime's default.
pub(crate) fn of_request(signal: Signal) -> Option<u32> {
    let name = signal.as_str_name().trim_start_matches("SIGNAL_").replace("PLUS", "+").replace("MINUS", "-");
    number(&name)
}

/// The signal that asks a container to end, as CRI names it; 0 stands for SIGTERM.
pub(crate) fn of_status(stop_signal: u32) -> Signal {
    let name = match if stop_signal == 0 { SIGTERM } else { stop_signal } {
        RTMIN => "RTMIN".to_owned(),
        RTMAX => "RTMAX".to_owned(),
        number @ RTMIN..49 => format!("RTMINPLUS{}", number - RTMIN),
        number @ 49..RTMAX => format!("RTMAXMINUS{}", RTMAX - number),
        number => name(number).to_owned(),
    };
    Signal::from_str_name(&format!("SIGNAL_SIG{name}")).unwrap_or(Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signal_of_a_status_is_the_one_that_is_sent() {
        for (number, signal) in [
            (0, Signal::Sigterm),
            (9, Signal::Sigkill),
            (28, Signal::Sigwinch),
            (34, Signal::Sigrtmin),
            (37, Signal::Sigrtminplus3),
            (50, Signal::Sigrtmaxminus14),
            (64, Signal::Sigrtmax),
        ] {
            assert_eq!(of_status(number), signal, "{number}");
            if number > 0 {
                assert_eq!(of_request(signal), Some(number));
            }
        }
    }

    #[test]
    fn every_signal_of_a_request_has_a_number() {
        for signal in (1..).map_while(|value| Signal::try_from(value).ok()) {
            assert!(of_request(signal).is_some(), "{signal:?}");
        }
        assert_eq!(of_request(Signal::RuntimeDefault), None);
    }

    #[test]
    fn signals_are_named_in_every_way_that_images_use() {
        let cases = [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-14", Some(50)),
            ("SIGRTMAX", Some(64)),
            ("SIGWINCH", Some(28)),
            ("SIGRTMAX+1", None),
            ("0", None),
            ("65", None),
            ("SIGNONSENSE", None),
            ("", None),
        ];
        for (name, number) in cases {
            assert_eq!(super::number(name), number, "{name:?}");
        }
    }
}
