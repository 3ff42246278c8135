//! What may be asked of a VM, in the test's own process.

use crate::common::machine::Machine;
use crate::common::{temp_dir, text};
use crate::{LIMIT, payload, run_bare};
use husk_config::{
    DeviceUpdate, Drive, HugePages, NetworkInterface, NewDevice, UserNetwork, VmConfig, VmmRequest,
};
use husk_vmm::{Outcome, Phase};
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
    assert!(said.contains("after starting"), "{said}");
    machine.request(VmmRequest::Resume);
    assert!(machine.vmm.is_press_pending());
    machine.request(VmmRequest::Pause);
    machine.request(VmmRequest::Stop);
    assert_eq!(machine.wait_for_end(), Outcome::Stopped);
    let outcome = machine.vmm.take_down().unwrap();
    assert_eq!(outcome, Outcome::Stopped);
    for request in [VmmRequest::Pause, VmmRequest::Resume] {
        let said = machine.refused(request);
        assert!(said.contains("before starting"), "{said}");
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

#[test]
fn ctrl_alt_del_goes_to_the_keyboard_where_a_driver_listens() {
    let mut config = config(&payload("keyboard", ""));
    config.keyboard = true;
    let mut machine = Machine::boot(config, LIMIT);
    machine.expect("up\n");
    machine.request(VmmRequest::SendCtrlAltDel);
    assert_eq!(machine.wait_for_end(), Outcome::Reset);
    let console = machine.console.text();
    let keys: Vec<u64> = console["up\n".len()..]
        .split_whitespace()
        .map(|key| u64::from_str_radix(key, 16).unwrap())
        .collect();
    // Ctrl, Alt and Del pressed and let go, in set 1.
    assert_eq!(keys, [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d]);
}

#[test]
fn ctrl_alt_del_presses_the_power_button_where_nobody_listens() {
    for keyboard in [false, true] {
        let mut config = config(&payload("count", ""));
        config.keyboard = keyboard;
        let mut machine = Machine::boot(config, LIMIT);
        machine.expect("go\n");
        assert!(!machine.vmm.is_press_pending());
        machine.request(VmmRequest::SendCtrlAltDel);
        assert!(machine.vmm.is_press_pending());
    }
}

#[test]
fn the_boot_timer_is_there_when_it_is_asked_for() {
    for there in [false, true] {
        let mut config = config(&payload("timer", ""));
        config.boot_timer = there;
        let mut machine = Machine::boot(config, LIMIT);
        assert_eq!(machine.wait_for_end(), Outcome::PowerOff);
        assert_eq!(machine.console.text(), "up\n");
        let reached = machine.timeline.reached();
        let marks = reached
            .iter()
            .filter(|reached| reached.phase == Phase::Mark(1));
        assert_eq!(marks.count(), usize::from(there));
    }
}

#[test]
fn devices_come_and_go_on_pci_alone() {
    let drive =
        |id: &str, path: &str| VmmRequest::Attach(Box::new(NewDevice::Drive(Drive::new(id, path))));
    let dir = temp_dir();
    let path = dir.path().join("image");
    std::fs::write(&path, [0; 4096]).unwrap();
    let mut machine = Machine::boot(config(&payload("count", "")), LIMIT);
    let said = machine.refused(drive("one", text(&path)));
    assert!(said.contains("one") && said.contains("--pci"), "{said}");
    assert!(machine.vmm.config().drives.is_empty());

    let mut config = config(&payload("count", ""));
    config.pci = true;
    let mut machine = Machine::boot(config, LIMIT);
    let said = machine.refused(drive("one", "/nonexistent"));
    assert!(said.contains("/nonexistent"), "{said}");
    assert!(machine.vmm.config().drives.is_empty());
    let said = machine.refused(VmmRequest::Detach("one".into()));
    assert!(said.contains("one"), "{said}");
    machine.request(drive("one", text(&path)));
    let said = machine.refused(drive("one", text(&path)));
    assert!(said.contains("twice"), "{said}");
    let mut user = NetworkInterface::new("net");
    user.user = Some(UserNetwork::default());
    let said = machine.refused(VmmRequest::Attach(Box::new(NewDevice::Network(user))));
    assert!(said.contains("net") && said.contains("tap"), "{said}");
    assert!(machine.vmm.config().network_interfaces.is_empty());
    // A guest that does not answer keeps it, asked as often as one likes.
    machine.request(VmmRequest::Detach("one".into()));
    machine.request(VmmRequest::Pause);
    machine.request(VmmRequest::Detach("one".into()));
    assert_eq!(machine.vmm.collect_ejected(), [""; 0]);
    assert_eq!(machine.vmm.config().drives.len(), 1);
    // Eight places are left for what comes.
    for index in 1..8 {
        let path = dir.path().join(format!("image{index}"));
        std::fs::write(&path, [0; 4096]).unwrap();
        machine.request(drive(&format!("d{index}"), text(&path)));
    }
    let other = dir.path().join("other");
    std::fs::write(&other, [0; 4096]).unwrap();
    let said = machine.refused(drive("more", text(&other)));
    assert!(
        said.contains("9 devices") && said.contains("for 8"),
        "{said}"
    );
    assert_eq!(machine.vmm.config().drives.len(), 8);
}

#[test]
fn the_boot_timers_line_is_in_the_log() {
    let dir = temp_dir();
    let config = dir.path().join("vm.json");
    let kernel = payload("timer", "");
    let content =
        format!(r#"{{"boot-source": {{"kernel_image_path": "{kernel}"}}, "boot-timer": true}}"#);
    std::fs::write(&config, content).unwrap();
    let ended = run_bare(&["--config", text(&config), "--log-level", "info"]);
    let said = &ended.expect_status(0).stderr;
    let line = said.lines().find(|line| line.contains("Guest-boot-time"));
    let line = line.unwrap_or_else(|| panic!("{said}"));
    let (_, numbers) = line.split_once("Guest-boot-time = ").unwrap();
    let words: Vec<&str> = numbers.split_whitespace().collect();
    assert_eq!(
        [words[1], words[3], words[5], words[6], words[8], words[9]],
        ["us", "ms,", "CPU", "us", "CPU", "ms"]
    );
    let (us, ms): (u64, u64) = (words[0].parse().unwrap(), words[2].parse().unwrap());
    assert!(us > 0 && us / 1000 == ms, "{line}");
}
