//! The microVM metadata service, in the shape of Firecracker's API.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// How a guest reaches the metadata service: the body of `PUT /mmds/config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// What a guest has to do for an answer.
    #[serde(default)]
    pub version: MmdsVersion,
    /// Interfaces that lead to the service, by their `iface_id`; at least one.
    pub network_interfaces: Vec<String>,
    /// Its address, 169.254.1.0 to 169.254.254.255; [`MmdsConfig::ADDRESS`] when absent.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(with = "Option<String>"))]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Answers are in EC2's text format, even for a guest that asks for JSON.
    #[serde(default)]
    pub imds_compat: bool,
}

/// What a guest has to do for an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum MmdsVersion {
    /// Ask. It may bring a token, too. Deprecated in Firecracker, and the default there.
    #[default]
    V1,
    /// Get a session token, and bring it.
    V2,
}

impl MmdsConfig {
    /// The address that clouds have agreed upon.
    pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

    /// The defaults for everything but the interfaces.
    pub fn new<S: Into<String>>(network_interfaces: impl IntoIterator<Item = S>) -> Self {
        Self {
            version: MmdsVersion::default(),
            network_interfaces: network_interfaces.into_iter().map(Into::into).collect(),
            ipv4_address: None,
            imds_compat: false,
        }
    }

    /// The service's address.
    pub fn address(&self) -> Ipv4Addr {
        self.ipv4_address.unwrap_or(Self::ADDRESS)
    }

    /// Check it, for a VM with interfaces of these names.
    pub(crate) fn validate<'a>(
        &self,
        mut interfaces: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<(), Error> {
        if self.network_interfaces.is_empty() {
            let why = "has no network interface: name at least one in network_interfaces";
            return Err(Error::Mmds(why.into()));
        }
        for id in &self.network_interfaces {
            if !interfaces.clone().any(|known| known == id) {
                let known: Vec<_> = interfaces.by_ref().collect();
                let why = match known.is_empty() {
                    true => format!(
                        "is to be reached through {id:?}, but the VM has no network interface"
                    ),
                    false => format!(
                        "is to be reached through {id:?}, but the VM's network interfaces are {}",
                        known.join(", ")
                    ),
                };
                return Err(Error::Mmds(why));
            }
        }
        // RFC 3927, 2.1: link-local addresses but for the first and the last 256.
        match self.address().octets() {
            [169, 254, 1..=254, _] => Ok(()),
            _ => Err(Error::Mmds(format!(
                "cannot have the address {}: give one from 169.254.1.0 to 169.254.254.255",
                self.address()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firecrackers_shape_is_read_and_written() {
        let least: MmdsConfig = serde_json::from_str(r#"{"network_interfaces":["eth0"]}"#).unwrap();
        assert_eq!(least, MmdsConfig::new(["eth0"]));
        assert_eq!(least.address().to_string(), "169.254.169.254");
        assert_eq!(
            serde_json::to_string(&least).unwrap(),
            r#"{"version":"V1","network_interfaces":["eth0"],"ipv4_address":null,"imds_compat":false}"#
        );
        let all = r#"{"version":"V2","network_interfaces":["a","b"],"ipv4_address":"169.254.170.2","imds_compat":true}"#;
        let read: MmdsConfig = serde_json::from_str(all).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), all);
        for bad in [
            "{}",
            r#"{"network_interfaces":"eth0"}"#,
            r#"{"network_interfaces":[],"version":"V3"}"#,
            r#"{"network_interfaces":[],"version":"v2"}"#,
            r#"{"network_interfaces":[],"ipv4_address":"169.254"}"#,
            r#"{"network_interfaces":[],"ipv4_address":"fe80::1"}"#,
            r#"{"network_interfaces":[],"imds_compat":1}"#,
            r#"{"network_interfaces":[],"port":80}"#,
        ] {
            assert!(serde_json::from_str::<MmdsConfig>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn it_needs_interfaces_that_are_there_and_a_link_local_address() {
        let check = |config: &MmdsConfig, interfaces: &[&str]| {
            let result = config.validate(interfaces.iter().copied());
            result.map_err(|e| e.to_string())
        };
        check(&MmdsConfig::new(["b"]), &["a", "b"]).unwrap();
        let none = check(&MmdsConfig::new(<[String; 0]>::default()), &["a"]);
        assert!(none.unwrap_err().contains("no network interface"));
        let unknown = check(&MmdsConfig::new(["a", "eth7"]), &["a", "b"]).unwrap_err();
        assert!(
            unknown.contains("eth7") && unknown.contains("a, b"),
            "{unknown}"
        );
        assert!(
            check(&MmdsConfig::new(["a"]), &[])
                .unwrap_err()
                .contains("\"a\"")
        );
        for (address, good) in [
            ("169.254.1.0", true),
            ("169.254.254.255", true),
            ("169.254.0.255", false),
            ("169.254.255.0", false),
            ("169.253.1.1", false),
            ("10.0.0.1", false),
            ("0.0.0.0", false),
            ("255.255.255.255", false),
        ] {
            let mut config = MmdsConfig::new(["a"]);
            config.ipv4_address = Some(address.parse().unwrap());
            let result = check(&config, &["a"]);
            assert_eq!(result.is_ok(), good, "{address}");
            assert!(good || result.unwrap_err().contains(address));
        }
    }
}
