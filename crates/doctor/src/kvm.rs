//! KVM: is it there, which kind, what can it do, and so: can it run Linux?

use crate::Finding;
use crate::host::{Access, Host};
use crate::probe::{Outcome, System};

/// Guest instructions per second below which Linux does not come up in any time that a person waits: its boot is
/// hundreds of millions of them. A KVM that emulates each instruction makes one to five million, one that lets a
/// processor execute them, even one that QEMU emulates, a hundred million or more.
const ENOUGH: u64 = 20_000_000;
/// Below this something between the guest and a processor costs most of the time.
const FAST: u64 = 500_000_000;

const OTHER_HOST: &str = "use a host with VMX or SVM (bare metal, or a VM with nested virtualization), or \
     `cargo xtask testbed` to try Husk here";

const LOOK_AT_LOG: &str = "look for the cause in `sudo dmesg | grep -i kvm`";

/// How KVM gets a guest executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Vmx,
    Svm,
    /// With neither: guests run in user mode on page tables that KVM keeps, the rest is emulated.
    PageTable,
}

/// What KVM can do, and whether Linux can be run with it.
pub fn examine(host: &Host, probed: &Outcome) -> (Vec<Finding>, bool) {
    let mut findings = vec![host_finding(host)];
    let access = host.device("/dev/kvm");
    let usable = matches!(access, Access::Open);
    findings.push(device(host, &access, probed));
    findings.push(kind(host, usable));
    let system = probed.system.as_ref().ok().filter(|_| usable);
    let capable = system.is_none_or(|system| system.missing.is_empty());
    findings.push(cpus(system));
    if let Some(system) = system {
        findings.push(capabilities(system));
    }
    let (linux, can) = linux(host, probed, usable, capable);
    findings.push(linux);
    (findings, can)
}

fn host_finding(host: &Host) -> Finding {
    let kernel = host
        .line("/proc/sys/kernel/osrelease")
        .unwrap_or("of an unknown version".into());
    let model = host
        .field("/proc/cpuinfo", "model name")
        .map(|model| crate::host::shown(&model))
        .filter(|model| !model.is_empty())
        .unwrap_or("an unknown processor".into());
    let place = match &host.processor.hypervisor {
        Some(hypervisor) => format!("; itself a VM, of {hypervisor}"),
        None => String::new(),
    };
    let architecture = std::env::consts::ARCH;
    Finding::ok(
        "host",
        format!("Linux {kernel}, {architecture}, {model}{place}"),
    )
}

fn device(host: &Host, access: &Access, probed: &Outcome) -> Finding {
    const NAME: &str = "kvm";
    match access {
        Access::Open => match &probed.system {
            Ok(_) => Finding::ok(
                NAME,
                "/dev/kvm is there and you may use it (API version 12)",
            ),
            Err(e) => Finding::fail(
                NAME,
                format!("/dev/kvm can be opened, but not used: {e}"),
                LOOK_AT_LOG,
            ),
        },
        Access::Missing => {
            let text = match host.exists("/dev/kvm") {
                true => "/dev/kvm is there, but no driver is behind it",
                false => "there is no /dev/kvm",
            };
            Finding::fail(NAME, text, how_to_get_kvm(host))
        }
        Access::Denied => {
            let group = host.group_of("/dev/kvm").unwrap_or("kvm".into());
            // Nobody should join root's group for a device.
            let advice = match group.as_str() {
                "root" | "0" => "sudo setfacl -m u:$USER:rw /dev/kvm".into(),
                group => format!("sudo usermod -aG {group} $USER, then log in again"),
            };
            Finding::fail(
                NAME,
                format!("/dev/kvm is there, but you may not open it (it is group {group}'s)"),
                advice,
            )
        }
        Access::Forbidden => Finding::fail(
            NAME,
            "/dev/kvm is there, but a container or a security module forbids it",
            "give it to the container: docker run --device /dev/kvm",
        ),
        Access::NotADevice => Finding::fail(
            NAME,
            "/dev/kvm is not a character device",
            "remove that file, then load the module again",
        ),
        Access::Failed(e) => {
            Finding::fail(NAME, format!("/dev/kvm cannot be opened: {e}"), LOOK_AT_LOG)
        }
    }
}

/// The reason why there is no /dev/kvm decides who can mend it.
fn how_to_get_kvm(host: &Host) -> String {
    let processor = &host.processor;
    let (module, flag, setting) = match (processor.vmx, processor.svm) {
        (true, _) => ("kvm_intel", "vmx", "Intel Virtualization Technology (VT-x)"),
        (_, true) => ("kvm_amd", "svm", "SVM Mode (AMD-V)"),
        _ => {
            return match &processor.hypervisor {
                Some(hypervisor) => format!(
                    "this host is a VM of {hypervisor} without nested virtualization: allow it there, use bare metal, or try Husk with `cargo xtask testbed`"
                ),
                None => format!("this processor has neither VMX nor SVM: {OTHER_HOST}"),
            };
        }
    };
    // The kernel takes the flag away when the firmware has locked the feature; CPUID goes on showing it.
    let flags = host.field("/proc/cpuinfo", "flags");
    let locked = flags.is_some_and(|flags| !flags.split_whitespace().any(|word| word == flag));
    if locked {
        format!("allow \"{setting}\" in the firmware's setup, then switch the host off and on")
    } else if is_loaded(host, module) {
        "the module is loaded: in a container, pass the device in (docker run --device /dev/kvm); else see `sudo dmesg | grep -i kvm`".into()
    } else {
        format!("sudo modprobe {module}; if that fails, `sudo dmesg | grep -i kvm` says why")
    }
}

fn is_loaded(host: &Host, module: &str) -> bool {
    host.exists(&format!("/sys/module/{module}"))
}

/// A module that is built in is listed even if its processor is not there: both count.
fn kind_of(host: &Host) -> Kind {
    let processor = &host.processor;
    if processor.vmx && is_loaded(host, "kvm_intel") {
        Kind::Vmx
    } else if processor.svm && is_loaded(host, "kvm_amd") {
        Kind::Svm
    } else if is_loaded(host, "kvm_pvm") {
        Kind::PageTable
    } else if processor.vmx {
        Kind::Vmx
    } else if processor.svm {
        Kind::Svm
    } else {
        Kind::PageTable
    }
}

fn kind(host: &Host, usable: bool) -> Finding {
    const NAME: &str = "kind";
    let module = ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .into_iter()
        .find(|module| is_loaded(host, module))
        .unwrap_or("no KVM module of a processor loaded");
    let nested = match &host.processor.hypervisor {
        Some(hypervisor) => format!("nested in {hypervisor}"),
        None => "on bare metal".into(),
    };
    match kind_of(host) {
        Kind::Vmx => Finding::ok(NAME, format!("Intel VMX, {nested} ({module})")),
        Kind::Svm => Finding::ok(NAME, format!("AMD SVM, {nested} ({module})")),
        Kind::PageTable if usable => Finding::warn(
            NAME,
            format!("page-table-based, with neither VMX nor SVM ({module})"),
            "see the line linux",
        ),
        Kind::PageTable => Finding::fail(
            NAME,
            "the processor shows neither VMX nor SVM",
            "see the line kvm",
        ),
    }
}

fn capabilities(system: &System) -> Finding {
    const NAME: &str = "capabilities";
    if !system.missing.is_empty() {
        return Finding::fail(
            NAME,
            format!(
                "this KVM lacks what Husk needs: {}",
                system.missing.join(", ")
            ),
            "use a host kernel of 5.10 or newer with Debian's, Ubuntu's or Fedora's configuration",
        );
    }
    if !system.missing_optional.is_empty() {
        return Finding::warn(
            NAME,
            format!("this KVM lacks {}", system.missing_optional.join(", ")),
            "nothing need be done: guests use a slower timer",
        );
    }
    Finding::ok(NAME, "this KVM has all that Husk needs")
}

fn cpus(system: Option<&System>) -> Finding {
    let own = std::thread::available_parallelism().map_or(1, usize::from);
    let text = format!("{own} of the host's processors may be used here");
    Finding::ok(
        "cpus",
        match system {
            Some(system) => {
                let most = system.max_vcpus.min(husk_arch::layout::MAX_CPUS as usize);
                format!("{text}; a VM may have {most}")
            }
            None => text,
        },
    )
}

fn linux(host: &Host, probed: &Outcome, usable: bool, capable: bool) -> (Finding, bool) {
    const NAME: &str = "linux";
    let fail = |text: String, advice: &str| (Finding::fail(NAME, text, advice), false);
    if !usable {
        return fail("cannot be run without KVM".into(), "see the line kvm");
    }
    if !capable {
        return fail(
            "cannot be run without what this KVM lacks".into(),
            "see the line capabilities",
        );
    }
    let kind = kind_of(host);
    let speed = match &probed.speed {
        Ok(speed) => *speed,
        Err(e) => {
            let advice = match kind {
                Kind::PageTable => OTHER_HOST,
                _ => LOOK_AT_LOG,
            };
            return fail(
                format!("cannot be run, a test VM did not work: {e}"),
                advice,
            );
        }
    };
    let rate = format!("{} instructions a second", amount(speed));
    match kind {
        Kind::PageTable if speed < ENOUGH => fail(
            format!(
                "cannot be run: this host's KVM is page-table-based (no VMX, no SVM) and emulates guest code, {rate}"
            ),
            OTHER_HOST,
        ),
        _ if speed < ENOUGH => fail(
            format!("cannot be run in reasonable time: a test VM made only {rate}"),
            "look at what the host's processors are busy with, or at the hypervisor below; then ask again",
        ),
        _ if host.processor.is_emulated() => (
            Finding::warn(
                NAME,
                format!("runs, slowly: QEMU emulates this host's processor, {rate}"),
                "good for tests; measure on a host with a real processor",
            ),
            true,
        ),
        _ if speed < FAST => (
            Finding::warn(
                NAME,
                format!("runs, slowly: {rate}"),
                "look at what the host's processors are busy with, or at the hypervisor below",
            ),
            true,
        ),
        _ => (
            Finding::ok(NAME, format!("runs: a test VM made {rate}")),
            true,
        ),
    }
}

/// `1.5 million`, `230 million`, `9.2 billion`.
fn amount(number: u64) -> String {
    let (unit, name) = match number {
        1_000_000_000.. => (1_000_000_000, "billion"),
        1_000_000.. => (1_000_000, "million"),
        _ => (1000, "thousand"),
    };
    let (whole, tenth) = (number / unit, number % unit / (unit / 10));
    match whole {
        0..10 => format!("{whole}.{tenth} {name}"),
        _ => format!("{whole} {name}"),
    }
}

#[cfg(test)]
#[path = "kvm_tests.rs"]
mod tests;
