//! Memory and time.

use crate::Finding;
use crate::host::Host;

/// A default guest, and something for the monitor and the page cache.
const MEMORY_WANTED_KIB: u64 = 512 << 10;

pub fn examine(host: &Host) -> Vec<Finding> {
    vec![memory(host), huge_pages(host), clock(host)]
}

fn memory(host: &Host) -> Finding {
    const NAME: &str = "memory";
    let kib = |key| {
        let value = host.field("/proc/meminfo", key)?;
        value.split_whitespace().next()?.parse::<u64>().ok()
    };
    let (Some(total), Some(available)) = (kib("MemTotal"), kib("MemAvailable")) else {
        return Finding::warn(
            NAME,
            "/proc/meminfo does not say how much there is",
            "mount /proc",
        );
    };
    // Kernel samepage merging joins only memory for which a program asks.
    let merging = match host.number("/sys/kernel/mm/ksm/run") {
        Some(1) => "on, not asked for by Husk",
        Some(_) => "off",
        None => "not in this kernel",
    };
    let text = format!(
        "{} MiB of {} MiB are available; KSM is {merging}",
        available >> 10,
        total >> 10
    );
    if host.number("/proc/sys/vm/overcommit_memory") == Some(2) {
        return Finding::warn(
            NAME,
            format!(
                "{text}, but overcommit is off: a VM is charged with all of its memory at once"
            ),
            "sudo sysctl vm.overcommit_memory=0",
        );
    }
    if available < MEMORY_WANTED_KIB {
        return Finding::warn(
            NAME,
            format!("only {text}"),
            "end something, or give VMs less: --memory 64M",
        );
    }
    Finding::ok(NAME, text)
}

fn huge_pages(host: &Host) -> Finding {
    const NAME: &str = "huge-pages";
    const DIRECTORY: &str = "/sys/kernel/mm/transparent_hugepage";
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let setting = |file| host.choice(&format!("{DIRECTORY}/{file}"));
    let pool = |file| host.number(&format!("{POOL}/{file}"));
    let pool = match (pool("nr_hugepages"), pool("free_hugepages")) {
        (Some(0), _) => "no pool of 2 MiB pages".into(),
        (Some(all), Some(free)) => format!("{free} of {all} pages free in the 2 MiB pool"),
        _ => "no hugetlbfs".into(),
    };
    let shared = setting("shmem_enabled").unwrap_or("unknown".into());
    match setting("enabled").as_deref() {
        None => Finding::warn(
            NAME,
            format!("this kernel has no transparent huge pages; {pool}"),
            "guests run, slower with much memory; a kernel with CONFIG_TRANSPARENT_HUGEPAGE does better",
        ),
        Some("never") => Finding::warn(
            NAME,
            format!("transparent huge pages are off, guests with much memory are slower; {pool}"),
            format!("echo madvise | sudo tee {DIRECTORY}/enabled"),
        ),
        Some(private) => Finding::ok(
            NAME,
            format!("transparent: {private} (shared memory: {shared}); {pool}"),
        ),
    }
}

fn clock(host: &Host) -> Finding {
    const NAME: &str = "clock";
    const FILE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    match host.line(FILE).as_deref() {
        Some("tsc") => Finding::ok(NAME, "the host's clock source is the TSC, stable"),
        Some(name @ ("kvm-clock" | "hyperv_clocksource_tsc_page" | "xen")) => Finding::ok(
            NAME,
            format!("the host's clock source is its hypervisor's, {name}"),
        ),
        Some(name) => Finding::warn(
            NAME,
            format!(
                "the host's clock source is {name}, not the TSC: time is slow to read, and guests' clocks may jump"
            ),
            "`sudo dmesg | grep -i -e tsc -e clocksource` says why; mostly a firmware update helps",
        ),
        None => Finding::warn(NAME, "the host's clock source is unknown", "mount /sys"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use crate::testing::FakeHost;

    #[test]
    fn memory_is_told_and_little_of_it_warned_of() {
        let fake = FakeHost::new();
        fake.write(
            "/proc/meminfo",
            "MemTotal:       24684092 kB\nMemFree: 1 kB\nMemAvailable:   22084956 kB\n",
        );
        let finding = memory(&fake.host());
        assert_eq!(finding.status, Status::Ok);
        assert_eq!(
            finding.text,
            "21567 MiB of 24105 MiB are available; KSM is not in this kernel"
        );
        fake.write(
            "/proc/meminfo",
            "MemTotal: 1024000 kB\nMemAvailable: 204800 kB\n",
        );
        assert_eq!(memory(&fake.host()).status, Status::Warn);
    }

    #[test]
    fn strict_overcommit_is_warned_of() {
        let fake = FakeHost::new();
        fake.write(
            "/proc/meminfo",
            "MemTotal: 8388608 kB\nMemAvailable: 8388608 kB\n",
        );
        fake.write("/proc/sys/vm/overcommit_memory", "0\n");
        assert_eq!(memory(&fake.host()).status, Status::Ok);
        fake.write("/proc/sys/vm/overcommit_memory", "2\n");
        let finding = memory(&fake.host());
        assert_eq!(finding.status, Status::Warn);
        assert!(finding.advice.unwrap().contains("vm.overcommit_memory=0"));
    }

    #[test]
    fn huge_pages_that_are_off_are_warned_of() {
        let fake = FakeHost::new();
        assert_eq!(huge_pages(&fake.host()).status, Status::Warn);
        let directory = "/sys/kernel/mm/transparent_hugepage";
        fake.write(&format!("{directory}/enabled"), "always madvise [never]\n");
        assert_eq!(huge_pages(&fake.host()).status, Status::Warn);
        fake.write(&format!("{directory}/enabled"), "always [madvise] never\n");
        fake.write(
            &format!("{directory}/shmem_enabled"),
            "always within_size [advise] never deny force\n",
        );
        let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB";
        fake.write(&format!("{pool}/nr_hugepages"), "512\n");
        fake.write(&format!("{pool}/free_hugepages"), "500\n");
        let finding = huge_pages(&fake.host());
        assert_eq!(finding.status, Status::Ok);
        assert_eq!(
            finding.text,
            "transparent: madvise (shared memory: advise); 500 of 512 pages free in the 2 MiB pool"
        );
    }

    #[test]
    fn a_clock_source_that_is_not_the_tsc_is_warned_of() {
        let fake = FakeHost::new();
        let file = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        for (name, status) in [
            ("tsc", Status::Ok),
            ("kvm-clock", Status::Ok),
            ("hpet", Status::Warn),
        ] {
            fake.write(file, &format!("{name}\n"));
            assert_eq!(clock(&fake.host()).status, status, "{name}");
        }
    }
}
