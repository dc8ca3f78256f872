//! Results of a chain (section 5, "ADD Success"), as far as a runtime needs to understand them.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a pod got from its network.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Added {
    /// The pod's addresses, those of its own interface first, in the order of the result.
    pub ips: Vec<IpAddr>,
    /// Interfaces that the plugins told of, on either side.
    pub interfaces: Vec<Interface>,
    /// Name servers that the network brings along, if any.
    pub dns: Dns,
    /// The whole result, as the last plugin gave it.
    pub result: Value,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// Its hardware address.
    #[serde(default)]
    pub mac: String,
    /// The network namespace that it is in; empty: the host's.
    #[serde(default)]
    pub sandbox: String,
}

/// Name resolution, in a result and as the capability `dns`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Addresses of name servers.
    #[serde(default, alias = "nameservers")]
    pub servers: Vec<String>,
    /// Domains to search.
    #[serde(default, alias = "search")]
    pub searches: Vec<String>,
    /// Resolver options.
    #[serde(default)]
    pub options: Vec<String>,
}

/// The part of a result that is understood.
#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Ip>,
    #[serde(default)]
    dns: Dns,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
    interface: Option<usize>,
}

impl Added {
    /// Understands a result of any supported version; they do not differ in what is read here.
    pub(crate) fn parse(result: Value, interface_name: &str) -> Result<Self, String> {
        let wire: Wire = serde_json::from_value(result.clone()).map_err(|error| error.to_string())?;
        let mut own = Vec::new();
        let mut further = Vec::new();
        for ip in &wire.ips {
            let text = ip.address.split('/').next().unwrap_or_default();
            let address = text.parse().map_err(|_| format!("{:?} is no address", ip.address))?;
            match ip.interface.map(|index| wire.interfaces.get(index)) {
                // An interface that the result does not hold, or none: the result is about the pod's own.
                None | Some(None) => own.push(address),
                Some(Some(at)) if at.sandbox.is_empty() => {}
                Some(Some(at)) if at.name == interface_name => own.push(address),
                Some(Some(_)) => further.push(address),
            }
        }
        own.extend(further);
        Ok(Self { ips: own, interfaces: wire.interfaces, dns: wire.dns, result })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_pods_own_addresses_come_first_and_the_hosts_not_at_all() {
        let result = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "br0", "mac": "aa"}, {"name": "net1", "sandbox": "/ns"}, {"name": "eth0", "sandbox": "/ns"}],
            "ips": [
                {"address": "192.0.2.1/24", "interface": 0},
                {"address": "198.51.100.7/24", "interface": 1},
                {"address": "10.1.0.5/16", "interface": 2, "gateway": "10.1.0.1"},
                {"address": "fd00::5/64", "interface": 2},
            ],
            "dns": {"nameservers": ["10.0.0.53"], "search": ["x.local"]},
        });
        let added = Added::parse(result.clone(), "eth0").unwrap();
        let ips: Vec<String> = added.ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.1.0.5", "fd00::5", "198.51.100.7"]);
        assert_eq!((added.dns.servers, added.dns.searches), (vec!["10.0.0.53".into()], vec!["x.local".to_owned()]));
        assert_eq!((added.interfaces.len(), added.result), (3, result));
    }

    #[test]
    fn an_address_without_an_interface_is_the_pods() {
        let added = Added::parse(json!({"ips": [{"version": "4", "address": "10.1.0.5/16"}]}), "eth0").unwrap();
        assert_eq!(added.ips, ["10.1.0.5".parse::<IpAddr>().unwrap()]);
        assert!(Added::parse(json!({}), "eth0").unwrap().ips.is_empty());
        assert!(Added::parse(json!({"ips": [{"address": "nowhere"}]}), "eth0").is_err());
    }
}
