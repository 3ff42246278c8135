use super::*;
use crate::Status;
use crate::testing::FakeHost;

fn outcome(speed: u64) -> Outcome {
    Outcome {
        system: Ok(System {
            max_vcpus: 1024,
            missing: Vec::new(),
            missing_optional: Vec::new(),
        }),
        speed: Ok(speed),
    }
}

/// /dev/kvm can be opened, `module` is loaded.
fn with_kvm(module: &str) -> FakeHost {
    let fake = FakeHost::new();
    fake.link("/dev/null", "/dev/kvm");
    fake.module(module);
    fake
}

fn find(findings: &[Finding], name: &str) -> Finding {
    let found = findings.iter().find(|finding| finding.name == name);
    found
        .unwrap_or_else(|| panic!("no {name} in {findings:?}"))
        .clone()
}

/// Statuses of `kind` and `linux`, and the verdict.
fn verdict(fake: &FakeHost, probed: &Outcome) -> (Status, Status, bool) {
    let (findings, can) = examine(&fake.host(), probed);
    let status = |name| find(&findings, name).status;
    (status("kind"), status("linux"), can)
}

#[test]
fn bare_metal_runs_linux() {
    let mut fake = with_kvm("kvm_intel");
    fake.processor.vmx = true;
    assert_eq!(
        verdict(&fake, &outcome(9_200_000_000)),
        (Status::Ok, Status::Ok, true)
    );
    let (findings, _) = examine(&fake.host(), &outcome(9_200_000_000));
    assert_eq!(
        find(&findings, "kind").text,
        "Intel VMX, on bare metal (kvm_intel)"
    );
    assert!(find(&findings, "linux").text.contains("9.2 billion"));
}

#[test]
fn nested_virtualization_runs_linux() {
    let mut fake = with_kvm("kvm_amd");
    fake.processor.svm = true;
    fake.processor.hypervisor = Some("KVM".into());
    assert_eq!(
        verdict(&fake, &outcome(6_000_000_000)),
        (Status::Ok, Status::Ok, true)
    );
}

#[test]
fn an_emulated_processor_with_svm_runs_linux_slowly() {
    let mut fake = with_kvm("kvm_amd");
    fake.processor.svm = true;
    fake.processor.hypervisor = Some("QEMU's software emulation".into());
    for speed in [60_000_000, 900_000_000] {
        assert_eq!(
            verdict(&fake, &outcome(speed)),
            (Status::Ok, Status::Warn, true)
        );
    }
}

#[test]
fn a_page_table_based_kvm_cannot_run_linux() {
    let mut fake = with_kvm("kvm_pvm");
    fake.processor.hypervisor = Some("KVM".into());
    for speed in [1_500_000, 4_000_000] {
        assert_eq!(
            verdict(&fake, &outcome(speed)),
            (Status::Warn, Status::Fail, false)
        );
    }
    let (findings, _) = examine(&fake.host(), &outcome(1_500_000));
    let linux = find(&findings, "linux");
    assert!(linux.text.contains("no VMX, no SVM"), "{linux:?}");
    assert!(linux.advice.unwrap().contains("cargo xtask testbed"));
}

#[test]
fn built_in_modules_of_absent_processors_do_not_count() {
    let fake = with_kvm("kvm_intel");
    fake.module("kvm_amd");
    fake.module("kvm_pvm");
    assert_eq!(kind_of(&fake.host()), Kind::PageTable);
}

#[test]
fn a_page_table_based_kvm_on_a_processor_with_vmx_is_one() {
    let mut fake = with_kvm("kvm_pvm");
    fake.processor.vmx = true;
    assert_eq!(kind_of(&fake.host()), Kind::PageTable);
}

#[test]
fn a_test_vm_that_fails_or_crawls_is_a_no_on_any_kind() {
    let mut fake = with_kvm("kvm_intel");
    fake.processor.vmx = true;
    let mut failed = outcome(0);
    failed.speed = Err("the guest did not answer".into());
    assert_eq!(verdict(&fake, &failed), (Status::Ok, Status::Fail, false));
    assert_eq!(
        verdict(&fake, &outcome(2_000_000)),
        (Status::Ok, Status::Fail, false)
    );
}

#[test]
fn missing_capabilities_are_named() {
    let mut fake = with_kvm("kvm_intel");
    fake.processor.vmx = true;
    let mut probed = outcome(9_000_000_000);
    probed.system = Ok(System {
        max_vcpus: 1,
        missing: vec!["IRQFD", "PIT2"],
        missing_optional: Vec::new(),
    });
    let (findings, can) = examine(&fake.host(), &probed);
    assert!(!can);
    let capabilities = find(&findings, "capabilities");
    assert_eq!(capabilities.status, Status::Fail);
    assert!(capabilities.text.contains("IRQFD, PIT2"));
}

#[test]
fn a_missing_deadline_timer_is_no_obstacle() {
    let mut fake = with_kvm("kvm_intel");
    fake.processor.vmx = true;
    let mut probed = outcome(9_000_000_000);
    probed.system = Ok(System {
        max_vcpus: 1,
        missing: Vec::new(),
        missing_optional: vec!["TSC_DEADLINE_TIMER"],
    });
    let (findings, can) = examine(&fake.host(), &probed);
    assert!(can);
    assert_eq!(find(&findings, "capabilities").status, Status::Warn);
}

/// What a host without /dev/kvm is told to do.
fn advice(fake: &FakeHost) -> String {
    let (findings, can) = examine(&fake.host(), &Outcome::nothing("no /dev/kvm"));
    assert!(!can);
    assert_eq!(find(&findings, "linux").status, Status::Fail);
    find(&findings, "kvm").advice.unwrap()
}

#[test]
fn a_missing_device_has_the_advice_that_fits_its_cause() {
    let mut fake = FakeHost::new();
    assert!(advice(&fake).contains("neither VMX nor SVM"));
    fake.processor.hypervisor = Some("Hyper-V".into());
    assert!(advice(&fake).contains("VM of Hyper-V without nested"));
    fake.processor.vmx = true;
    assert!(advice(&fake).contains("modprobe kvm_intel"));
    fake.write("/proc/cpuinfo", "flags\t\t: fpu sse\n");
    assert!(advice(&fake).contains("firmware"));
    fake.write("/proc/cpuinfo", "flags\t\t: fpu vmx\n");
    assert!(advice(&fake).contains("modprobe kvm_intel"));
    fake.module("kvm_intel");
    assert!(advice(&fake).contains("--device /dev/kvm"));
}

#[test]
fn a_forbidden_device_names_its_group() {
    let fake = FakeHost::new();
    fake.write("/dev/kvm", "");
    let gid =
        std::os::unix::fs::MetadataExt::gid(&std::fs::metadata(fake.path("/dev/kvm")).unwrap());
    fake.write(
        "/etc/group",
        &format!("none:x:{}:\nvirt:x:{gid}:a,b\n", gid.wrapping_add(1)),
    );
    let finding = device(&fake.host(), &Access::Denied, &outcome(0));
    assert_eq!(finding.status, Status::Fail);
    assert!(finding.text.contains("group virt"), "{finding:?}");
    assert!(finding.advice.unwrap().contains("usermod -aG virt $USER"));
    fake.write("/etc/group", &format!("root:x:{gid}:\n"));
    let finding = device(&fake.host(), &Access::Denied, &outcome(0));
    assert!(finding.advice.unwrap().contains("setfacl"));
}

#[test]
fn amounts_are_for_people() {
    assert_eq!(amount(1_543_000), "1.5 million");
    assert_eq!(amount(230_999_999), "230 million");
    assert_eq!(amount(9_290_000_000), "9.2 billion");
    assert_eq!(amount(812), "0.8 thousand");
}

#[test]
fn a_device_that_is_not_kvm_is_a_no() {
    let mut fake = with_kvm("kvm_intel");
    fake.processor.vmx = true;
    let (findings, can) = examine(&fake.host(), &Outcome::nothing("API version 10"));
    assert!(!can);
    let kvm = find(&findings, "kvm");
    assert_eq!(kvm.status, Status::Fail);
    assert!(kvm.text.contains("API version 10"), "{kvm:?}");
}
