//! Virtio devices, in the shapes of Firecracker's API.

use crate::{Error, is_default};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Most queues that a disk or a network interface may have (pairs, for the latter).
pub const MAX_QUEUES: u16 = 32;

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name: letters, digits and `_`. The guest reads it as the disk's serial number.
    pub drive_id: String,
    /// The raw image or block device; this or `socket`.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// Tell the guest's kernel to take it for its root file system.
    pub is_root_device: bool,
    /// With `is_root_device`: the partition that holds the root file system.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// The guest cannot write. With `socket` its server says so.
    #[serde(default)]
    pub is_read_only: Option<bool>,
    /// What a flush by the guest means.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How requests reach the file; `Auto` when absent.
    #[serde(default)]
    pub io_engine: Option<IoEngine>,
    /// The Unix socket of a vhost-user-block server, whose disk it is.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// Go around the host's page cache (O_DIRECT).
    #[serde(default, skip_serializing_if = "is_default")]
    pub direct: bool,
    /// What the guest writes goes elsewhere, and is gone with the VM; the file stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
    /// Request queues, 1 to [`MAX_QUEUES`].
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub queues: u16,
    /// How much the guest may do.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// Where a disk's writes go instead of its file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Overlay {
    /// The directory for a file without a name; `$TMPDIR`, or else `/var/tmp`, when absent.
    #[serde(default)]
    pub directory: Option<PathBuf>,
}

/// What a flush by the guest means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum CacheType {
    /// Nothing: the guest is not offered flushes. Written data is lost when the host dies, not when the VM does.
    #[default]
    Unsafe,
    /// Written data is on the host's disk when a flush is done.
    Writeback,
}

/// How requests reach the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum IoEngine {
    /// io_uring where the host allows it, else as `Sync`.
    #[default]
    Auto,
    /// One by one, on the I/O thread.
    Sync,
    /// io_uring; an error where the host does not allow it.
    Async,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name: letters, digits and `_`.
    pub iface_id: String,
    /// A tap device of the host; empty for `user`.
    #[serde(default)]
    pub host_dev_name: String,
    /// An open tap device, by the number of its descriptor in this process, instead of `host_dev_name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap_fd: Option<i32>,
    /// Networking without privileges, by `passt`, instead of a tap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<UserNetwork>,
    /// The guest's address, `aa:bb:cc:dd:ee:ff`; one that follows from `iface_id` when absent.
    #[serde(default)]
    pub guest_mac: Option<String>,
    /// The largest packet that the guest should send, 68 to 65535 bytes.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to [`MAX_QUEUES`].
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub queues: u16,
    /// How much the guest may receive.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// How much the guest may send.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Networking without privileges.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct UserNetwork {
    /// TCP ports of the host that lead to ports of the guest.
    #[serde(default)]
    pub forwards: Vec<Forward>,
}

/// A port of the host that leads to one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
}

/// A vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context ID, 3 to 2^32 - 2.
    pub guest_cid: u32,
    /// Host programs connect to this Unix socket; a guest's connection to port N comes to `uds_path_N`.
    pub uds_path: PathBuf,
    /// Ignored; older clients send it.
    #[serde(default)]
    pub vsock_id: Option<String>,
}

/// A memory balloon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Memory that the guest is to give back, in MiB.
    pub amount_mib: u32,
    /// The guest may take memory back when it has no more.
    pub deflate_on_oom: bool,
    /// How often the guest reports statistics, in seconds; 0: never.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// The guest can be asked which pages it does not use.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// The guest tells of pages that it does not use any more, by itself.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// A source of random bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// How much the guest may take.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// The serial console's output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file or named pipe that takes it instead of stdout.
    #[serde(default)]
    pub serial_out_path: Option<PathBuf>,
    /// Bytes that the guest may write; more are dropped.
    #[serde(default)]
    pub rate_limiter: Option<TokenBucket>,
}

/// Limits on a device; each may be absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Tokens are bytes.
    #[serde(default)]
    pub bandwidth: Option<TokenBucket>,
    /// Tokens are requests or packets.
    #[serde(default)]
    pub ops: Option<TokenBucket>,
}

/// A token bucket: `size` tokens flow in over `refill_time`, and as many have room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens; 0 means no limit.
    pub size: u64,
    /// Tokens that are there once, in addition.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Time for `size` tokens, in ms; 0 means no limit.
    pub refill_time: u64,
}

impl Drive {
    /// A disk with the defaults for everything but its name and file.
    pub fn new(drive_id: impl Into<String>, path_on_host: impl Into<PathBuf>) -> Self {
        Self {
            drive_id: drive_id.into(),
            path_on_host: Some(path_on_host.into()),
            is_root_device: false,
            partuuid: None,
            is_read_only: None,
            cache_type: CacheType::default(),
            io_engine: None,
            socket: None,
            direct: false,
            overlay: None,
            queues: 1,
            rate_limiter: None,
        }
    }

    /// The file of a disk that has one; else no path.
    pub fn path(&self) -> &Path {
        self.path_on_host.as_deref().unwrap_or(Path::new(""))
    }

    /// The configuration says that the guest cannot write.
    pub fn read_only(&self) -> bool {
        self.is_read_only.unwrap_or(false)
    }

    /// How requests reach the file.
    pub fn engine(&self) -> IoEngine {
        self.io_engine.unwrap_or_default()
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        check_id(&self.drive_id)?;
        check_queues(&self.drive_id, self.queues)?;
        let why = |text: String| Err(Error::Device(self.drive_id.clone(), text));
        let Some(socket) = &self.socket else {
            return match self.path().as_os_str().is_empty() {
                true => why("has no file: give its path, or the socket of a server".into()),
                false => self.validate_overlay(),
            };
        };
        // sockaddr_un.
        let length = socket.as_os_str().len();
        if !(1..=107).contains(&length) {
            return why(format!("has a socket of {length} bytes: give 1 to 107"));
        }
        let others = [
            ("path_on_host", self.path_on_host.is_some()),
            ("is_read_only", self.is_read_only.is_some()),
            ("io_engine", self.io_engine.is_some()),
            ("rate_limiter", self.rate_limiter.is_some()),
            ("direct", self.direct),
            ("an overlay", self.overlay.is_some()),
        ];
        match others.iter().find(|(_, given)| *given) {
            Some((other, _)) => why(format!(
                "has a socket and {other}: leave one out, a vhost-user server decides for itself"
            )),
            None => Ok(()),
        }
    }

    fn validate_overlay(&self) -> Result<(), Error> {
        let Some(overlay) = &self.overlay else {
            return Ok(());
        };
        let why = |text: &str| Err(Error::Device(self.drive_id.clone(), text.into()));
        match &overlay.directory {
            _ if self.read_only() => why("is read-only and has an overlay: leave one out"),
            _ if self.direct => why(
                "is direct and has an overlay, whose file VMs share in the page cache: leave one out",
            ),
            Some(directory) if directory.as_os_str().is_empty() => {
                why("has an overlay in a directory without a name: give one, or none")
            }
            _ => Ok(()),
        }
    }

    /// What may change while the VM runs.
    pub(crate) fn check_update(&self, path: bool, limits: bool) -> Result<(), Error> {
        if path && self.overlay.is_some() {
            let why = "has an overlay, and keeps its file: leave path_on_host out";
            return Err(Error::Device(self.drive_id.clone(), why.into()));
        }
        if self.socket.is_none() || !(path || limits) {
            return Ok(());
        }
        let what = if path { "path_on_host" } else { "rate_limiter" };
        let why = format!(
            "is served by a vhost-user server, which has no {what}: give drive_id alone, to have its size read again"
        );
        Err(Error::Device(self.drive_id.clone(), why))
    }
}

impl NetworkInterface {
    /// An interface with the defaults for everything but its name; it has no backend yet.
    pub fn new(iface_id: impl Into<String>) -> Self {
        Self {
            iface_id: iface_id.into(),
            host_dev_name: String::new(),
            tap_fd: None,
            user: None,
            guest_mac: None,
            mtu: None,
            queues: 1,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }
    }

    /// The guest's address: the given one, else a locally administered one that follows from the name.
    pub fn mac(&self) -> Result<[u8; 6], Error> {
        let Some(text) = &self.guest_mac else {
            // FNV-1a: the same name gives the same address, so that a guest finds its interface again.
            let hash = self
                .iface_id
                .bytes()
                .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
                    (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
                });
            let [a, b, c, d, e, ..] = hash.to_le_bytes();
            return Ok([0x52, a, b, c, d, e]);
        };
        let bytes: Option<Vec<u8>> = text
            .split(':')
            .map(|part| match part.len() {
                2 => u8::from_str_radix(part, 16).ok(),
                _ => None,
            })
            .collect();
        let bytes: Option<[u8; 6]> = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.filter(|bytes| bytes[0] & 1 == 0).ok_or_else(|| {
            let why = format!("has guest_mac {text:?}: give six pairs of hexadecimal digits with colons between, no multicast address");
            Error::Device(self.iface_id.clone(), why)
        })
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        check_id(&self.iface_id)?;
        check_queues(&self.iface_id, self.queues)?;
        self.mac()?;
        let why = |text: &str| Error::Device(self.iface_id.clone(), text.into());
        let backends = [
            !self.host_dev_name.is_empty(),
            self.tap_fd.is_some(),
            self.user.is_some(),
        ];
        match backends.iter().filter(|&&given| given).count() {
            0 => {
                return Err(why(
                    "has no backend: name a tap device, or take the user network",
                ));
            }
            1 => {}
            _ => {
                return Err(why(
                    "has more than one backend: give one of tap, descriptor, user",
                ));
            }
        }
        // IFNAMSIZ, with the final NUL.
        if self.host_dev_name.len() > 15 {
            return Err(why(
                "names a tap device with more than 15 bytes, which Linux does not have",
            ));
        }
        if self.user.is_some() && self.queues != 1 {
            return Err(why(
                "has more than one pair of queues: the user network has one",
            ));
        }
        if self.mtu.is_some_and(|mtu| mtu < 68) {
            return Err(why("has an MTU below 68, the least that IPv4 allows"));
        }
        Ok(())
    }
}

impl Balloon {
    /// `memory_mib`: the VM's memory.
    pub(crate) fn validate(&self, memory_mib: u64) -> Result<(), Error> {
        if u64::from(self.amount_mib) <= memory_mib {
            return Ok(());
        }
        let why = format!(
            "cannot take {} MiB of a VM with {memory_mib} MiB of memory: give less",
            self.amount_mib
        );
        Err(Error::Device("balloon".into(), why))
    }

    /// What can be turned on before boot only.
    pub(crate) fn check_update(&self, seconds: Option<u16>, hinting: bool) -> Result<(), Error> {
        let off = |what: &str| {
            let why = format!("was made without {what}: that cannot change while the VM runs");
            Err(Error::Device("balloon".into(), why))
        };
        match seconds {
            Some(seconds) if (seconds == 0) != (self.stats_polling_interval_s == 0) => {
                off(if seconds == 0 {
                    "a way to stop its statistics"
                } else {
                    "statistics"
                })
            }
            _ if hinting && !self.free_page_hinting => off("free page hinting"),
            _ => Ok(()),
        }
    }
}

impl Vsock {
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let why = |text: String| Error::Device("vsock".into(), text);
        if !(3..u32::MAX).contains(&self.guest_cid) {
            let text = format!(
                "has guest_cid {}: 0 to 2 and 4294967295 are taken, give another",
                self.guest_cid
            );
            return Err(why(text));
        }
        // sockaddr_un, with room for `_` and a port.
        let length = self.uds_path.as_os_str().len();
        if !(1..=96).contains(&length) {
            return Err(why(format!(
                "has a uds_path of {length} bytes: give 1 to 96"
            )));
        }
        Ok(())
    }
}

fn check_id(id: &str) -> Result<(), Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if id.is_empty() || id.len() > 64 || !id.chars().all(plain) {
        return Err(Error::DeviceId(id.into()));
    }
    Ok(())
}

fn check_queues(id: &str, queues: u16) -> Result<(), Error> {
    if (1..=MAX_QUEUES).contains(&queues) {
        return Ok(());
    }
    let why = format!("has {queues} queues: give 1 to {MAX_QUEUES}");
    Err(Error::Device(id.into(), why))
}

fn one() -> u16 {
    1
}

fn is_one(value: &u16) -> bool {
    *value == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_made_and_refused() {
        let mut interface = NetworkInterface::new("eth0");
        let own = interface.mac().unwrap();
        assert_eq!(own, interface.mac().unwrap());
        assert_ne!(own, NetworkInterface::new("eth1").mac().unwrap());
        assert_eq!(own[0] & 3, 2, "locally administered, not multicast");
        interface.guest_mac = Some("AA:fc:00:00:00:01".into());
        assert_eq!(interface.mac().unwrap(), [0xaa, 0xfc, 0, 0, 0, 1]);
        for bad in [
            "",
            "aa:fc:00:00:00",
            "aa:fc:00:00:00:1",
            "01:00:00:00:00:00",
            "aa:fc:00:00:00:0g",
            "aa:fc:00:00:00:01:02",
        ] {
            interface.guest_mac = Some(bad.into());
            assert!(interface.mac().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_devices_name() {
        let drive = |change: fn(&mut Drive)| {
            let mut drive = Drive::new("rootfs", "/img");
            change(&mut drive);
            drive.validate().map_err(|e| e.to_string())
        };
        drive(|_| ()).unwrap();
        assert!(
            drive(|d| d.drive_id = "a b".into())
                .unwrap_err()
                .contains("a b")
        );
        assert!(drive(|d| d.queues = 0).unwrap_err().contains("rootfs"));
        assert!(drive(|d| d.queues = 33).unwrap_err().contains("1 to 32"));
        assert!(drive(|d| d.path_on_host = Some("".into())).is_err());
        assert!(drive(|d| d.path_on_host = None).is_err());

        let overlaid = |change: fn(&mut Drive)| {
            let mut drive = Drive::new("rootfs", "/img");
            drive.overlay = Some(Overlay::default());
            change(&mut drive);
            drive.validate().map_err(|e| e.to_string())
        };
        overlaid(|_| ()).unwrap();
        overlaid(|d| d.is_read_only = Some(false)).unwrap();
        for change in [
            (|d| d.is_read_only = Some(true)) as fn(&mut Drive),
            |d| d.direct = true,
            |d| {
                d.overlay = Some(Overlay {
                    directory: Some("".into()),
                })
            },
        ] {
            let said = overlaid(change).unwrap_err();
            assert!(said.contains("overlay"), "{said}");
        }
        let mut drive_ = Drive::new("rootfs", "/img");
        drive_.overlay = Some(Overlay::default());
        let said = drive_.check_update(true, true).unwrap_err().to_string();
        assert!(said.contains("path_on_host"), "{said}");
        drive_.check_update(false, true).unwrap();

        let served = |change: fn(&mut Drive)| {
            let mut drive = Drive::new("rootfs", "");
            drive.path_on_host = None;
            drive.socket = Some("/run/disk".into());
            change(&mut drive);
            drive.validate().map_err(|e| e.to_string())
        };
        served(|_| ()).unwrap();
        served(|d| d.cache_type = CacheType::Writeback).unwrap();
        served(|d| d.partuuid = Some("1234-01".into())).unwrap();
        let refused = |field: &str, change: fn(&mut Drive)| {
            let said = served(change).unwrap_err();
            assert!(said.contains("rootfs") && said.contains(field), "{said}");
        };
        refused("path_on_host", |d| d.path_on_host = Some("/img".into()));
        refused("is_read_only", |d| d.is_read_only = Some(false));
        refused("io_engine", |d| d.io_engine = Some(IoEngine::Sync));
        refused("rate_limiter", |d| {
            d.rate_limiter = Some(RateLimiter::default())
        });
        refused("direct", |d| d.direct = true);
        refused("overlay", |d| d.overlay = Some(Overlay::default()));
        assert!(served(|d| d.socket = Some("".into())).is_err());
        assert!(served(|d| d.socket = Some("x".repeat(108).into())).is_err());

        let net = |change: fn(&mut NetworkInterface)| {
            let mut interface = NetworkInterface::new("eth0");
            interface.host_dev_name = "tap0".into();
            change(&mut interface);
            interface.validate().map_err(|e| e.to_string())
        };
        net(|_| ()).unwrap();
        assert!(
            net(|n| n.host_dev_name.clear())
                .unwrap_err()
                .contains("no backend")
        );
        assert!(
            net(|n| n.tap_fd = Some(3))
                .unwrap_err()
                .contains("more than one")
        );
        assert!(
            net(|n| n.host_dev_name = "x".repeat(16))
                .unwrap_err()
                .contains("15 bytes")
        );
        assert!(net(|n| n.mtu = Some(67)).unwrap_err().contains("68"));

        for cid in [0, 1, 2, u32::MAX] {
            let vsock = Vsock {
                guest_cid: cid,
                uds_path: "v".into(),
                vsock_id: None,
            };
            assert!(vsock.validate().is_err());
        }
    }
}
