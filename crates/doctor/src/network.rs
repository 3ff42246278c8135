//! What networking needs.

use crate::Finding;
use crate::host::{Access, Capability, Host};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

pub fn examine(host: &Host) -> Vec<Finding> {
    vec![taps(host), vhost(host), passt()]
}

fn taps(host: &Host) -> Finding {
    const NAME: &str = "taps";
    match host.device("/dev/net/tun") {
        Access::Open if host.has_capability(Capability::NetAdmin) => Finding::ok(
            NAME,
            "/dev/net/tun is there and you may make taps (CAP_NET_ADMIN)",
        ),
        Access::Open => Finding::warn(
            NAME,
            "/dev/net/tun is there, but making taps needs CAP_NET_ADMIN, which you have not",
            "make one for yourself: sudo ip tuntap add dev tap0 mode tap user $USER",
        ),
        Access::Missing => Finding::warn(
            NAME,
            "there is no /dev/net/tun: no taps",
            "sudo modprobe tun; in a container: docker run --device /dev/net/tun",
        ),
        Access::Denied | Access::Forbidden => Finding::warn(
            NAME,
            "/dev/net/tun is there, but you may not open it: no taps",
            "sudo chmod 666 /dev/net/tun (its usual mode); in a container: docker run --device /dev/net/tun",
        ),
        Access::NotADevice => Finding::warn(
            NAME,
            "/dev/net/tun is not a character device: no taps",
            "remove that file, then: sudo modprobe tun",
        ),
        Access::Failed(e) => Finding::warn(
            NAME,
            format!("/dev/net/tun cannot be opened: {e}"),
            "sudo modprobe tun",
        ),
    }
}

fn vhost(host: &Host) -> Finding {
    let state = |name: &str| match host.exists(&format!("/dev/{name}")) {
        true => format!("/dev/{name} is there"),
        false => format!("no /dev/{name}"),
    };
    Finding::ok(
        "vhost",
        format!(
            "{}, {}; Husk does not need them",
            state("vhost-net"),
            state("vhost-vsock")
        ),
    )
}

fn passt() -> Finding {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found: Option<PathBuf> = std::env::split_paths(&path)
        .map(|directory| directory.join("passt"))
        .find(|file| {
            std::fs::metadata(file)
                .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        });
    Finding::ok(
        "passt",
        match found {
            Some(file) => format!(
                "{} is there, for networking without privileges",
                file.display()
            ),
            None => "not installed; only for networking without privileges".into(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use crate::testing::FakeHost;

    #[test]
    fn taps_need_the_device_and_the_capability() {
        let fake = FakeHost::new();
        assert!(taps(&fake.host()).text.contains("no /dev/net/tun"));
        fake.link("/dev/null", "/dev/net/tun");
        let finding = taps(&fake.host());
        assert_eq!(finding.status, Status::Warn);
        assert!(finding.text.contains("CAP_NET_ADMIN"));
        assert!(finding.advice.unwrap().contains("ip tuntap add"));
        fake.write("/proc/self/status", "CapEff:\t000001ffffffffff\n");
        assert_eq!(taps(&fake.host()).status, Status::Ok);
    }

    #[test]
    fn vhost_devices_are_named_either_way() {
        let fake = FakeHost::new();
        fake.write("/dev/vhost-net", "");
        let finding = vhost(&fake.host());
        assert_eq!(finding.status, Status::Ok);
        assert!(
            finding
                .text
                .contains("/dev/vhost-net is there, no /dev/vhost-vsock")
        );
    }
}
