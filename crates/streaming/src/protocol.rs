//! Which protocol a client and we agree on, by the headers of its request.

use http::HeaderMap;
use http::header::{CONNECTION, HeaderName, UPGRADE};

/// How the bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Spdy,
    WebSocket,
}

/// How a process's streams are spoken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Channels {
    /// What the answer names; empty where the client named nothing.
    pub(crate) name: &'static str,
    /// The version, from 1 to 5.
    pub(crate) version: u8,
    /// WebSocket messages are text.
    pub(crate) base64: bool,
}

/// How ports are forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Forward {
    /// SPDY streams; by WebSocket, the bytes of a SPDY connection in binary messages.
    Spdy(&'static str),
    /// Two channels a port.
    Channels(Channels),
}

/// Sub-protocols of a SPDY client.
pub(crate) const SPDY_PROTOCOLS: HeaderName = HeaderName::from_static("x-stream-protocol-version");

/// What we would have taken, for a client that offered nothing of it.
pub(crate) const SPDY_ACCEPTED: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

const SPDY_CHANNELS: [Channels; 4] = [
    channels("v4.channel.k8s.io", 4, false),
    channels("v3.channel.k8s.io", 3, false),
    channels("v2.channel.k8s.io", 2, false),
    channels("channel.k8s.io", 1, false),
];

const WEBSOCKET_CHANNELS: [Channels; 5] = [
    channels("v5.channel.k8s.io", 5, false),
    channels("v4.channel.k8s.io", 4, false),
    channels("v4.base64.channel.k8s.io", 4, true),
    channels("channel.k8s.io", 1, false),
    channels("base64.channel.k8s.io", 1, true),
];

/// A client that names no sub-protocol is an early one.
const UNNAMED: Channels = channels("", 1, false);

const SPDY_FORWARD: &str = "portforward.k8s.io";
const TUNNELLED_FORWARD: &str = "SPDY/3.1+portforward.k8s.io";
const WEBSOCKET_FORWARD: [Channels; 2] =
    [channels("v4.channel.k8s.io", 4, false), channels("v4.base64.channel.k8s.io", 4, true)];

const fn channels(name: &'static str, version: u8, base64: bool) -> Channels {
    Channels { name, version, base64 }
}

impl Transport {
    /// What the request asks to become; none where that is nothing of ours.
    pub(crate) fn asked(headers: &HeaderMap) -> Option<Transport> {
        if !values(headers, &CONNECTION).any(|value| value.eq_ignore_ascii_case("upgrade")) {
            return None;
        }
        values(headers, &UPGRADE).find_map(|value| match () {
            () if value.eq_ignore_ascii_case("spdy/3.1") => Some(Transport::Spdy),
            () if value.eq_ignore_ascii_case("websocket") => Some(Transport::WebSocket),
            () => None,
        })
    }

    fn header(self) -> HeaderName {
        match self {
            Transport::Spdy => SPDY_PROTOCOLS,
            Transport::WebSocket => http::header::SEC_WEBSOCKET_PROTOCOL,
        }
    }

    /// The protocol of exec and attach: the client's first that is known. None: what would have been taken.
    pub(crate) fn channels(self, headers: &HeaderMap) -> Result<Channels, String> {
        let known: &[Channels] = match self {
            Transport::Spdy => &SPDY_CHANNELS,
            Transport::WebSocket => &WEBSOCKET_CHANNELS,
        };
        choose(headers, &self.header(), known, |channels| channels.name).map(|found| found.copied().unwrap_or(UNNAMED))
    }

    /// The protocol of port-forward, likewise.
    pub(crate) fn forward(self, headers: &HeaderMap) -> Result<Forward, String> {
        let name = |forward: &Forward| match forward {
            Forward::Spdy(name) => *name,
            Forward::Channels(channels) => channels.name,
        };
        let (known, unnamed) = match self {
            Transport::Spdy => (vec![Forward::Spdy(SPDY_FORWARD)], Forward::Spdy("")),
            Transport::WebSocket => {
                let mut known = vec![Forward::Spdy(TUNNELLED_FORWARD)];
                known.extend(WEBSOCKET_FORWARD.map(Forward::Channels));
                (known, Forward::Channels(UNNAMED))
            }
        };
        choose(headers, &self.header(), &known, name).map(|found| found.copied().unwrap_or(unnamed))
    }
}

/// The first of the client's protocols that is known; `None` if it names none.
fn choose<'a, T>(
    headers: &HeaderMap,
    header: &HeaderName,
    known: &'a [T],
    name: impl Fn(&T) -> &'static str,
) -> Result<Option<&'a T>, String> {
    let mut offered = values(headers, header).peekable();
    if offered.peek().is_none() {
        return Ok(None);
    }
    let found = offered.find_map(|offer| known.iter().find(|known| name(known) == offer));
    found.map(Some).ok_or_else(|| known.iter().map(name).collect::<Vec<_>>().join(", "))
}

/// The values of a header, whether it stands once with commas or several times.
pub(crate) fn values<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair =
            |(name, value): &(&'static str, &'static str)| (HeaderName::from_static(name), value.parse().unwrap());
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn the_transport_is_what_the_client_upgrades_to() {
        let check = |pairs: &[(&'static str, &'static str)], expected| {
            assert_eq!(Transport::asked(&headers(pairs)), expected, "{pairs:?}");
        };
        check(&[("connection", "Upgrade"), ("upgrade", "SPDY/3.1")], Some(Transport::Spdy));
        check(&[("connection", "keep-alive, upgrade"), ("upgrade", "websocket")], Some(Transport::WebSocket));
        check(&[("connection", "keep-alive"), ("upgrade", "SPDY/3.1")], None);
        check(&[("connection", "Upgrade"), ("upgrade", "h2c")], None);
        check(&[], None);
    }

    #[test]
    fn the_clients_first_known_protocol_is_taken() {
        let check = |transport: Transport, offered: &'static str, expected: Result<(&str, u8), &str>| {
            let name = transport.header().as_str().to_owned();
            let mut map = HeaderMap::new();
            if !offered.is_empty() {
                map.insert(HeaderName::try_from(name).unwrap(), offered.parse().unwrap());
            }
            let found = transport.channels(&map).map(|channels| (channels.name, channels.version));
            assert_eq!(found, expected.map_err(str::to_owned));
        };
        use Transport::{Spdy, WebSocket};
        check(Spdy, "v9.channel.k8s.io, v4.channel.k8s.io, channel.k8s.io", Ok(("v4.channel.k8s.io", 4)));
        check(Spdy, "", Ok(("", 1)));
        let accepted = "v4.channel.k8s.io, v3.channel.k8s.io, v2.channel.k8s.io, channel.k8s.io";
        check(Spdy, "v5.channel.k8s.io", Err(accepted));
        check(WebSocket, "v5.channel.k8s.io,v4.channel.k8s.io", Ok(("v5.channel.k8s.io", 5)));
        check(WebSocket, "base64.channel.k8s.io", Ok(("base64.channel.k8s.io", 1)));
    }

    #[test]
    fn ports_are_forwarded_by_streams_or_channels() {
        let none = HeaderMap::new();
        assert_eq!(Transport::Spdy.forward(&none), Ok(Forward::Spdy("")));
        assert_eq!(Transport::WebSocket.forward(&none), Ok(Forward::Channels(UNNAMED)));
        let tunnel = headers(&[("sec-websocket-protocol", TUNNELLED_FORWARD)]);
        assert_eq!(Transport::WebSocket.forward(&tunnel), Ok(Forward::Spdy(TUNNELLED_FORWARD)));
        assert!(Transport::Spdy.forward(&headers(&[("x-stream-protocol-version", "x")])).is_err());
    }
}
