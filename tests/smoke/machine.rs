//! What may be asked of a VM, in the test's own process.

use crate::common::machine::Machine;
use crate::{LIMIT, payload};
use husk_config::{DeviceUpdate, HugePages, VmConfig, VmmRequest};
use husk_vmm::Outcome;
use std::time::Duration;

fn config(kernel: &str) -> VmConfig {
    let mut config = VmConfig::default();
    config.boot_source.kernel_image_path = kernel.into();
    config.machine_config.vcpu_count = 3;
    config
}

#[test]
fn a_paused_guest_says_nothing_and_goes_on_when_it_is_resumed() {
    let mut machine = Machine::boot(config(&payload("count", "")), LIMIT);
    for _ in 0..3 {
        machine.console_reaches(machine.console.bytes().len() + 100);
        machine.request(VmmRequest::Pause);
        assert!(machine.vmm.is_paused());
        let before = machine.console.bytes().len();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(machine.console.bytes().len(), before);
        // As it is already.
        machine.request(VmmRequest::Pause);
        assert_eq!(machine.console.bytes().len(), before);
        machine.request(VmmRequest::Resume);
        machine.request(VmmRequest::Resume);
        assert!(!machine.vmm.is_paused());
        machine.console_reaches(before + 100);
    }
}

#[test]
fn a_paused_guest_can_be_asked_for_all_else() {
    let mut machine = Machine::boot(config(&payload("count", "")), LIMIT);
    machine.expect("go\n");
    machine.request(VmmRequest::Pause);
    machine.request(VmmRequest::PressPowerButton);
    assert!(!machine.vmm.is_press_pending(), "it cannot look");
    for _ in 0..5 {
        assert!(!machine.vmm.look_for_halt());
    }
    let change = DeviceUpdate::Network {
        rx_rate_limiter: None,
        tx_rate_limiter: None,
        link_up: None,
    };
    let said = machine.refused(VmmRequest::Update("eth9".into(), change));
    assert!(said.contains("eth9"), "{said}");
    let said = machine.refused(VmmRequest::Boot);
    assert!(said.contains("already running"), "{said}");
    machine.request(VmmRequest::Resume);
    assert!(machine.vmm.is_press_pending());
    machine.request(VmmRequest::Pause);
    machine.request(VmmRequest::Stop);
    assert_eq!(machine.wait_for_end(), Outcome::Stopped);
    let (outcome, _) = machine.vmm.take_down().unwrap();
    assert_eq!(outcome, Outcome::Stopped);
    for request in [VmmRequest::Pause, VmmRequest::Resume] {
        let said = machine.refused(request);
        assert!(said.contains("not running"), "{said}");
    }
}

#[test]
fn a_paused_guest_is_taken_down() {
    let mut machine = Machine::boot(config(&payload("count", "")), LIMIT);
    machine.expect("go\n");
    machine.request(VmmRequest::Pause);
    drop(machine);
}

#[test]
fn the_machines_options_boot() {
    let mut config = config(&payload("end", "POWER_OFF"));
    config.machine_config.vcpu_count = 4;
    config.machine_config.smt = true;
    config.machine_config.track_dirty_pages = true;
    config.machine_config.huge_pages = HugePages::Transparent;
    let mut machine = Machine::boot(config, LIMIT);
    assert_eq!(machine.wait_for_end(), Outcome::PowerOff);
    assert_eq!(machine.console.text(), "go\n");
}
