//! Clones of a VM, as they are asked for.

use crate::{DriveOverride, Error, LoadSnapshot, NetworkOverride, VmConfig, VsockOverride};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Most clones of one request.
pub const MAX_CLONES: u32 = 10_000;

/// Stands in names and paths of clones for the number of each.
pub const CLONE_NUMBER: &str = "{n}";

/// Clones that are to be started: VMs that go on from where this one is, each in a process of its own, which share memory with
/// it until they write to it. Names and paths have `{n}` where each clone's number is to stand: 1, 2 … for the clones of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Fork {
    /// 0 to [`MAX_CLONES`]; 0 makes a template only.
    #[serde(default = "one")]
    pub count: u32,
    /// Go on from where the VM was when this template was made, instead of now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Keep the template for further requests; the answer names it.
    #[serde(default)]
    pub keep_template: bool,
    /// The clones run at once; otherwise they are paused, and need an `api_sock`.
    #[serde(default = "yes")]
    pub resume_vm: bool,
    /// Their names. By default this VM's, with the number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Files or named pipes for their consoles, appended to; by default what they write is dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<PathBuf>,
    /// Files or named pipes for their log messages, appended to; by default the VM's log file, and where it has none they are dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<PathBuf>,
    /// Sockets on which they are steered; by default there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_sock: Option<PathBuf>,
    /// Tap devices of their network interfaces, which each needs for itself. By default each has a random MAC address of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_overrides: Vec<NetworkOverride>,
    /// Files of their disks. By default a clone sees the disk as it was, and what it writes is its own and goes with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drive_overrides: Vec<DriveOverride>,
    /// Sockets of their vsock devices, by default the VM's with `-` and the number; and the context ID of clone 1, which those of the
    /// others follow, by default that behind the VM's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
}

fn one() -> u32 {
    1
}

fn yes() -> bool {
    true
}

impl Default for Fork {
    fn default() -> Self {
        Self {
            count: one(),
            template: None,
            keep_template: false,
            resume_vm: yes(),
            id: None,
            console: None,
            log: None,
            api_sock: None,
            network_overrides: Vec::new(),
            drive_overrides: Vec::new(),
            vsock_override: None,
        }
    }
}

impl Fork {
    /// From JSON.
    pub fn from_json(text: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(text)
    }

    /// What is wrong with it, if anything.
    pub fn validate(&self) -> Result<(), Error> {
        if self.count > MAX_CLONES {
            return Err(Error::Clones(self.count));
        }
        if !self.resume_vm && self.api_sock.is_none() {
            return Err(Error::ClonesUnsteered);
        }
        let mut named = vec![
            ("id", self.id.as_deref().map(Path::new)),
            ("console", self.console.as_deref()),
            ("log", self.log.as_deref()),
            ("api_sock", self.api_sock.as_deref()),
        ];
        for net in &self.network_overrides {
            named.push(("host_dev_name", net.host_dev_name.as_deref().map(Path::new)));
            named.push(("guest_mac", net.guest_mac.as_deref().map(Path::new)));
        }
        if let Some(vsock) = &self.vsock_override {
            named.push(("uds_path", vsock.uds_path.as_deref()));
        }
        let has_number = |value: &Path| value.as_os_str().to_string_lossy().contains(CLONE_NUMBER);
        match named
            .iter()
            .find(|(_, value)| self.count > 1 && value.is_some_and(|value| !has_number(value)))
        {
            Some((field, _)) => Err(Error::ClonesAlike(field)),
            None => Ok(()),
        }
    }

    /// `pattern` for the clone with this number.
    pub fn name(pattern: &str, number: u32) -> String {
        pattern.replace(CLONE_NUMBER, &number.to_string())
    }

    /// The same for a path. One that is no text has no number.
    pub fn path(pattern: &Path, number: u32) -> PathBuf {
        match pattern.to_str() {
            Some(pattern) => Self::name(pattern, number).into(),
            None => pattern.to_owned(),
        }
    }

    /// Make the configuration of a VM that of its clone with this number. `random`: for its MAC addresses. Nothing is checked but names.
    pub fn apply(&self, number: u32, config: &mut VmConfig, random: [u8; 8]) -> Result<(), Error> {
        // What is written there is the other VM's.
        (config.logger, config.metrics) = (None, None);
        if let Some(serial) = &mut config.serial {
            serial.serial_out_path = None;
        }
        let mut own = self.clone();
        for net in &mut own.network_overrides {
            let numbered = |text: &mut Option<String>| {
                *text = text.as_deref().map(|text| Self::name(text, number));
            };
            numbered(&mut net.host_dev_name);
            numbered(&mut net.guest_mac);
        }
        for drive in &mut own.drive_overrides {
            drive.path_on_host = Self::path(&drive.path_on_host, number);
        }
        for (interface, index) in config.network_interfaces.iter_mut().zip(0u8..) {
            let id = &interface.iface_id;
            let own = own.network_overrides.iter().find(|net| net.iface_id == *id);
            if own.is_none_or(|own| own.host_dev_name.is_none()) {
                return Err(Error::CloneWithoutTap(id.clone()));
            }
            interface.guest_mac = Some(random_mac(interface.mac()?, random, index));
        }
        if let Some(vsock) = &mut config.vsock {
            let given = own.vsock_override.get_or_insert_default();
            let mut path = vsock.uds_path.clone().into_os_string();
            path.push(format!("-{number}"));
            let path = given
                .uds_path
                .as_deref()
                .map_or(path.into(), |given| Self::path(given, number));
            given.uds_path = Some(path);
            let first = given.guest_cid.unwrap_or(vsock.guest_cid.saturating_add(1));
            given.guest_cid = Some(first.saturating_add(number - 1));
        }
        let load = LoadSnapshot {
            network_overrides: own.network_overrides,
            drive_overrides: own.drive_overrides,
            vsock_override: own.vsock_override,
            ..LoadSnapshot::default()
        };
        load.apply_overrides(config)
    }
}

/// An address of nobody's, of the same maker as the VM's.
fn random_mac(old: [u8; 6], random: [u8; 8], index: u8) -> String {
    let [first, second, third, ..] = old;
    let [a, b, c, ..] = random;
    // Locally administered, to one station.
    let mac = [first & !1 | 2, second, third, a, b, c ^ index];
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{NetworkInterface, Vsock};

    fn fork(text: &str) -> Fork {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn each_clone_is_somebody_else() {
        let mut net = NetworkInterface::new("eth0");
        net.host_dev_name = "tap0".into();
        net.guest_mac = Some("06:11:22:33:44:55".into());
        let config = VmConfig {
            network_interfaces: vec![net],
            vsock: Some(Vsock {
                guest_cid: 7,
                uds_path: "/v".into(),
                vsock_id: None,
            }),
            ..VmConfig::default()
        };
        let order = fork(
            r#"{"count":2,"network_overrides":[{"iface_id":"eth0","host_dev_name":"tap{n}"}]}"#,
        );
        order.validate().unwrap();
        let mut clone = config.clone();
        order.apply(3, &mut clone, [1; 8]).unwrap();
        let net = &clone.network_interfaces[0];
        assert_eq!(
            (net.host_dev_name.as_str(), net.mac().unwrap()),
            ("tap3", [6, 0x11, 0x22, 1, 1, 1])
        );
        let vsock = clone.vsock.unwrap();
        assert_eq!((vsock.guest_cid, vsock.uds_path), (10, "/v-3".into()));
        let order = fork(
            r#"{"network_overrides":[{"iface_id":"eth0","host_dev_name":"t","guest_mac":"02:00:00:00:00:0{n}"}],
                "vsock_override":{"uds_path":"/w{n}","guest_cid":100}}"#,
        );
        let mut clone = config.clone();
        order.apply(2, &mut clone, [1; 8]).unwrap();
        assert_eq!(
            clone.network_interfaces[0].mac().unwrap(),
            [2, 0, 0, 0, 0, 2]
        );
        let vsock = clone.vsock.unwrap();
        assert_eq!((vsock.guest_cid, vsock.uds_path), (101, "/w2".into()));
        let said = fork("{}")
            .apply(1, &mut config.clone(), [0; 8])
            .unwrap_err()
            .to_string();
        assert!(
            said.contains("eth0") && said.contains("network_overrides"),
            "{said}"
        );
    }

    #[test]
    fn clones_cannot_share_what_each_needs_for_itself() {
        for (text, word) in [
            (r#"{"count":2,"id":"same"}"#, "id"),
            (r#"{"count":2,"api_sock":"/same"}"#, "api_sock"),
            (
                r#"{"count":2,"network_overrides":[{"iface_id":"e","host_dev_name":"tap0"}]}"#,
                "host_dev_name",
            ),
            (
                r#"{"count":2,"vsock_override":{"uds_path":"/v"}}"#,
                "uds_path",
            ),
            (r#"{"count":20000}"#, "20000"),
            (r#"{"resume_vm":false}"#, "api_sock"),
        ] {
            let said = fork(text).validate().unwrap_err().to_string();
            assert!(said.contains(word), "{text}: {said}");
        }
        fork(r#"{"count":1,"id":"one"}"#).validate().unwrap();
    }
}
