//! Parts of the host's kernel that Husk uses if they are there.

use crate::Finding;
use crate::host::{Access, Capability, Host};

pub fn examine(host: &Host) -> Vec<Finding> {
    vec![
        userfaultfd(host),
        io_uring(host),
        cgroups(host),
        sandbox(host),
    ]
}

fn userfaultfd(host: &Host) -> Finding {
    const NAME: &str = "userfaultfd";
    const SWITCH: &str = "/proc/sys/vm/unprivileged_userfaultfd";
    if matches!(host.device("/dev/userfaultfd"), Access::Open) {
        return Finding::ok(NAME, "permitted, through /dev/userfaultfd");
    }
    if host.has_capability(Capability::SysPtrace) {
        return Finding::ok(NAME, "permitted (CAP_SYS_PTRACE)");
    }
    match host.number(SWITCH) {
        Some(1) => Finding::ok(NAME, "permitted to everybody"),
        Some(_) => Finding::warn(
            NAME,
            "not permitted: memory of a VM cannot be filled on demand",
            "sudo setfacl -m u:$USER:rw /dev/userfaultfd, or sudo sysctl vm.unprivileged_userfaultfd=1",
        ),
        None => Finding::warn(
            NAME,
            "not in this kernel: memory of a VM cannot be filled on demand",
            "use a kernel with CONFIG_USERFAULTFD",
        ),
    }
}

/// The switch came with Linux 6.6, io_uring with 5.1.
fn io_uring(host: &Host) -> Finding {
    const NAME: &str = "io_uring";
    let permitted = |text: &str| {
        if host.is_filtered() {
            Finding::warn(
                NAME,
                format!("{text}, but a seccomp filter is on this process and may refuse it"),
                "in a container: docker run --security-opt seccomp=unconfined",
            )
        } else {
            Finding::ok(NAME, text)
        }
    };
    let open = |value| {
        Finding::warn(
            NAME,
            format!("not permitted to you (kernel.io_uring_disabled is {value}): disks are slower"),
            "sudo sysctl kernel.io_uring_disabled=0",
        )
    };
    match (
        host.number("/proc/sys/kernel/io_uring_disabled"),
        host.kernel_version(),
    ) {
        (Some(0), _) => permitted("permitted"),
        (Some(1), _) if host.has_capability(Capability::SysAdmin) => {
            permitted("permitted (CAP_SYS_ADMIN)")
        }
        (Some(value), _) => open(value),
        (None, Some(version)) if ((5, 1)..(6, 6)).contains(&version) => permitted("permitted"),
        (None, _) => Finding::warn(
            NAME,
            "not in this kernel: disks are slower",
            "use a kernel of 5.10 or newer with CONFIG_IO_URING",
        ),
    }
}

fn cgroups(host: &Host) -> Finding {
    const NAME: &str = "cgroups";
    const ADVICE: &str =
        "to limit VMs by cgroups, boot the host with systemd.unified_cgroup_hierarchy=1";
    if host.exists("/sys/fs/cgroup/cgroup.controllers") {
        let controllers = host.line("/sys/fs/cgroup/cgroup.controllers");
        return Finding::ok(
            NAME,
            format!(
                "version 2, with {}",
                controllers.unwrap_or("no controllers".into())
            ),
        );
    }
    if host.exists("/sys/fs/cgroup/unified") {
        return Finding::warn(NAME, "version 1, with an empty version 2 beside it", ADVICE);
    }
    if host.exists("/sys/fs/cgroup/memory") {
        return Finding::warn(NAME, "version 1", ADVICE);
    }
    Finding::warn(
        NAME,
        "not mounted",
        "to limit VMs by cgroups: sudo mount -t cgroup2 none /sys/fs/cgroup",
    )
}

fn sandbox(host: &Host) -> Finding {
    const NAME: &str = "sandbox";
    // Read only by root in some places, and only with securityfs mounted.
    let landlock = match host.line("/sys/kernel/security/lsm") {
        Some(modules) if modules.split(',').any(|module| module == "landlock") => "Landlock is on",
        Some(_) => "no Landlock",
        None => "whether Landlock is on cannot be seen",
    };
    let actions = host.line("/proc/sys/kernel/seccomp/actions_avail");
    match actions {
        Some(actions) if actions.split(' ').any(|action| action == "kill_process") => {
            Finding::ok(NAME, format!("seccomp filters are there; {landlock}"))
        }
        _ => Finding::warn(
            NAME,
            format!("this kernel has no seccomp filters; {landlock}"),
            "use a kernel with CONFIG_SECCOMP_FILTER",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use crate::testing::FakeHost;

    #[test]
    fn userfaultfd_has_three_doors() {
        let fake = FakeHost::new();
        assert!(
            userfaultfd(&fake.host())
                .text
                .contains("not in this kernel")
        );
        fake.write("/proc/sys/vm/unprivileged_userfaultfd", "0\n");
        assert_eq!(userfaultfd(&fake.host()).status, Status::Warn);
        fake.write("/proc/self/status", "CapEff:\t0000000000080000\n");
        assert_eq!(userfaultfd(&fake.host()).status, Status::Ok);
        fake.write("/proc/self/status", "CapEff:\t0000000000000000\n");
        fake.write("/proc/sys/vm/unprivileged_userfaultfd", "1\n");
        assert_eq!(userfaultfd(&fake.host()).status, Status::Ok);
        fake.write("/proc/sys/vm/unprivileged_userfaultfd", "0\n");
        fake.link("/dev/null", "/dev/userfaultfd");
        assert_eq!(userfaultfd(&fake.host()).status, Status::Ok);
    }

    #[test]
    fn io_uring_depends_on_switch_kernel_and_filter() {
        let status = |release: &str, switch: Option<&str>, process: &str| {
            let fake = FakeHost::new();
            fake.write("/proc/sys/kernel/osrelease", release);
            fake.write("/proc/self/status", process);
            if let Some(switch) = switch {
                fake.write("/proc/sys/kernel/io_uring_disabled", switch);
            }
            io_uring(&fake.host()).status
        };
        assert_eq!(status("6.12.0", Some("0"), ""), Status::Ok);
        assert_eq!(status("6.12.0", Some("1"), ""), Status::Warn);
        assert_eq!(
            status("6.12.0", Some("1"), "CapEff:\t0000000000200000\n"),
            Status::Ok
        );
        assert_eq!(
            status("6.12.0", Some("2"), "CapEff:\t0000000000200000\n"),
            Status::Warn
        );
        assert_eq!(status("6.12.0", None, ""), Status::Warn);
        assert_eq!(status("6.1.0-56-amd64", None, ""), Status::Ok);
        assert_eq!(status("4.19.0", None, ""), Status::Warn);
        assert_eq!(status("6.12.0", Some("0"), "Seccomp:\t2\n"), Status::Warn);
    }

    #[test]
    fn cgroup_versions_are_told_apart() {
        let fake = FakeHost::new();
        assert!(cgroups(&fake.host()).text.contains("not mounted"));
        fake.write("/sys/fs/cgroup/unified/cgroup.controllers", "\n");
        fake.write("/sys/fs/cgroup/memory/tasks", "\n");
        assert_eq!(cgroups(&fake.host()).status, Status::Warn);
        fake.write("/sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n");
        let finding = cgroups(&fake.host());
        assert_eq!(finding.status, Status::Ok);
        assert!(finding.text.contains("cpu memory pids"));
    }

    #[test]
    fn the_sandbox_needs_seccomp_and_tells_of_landlock() {
        let fake = FakeHost::new();
        assert_eq!(sandbox(&fake.host()).status, Status::Warn);
        fake.write(
            "/proc/sys/kernel/seccomp/actions_avail",
            "kill_process kill_thread trap errno\n",
        );
        assert_eq!(sandbox(&fake.host()).status, Status::Ok);
        fake.write("/sys/kernel/security/lsm", "capability,landlock,yama\n");
        assert!(sandbox(&fake.host()).text.contains("Landlock is on"));
        fake.write("/sys/kernel/security/lsm", "capability,yama\n");
        assert!(sandbox(&fake.host()).text.contains("no Landlock"));
    }
}
