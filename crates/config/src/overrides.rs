//! What a guest that goes on from a snapshot finds on another host, or beside its siblings.

use crate::{Error, LoadSnapshot, VmConfig};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Another tap device, or another address, for a network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// The interface's name.
    pub iface_id: String,
    /// A tap device of the host.
    #[serde(default)]
    pub host_dev_name: Option<String>,
    /// The guest's address, `aa:bb:cc:dd:ee:ff`. Its driver learns of it when it next looks.
    #[serde(default)]
    pub guest_mac: Option<String>,
}

/// Another file for a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// The disk's name.
    pub drive_id: String,
    /// The raw image or block device, not smaller than the one before.
    pub path_on_host: PathBuf,
}

/// Another socket, or another context ID, for the vsock device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The Unix socket.
    #[serde(default)]
    pub uds_path: Option<PathBuf>,
    /// The guest's context ID, 3 to 2^32 - 2.
    #[serde(default)]
    pub guest_cid: Option<u32>,
}

impl LoadSnapshot {
    /// Put what is to be other than it was into `config`. What it says then is not checked, but that each name is known.
    pub fn apply_overrides(&self, config: &mut VmConfig) -> Result<(), Error> {
        for change in &self.drive_overrides {
            let known = config.drives.iter().map(|drive| &drive.drive_id);
            let unknown = unknown("disk", &change.drive_id, known);
            let mut drives = config.drives.iter_mut();
            let drive = drives.find(|drive| drive.drive_id == change.drive_id);
            drive.ok_or(unknown)?.path_on_host = Some(change.path_on_host.clone());
        }
        for change in &self.network_overrides {
            let known = config.network_interfaces.iter().map(|net| &net.iface_id);
            let unknown = unknown("network interface", &change.iface_id, known);
            let mut interfaces = config.network_interfaces.iter_mut();
            let interface = interfaces.find(|net| net.iface_id == change.iface_id);
            let interface = interface.ok_or(unknown)?;
            if let Some(tap) = &change.host_dev_name {
                interface.host_dev_name.clone_from(tap);
                (interface.tap_fd, interface.user) = (None, None);
            }
            if change.guest_mac.is_some() {
                interface.guest_mac.clone_from(&change.guest_mac);
            }
        }
        if let Some(change) = &self.vsock_override {
            let vsock = config.vsock.as_mut();
            let vsock = vsock.ok_or_else(|| unknown("vsock device", "vsock", [].into_iter()))?;
            if let Some(path) = &change.uds_path {
                vsock.uds_path.clone_from(path);
            }
            vsock.guest_cid = change.guest_cid.unwrap_or(vsock.guest_cid);
        }
        // The number of a descriptor means something else in this process, or nothing.
        let mut interfaces = config.network_interfaces.iter();
        match interfaces.find(|interface| interface.tap_fd.is_some()) {
            Some(interface) => Err(Error::Device(
                interface.iface_id.clone(),
                "was an open descriptor of another process: name a tap device for it (network_overrides, or --net)".into(),
            )),
            None => Ok(()),
        }
    }
}

fn unknown<'a>(what: &'static str, id: &str, known: impl Iterator<Item = &'a String>) -> Error {
    let known: Vec<&str> = known.map(String::as_str).collect();
    Error::NotInSnapshot {
        what,
        id: id.into(),
        known: match known.is_empty() {
            true => "none".into(),
            false => known.join(", "),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Drive, NetworkInterface, UserNetwork, Vsock};

    fn load(text: &str) -> LoadSnapshot {
        serde_json::from_str(&format!(r#"{{"snapshot_path":"/s",{text}}}"#)).unwrap()
    }

    fn config() -> VmConfig {
        let mut net = NetworkInterface::new("eth0");
        net.user = Some(UserNetwork::default());
        VmConfig {
            drives: vec![Drive::new("root", "/r"), Drive::new("data", "/d")],
            network_interfaces: vec![net],
            vsock: Some(Vsock {
                guest_cid: 3,
                uds_path: "/v".into(),
                vsock_id: None,
            }),
            ..VmConfig::default()
        }
    }

    #[test]
    fn each_name_gets_its_own() {
        let mut changed = config();
        load(
            r#""drive_overrides":[{"drive_id":"data","path_on_host":"/e"}],
            "network_overrides":[{"iface_id":"eth0","host_dev_name":"tap7","guest_mac":"02:00:00:00:00:07"}],
            "vsock_override":{"guest_cid":9}"#,
        )
        .apply_overrides(&mut changed)
        .unwrap();
        let paths: Vec<_> = changed.drives.iter().map(|drive| drive.path()).collect();
        assert_eq!(
            paths,
            [std::path::Path::new("/r"), std::path::Path::new("/e")]
        );
        let net = &changed.network_interfaces[0];
        assert_eq!((net.host_dev_name.as_str(), &net.user), ("tap7", &None));
        assert_eq!(net.mac().unwrap(), [2, 0, 0, 0, 0, 7]);
        let vsock = changed.vsock.unwrap();
        assert_eq!((vsock.guest_cid, vsock.uds_path), (9, "/v".into()));
    }

    #[test]
    fn unknown_names_are_told_with_those_that_there_are() {
        for (text, words) in [
            (
                r#""drive_overrides":[{"drive_id":"x","path_on_host":"/e"}]"#,
                ["disk", "root, data"],
            ),
            (
                r#""network_overrides":[{"iface_id":"x"}]"#,
                ["network interface", "eth0"],
            ),
        ] {
            let error = load(text).apply_overrides(&mut config()).unwrap_err();
            let said = error.to_string();
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
        }
        let mut without = VmConfig::default();
        let error = load(r#""vsock_override":{"uds_path":"/v"}"#).apply_overrides(&mut without);
        assert!(error.unwrap_err().to_string().contains("vsock"));
    }

    #[test]
    fn a_descriptor_of_another_process_is_not_taken_for_one_of_this() {
        let mut config = config();
        config.network_interfaces[0].tap_fd = Some(3);
        let error = load(r#""resume_vm":true"#).apply_overrides(&mut config.clone());
        assert!(error.unwrap_err().to_string().contains("eth0"));
        let with = load(r#""network_overrides":[{"iface_id":"eth0","host_dev_name":"tap7"}]"#);
        with.apply_overrides(&mut config).unwrap();
    }
}
