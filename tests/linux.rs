//! End to end: real Linux kernels in the real binary, where KVM runs Linux: `cargo xtask test` finds or emulates such a
//! host, and sets the variables that name the kernels.

mod common;

use common::guest::{Guest, Kernel, LIMIT, busybox, default_guest, md5};
use common::{Tty, Vm, assert_same_bytes, husk, pattern, temp_dir, text};
use rustix::process::Signal;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Each test once for each kernel.
macro_rules! with_each_kernel {
    ($($test:ident)*) => {
        mod debian { $(#[test] fn $test() { super::$test(&super::Kernel::debian()); })* }
        mod minimal { $(#[test] fn $test() { super::$test(&super::Kernel::minimal()); })* }
    };
}

with_each_kernel! {
    boots_with_any_number_of_processors_and_any_memory
    ends_have_their_exit_status
    a_reboot_restarts_the_guest_in_the_same_process
    a_signal_shuts_the_guest_down_cleanly
    a_signal_before_the_guest_can_see_it_is_not_lost
    a_second_signal_ends_a_guest_that_does_not_listen
    a_shell_takes_commands_from_a_pipe
    a_shell_works_on_a_terminal
    pastes_and_floods_are_whole_and_in_order
    a_large_initrd_arrives_whole
}

// ---- Boots ----

/// One boot: which file, by which protocol, with what.
struct Boot {
    image: PathBuf,
    protocol: &'static str,
    cpus: usize,
    mib: u64,
    acpi: bool,
}

fn boots_with_any_number_of_processors_and_any_memory(kernel: &Kernel) {
    let boot = |image: &PathBuf, protocol, cpus, mib, acpi| Boot {
        image: image.clone(),
        protocol,
        cpus,
        mib,
        acpi,
    };
    let image = &kernel.image;
    let other = kernel.bzimage.as_ref().unwrap_or(image);
    for boot in [
        boot(image, "auto", 1, kernel.least_mib, true),
        boot(image, "linux", 2, 256, true),
        boot(other, "auto", 4, 3584, true),
        boot(image, "pvh", 1, 6144, true),
        boot(other, "pvh", 4, 256, true),
        boot(
            image,
            "linux",
            if kernel.mp_table { 2 } else { 1 },
            256,
            false,
        ),
    ] {
        check_boot(kernel, &boot);
    }
}

/// What the guest says of itself, one `name=value` a line.
const FACTS: &str = r#"
dmesg -n 1
cpuinfo() { sed -n "s/^$1[[:space:]]*: //p" /proc/cpuinfo | tr '\n' ' '; }
echo "nproc=$(nproc)"
echo "online=$(cat /sys/devices/system/cpu/online)"
echo "apicids=$(cpuinfo apicid)"
echo "siblings=$(cpuinfo siblings)"
echo "cores=$(cpuinfo 'cpu cores')"
echo "MemTotal=$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo)"
echo "date=$(date +%s)"
echo "clocksource=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "loader=$(cat /proc/sys/kernel/bootloader_type)"
echo "cmdline=$(cat /proc/cmdline)"
echo "acpi=$(ls -d /sys/firmware/acpi 2>/dev/null)"
echo "serial=$(sed -n 's/.*ttyS0.*/yes/p' /proc/interrupts)"
echo "trouble:"
dmesg | grep -viE 'command line|stall warnings suppressed' | grep -iE 'BUG:|Oops|WARNING:|stall|lockup|Firmware Bug|ACPI.*(Error|Warning)|MP-BIOS|IO-APIC.*(not|fail)|call trace|unable to|tsc.*unstable|ttyS0.*overrun|spurious'
echo "trouble ends"
"#;

fn check_boot(kernel: &Kernel, boot: &Boot) {
    let name = format!(
        "{} by {}, {} vCPUs, {} MiB, acpi {}",
        boot.image.display(),
        boot.protocol,
        boot.cpus,
        boot.mib,
        boot.acpi
    );
    eprintln!("--- {name}");
    let guest = Guest::new(kernel, Some(FACTS));
    let cpus = boot.cpus.to_string();
    let memory = boot.mib.to_string();
    // On an emulated host that is short of time, Linux would complain of its own slowness.
    let patient = "quiet nowatchdog rcupdate.rcu_cpu_stall_suppress=1";
    let cmdline = match boot.acpi {
        true => patient.to_owned(),
        false => format!("{patient} acpi=off"),
    };
    let mut command = guest.command();
    command
        .args([
            "--kernel",
            text(&boot.image),
            "--boot-protocol",
            boot.protocol,
        ])
        .args(["--cpus", &cpus, "--memory", &memory, "--cmdline", &cmdline]);
    let ended = Vm::start(&mut command, LIMIT).finish();
    let console = ended.expect_status(0).console();
    let fact = |key: &str| {
        let line = console
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let value =
            line.unwrap_or_else(|| panic!("{name}: no {key} from the guest\n{}", ended.report()));
        value.trim().to_owned()
    };
    let number = |key: &str| -> u64 { fact(key).parse().unwrap() };
    let all = |value: &str| vec![value; boot.cpus].join(" ");

    assert_eq!(fact("nproc"), cpus, "{name}");
    let online = match boot.cpus {
        1 => "0".to_owned(),
        more => format!("0-{}", more - 1),
    };
    assert_eq!(fact("online"), online, "{name}");
    let ids: Vec<String> = (0..boot.cpus).map(|id| id.to_string()).collect();
    assert_eq!(fact("apicids"), ids.join(" "), "{name}");
    // One package, one thread a core. Without ACPI and with one processor Linux may not look.
    assert_eq!(fact("siblings"), all(&cpus), "{name}");
    assert_eq!(fact("cores"), all(&cpus), "{name}");

    // The kernel's own code and data, and its page structures, are not in MemTotal.
    let total = number("MemTotal") / 1024;
    let least = boot.mib - boot.mib / 24 - 44;
    assert!(
        (least..=boot.mib).contains(&total),
        "{name}: MemTotal is {total} MiB"
    );

    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(
        now.abs_diff(number("date")) < 60,
        "{name}: {} at {now}",
        fact("date")
    );
    assert_eq!(fact("clocksource"), "kvm-clock", "{name}");
    // type_of_loader: Husk has no number; Linux's own PVH entry gives 0xb0.
    let pvh = boot.protocol == "pvh" || (boot.protocol == "auto" && !is_bzimage(&boot.image));
    assert_eq!(number("loader"), if pvh { 0xb0 } else { 0xff }, "{name}");
    assert!(
        fact("cmdline").ends_with(&cmdline),
        "{name}: {}",
        fact("cmdline")
    );
    assert_eq!(fact("acpi").is_empty(), !boot.acpi, "{name}");
    assert_eq!(
        fact("serial"),
        "yes",
        "{name}: no interrupt for the serial port"
    );
    assert_no_trouble(&name, &console);
    if boot.acpi {
        assert!(
            console.contains("reboot: Power down"),
            "{name}\n{}",
            ended.report()
        );
    }
    assert_eq!(ended.stderr, "", "{name}");
}

fn is_bzimage(image: &Path) -> bool {
    let mut head = [0; 4];
    std::io::Read::read_exact(&mut std::fs::File::open(image).unwrap(), &mut head).unwrap();
    &head != b"\x7fELF"
}

/// QEMU's software emulation describes its AVX-512 and PKRU state in a way that Linux warns of, and no other warning is
/// tolerated.
fn assert_no_trouble(name: &str, console: &str) {
    let lines = console
        .lines()
        .skip_while(|line| *line != "trouble:")
        .skip(1);
    let mut lines = lines.take_while(|line| *line != "trouble ends").peekable();
    while let Some(line) = lines.next() {
        if line.contains("WARNING:") && line.contains("arch/x86/kernel/fpu/xstate.c") {
            lines.next_if(|line| line.to_lowercase().contains("call trace"));
            continue;
        }
        panic!("{name}: the guest's kernel complains: {line}");
    }
}

// ---- Ends ----

fn ends_have_their_exit_status(kernel: &Kernel) {
    let reboot = "reboot -f; sleep 100";
    for (name, cmdline, script, status, said) in [
        ("reboot", "quiet", reboot, 0, "reboot: Restarting system"),
        (
            "halt by reboot=acpi",
            "quiet reboot=acpi",
            reboot,
            0,
            "reboot: Restarting system",
        ),
        (
            "reboot by triple fault",
            "quiet reboot=t",
            reboot,
            4,
            "reboot: Restarting system",
        ),
        (
            "halt",
            "quiet",
            "halt -f; sleep 100",
            0,
            "reboot: System halted",
        ),
        (
            "power-off without ACPI",
            "quiet acpi=off",
            "poweroff -f; sleep 100",
            0,
            "ystem halted",
        ),
        (
            "no /init",
            "quiet rdinit=/nosuch",
            "",
            3,
            "Kernel panic - not syncing",
        ),
        ("panic", "quiet", "", 3, "Kernel panic - not syncing"),
    ] {
        eprintln!("--- {name}");
        let mut guest = Guest::new(kernel, Some(script));
        if name == "panic" {
            // The first process ends: that needs no driver.
            guest = guest.with_file(
                "init",
                "#!/bin/sh\nbusybox mount -t proc proc /proc\necho c >/proc/sysrq-trigger\nexit 7\n",
            );
        }
        let ended = guest.run(&["--cmdline", cmdline, "--cpus", "2"]);
        ended.expect_status(status);
        let console = ended.console();
        assert!(
            console.contains(said),
            "{name}: no {said:?}\n{}",
            ended.report()
        );
        assert!(
            !ended.stderr.contains("internal error"),
            "{name}\n{}",
            ended.stderr
        );
    }
}

fn a_reboot_restarts_the_guest_in_the_same_process(kernel: &Kernel) {
    let script = "dmesg -n 1; echo \"up $(cut -d. -f1 /proc/uptime)\"; read -r what; echo \"told to $what\"; $what -f; sleep 100";
    let guest = Guest::new(kernel, Some(script));
    let mut vm = guest.start(&[
        "--on-reboot",
        "restart",
        "--cmdline",
        "quiet",
        "--cpus",
        "2",
    ]);
    for what in ["reboot", "reboot", "poweroff"] {
        vm.expect("up ");
        vm.send(format!("{what}\n").as_bytes());
        vm.expect(&format!("told to {what}"));
    }
    vm.wait().expect_status(0);
}

fn a_signal_shuts_the_guest_down_cleanly(kernel: &Kernel) {
    let guest = Guest::new(kernel, Some("echo guest is up; sleep 1000"));
    let mut vm = guest.start(&["--cmdline", "quiet"]);
    vm.expect("guest is up");
    vm.signal(Signal::TERM);
    vm.expect("reboot: Power down");
    let ended = vm.wait();
    assert_eq!(ended.expect_status(0).stderr, "");
}

fn a_signal_before_the_guest_can_see_it_is_not_lost(kernel: &Kernel) {
    let guest = Guest::new(kernel, Some("echo guest is up; sleep 1000"));
    let mut vm = guest.start(&["--cmdline", "earlyprintk=ttyS0"]);
    vm.expect("Linux version");
    vm.signal(Signal::INT);
    vm.expect("reboot: Power down");
    vm.wait().expect_status(0);
}

fn a_second_signal_ends_a_guest_that_does_not_listen(kernel: &Kernel) {
    let guest = Guest::new(kernel, Some("killall acpid; echo guest is up; sleep 1000"));
    let mut vm = guest.start(&["--cmdline", "quiet", "--log-level", "info", "--cpus", "2"]);
    vm.expect("guest is up");
    vm.signal(Signal::TERM);
    vm.expect_stderr("power button is pressed");
    vm.signal(Signal::TERM);
    vm.wait().expect_status(143);
}

// ---- The console ----

fn a_shell_takes_commands_from_a_pipe(kernel: &Kernel) {
    // Nothing but the pipe: the default guest, as it is given to a newcomer.
    let mut command = default_guest(kernel);
    let mut vm = Vm::start(command.arg("run"), LIMIT);
    vm.send(b"echo $((6 * 7)) from a pipe; cat /proc/sys/kernel/ostype\nexit\n");
    let ended = vm.finish();
    let console = ended.expect_status(0).console();
    for said in [
        "\nHello from Husk: ",
        "\n42 from a pipe\nLinux\n",
        "reboot: Power down",
    ] {
        assert!(console.contains(said), "no {said:?}\n{}", ended.report());
    }
    // It says what it took.
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    assert!(
        ended.stderr.contains(text(&kernel.image)),
        "{}",
        ended.stderr
    );
    assert!(ended.stderr.contains(text(&busybox())), "{}", ended.stderr);
}

fn a_shell_works_on_a_terminal(kernel: &Kernel) {
    let guest = Guest::new(kernel, None);
    let tty = Tty::new();
    let initrd = guest.initrd();
    let mut vm = tty.start(
        &[
            "run",
            "--kernel",
            text(&kernel.image),
            "--initrd",
            text(&initrd),
            "--cmdline",
            "quiet",
        ],
        LIMIT,
    );
    vm.expect("Hello from Husk");
    vm.expect("# ");
    tty.send(b"echo one$((1+1))three\r");
    // Echoed as it was typed, then answered.
    vm.expect("echo one$((1+1))three\r\n");
    vm.expect("one2three\r\n");
    vm.expect("# ");
    // Ctrl-C is the guest's, once its shell has handed its terminal to a program.
    tty.send(b"echo bu''sy; sleep 1000; echo slept\r");
    vm.expect("\r\nbusy\r\n");
    tty.send(b"\x03");
    vm.expect("^C");
    vm.expect("# ");
    // Editing a line.
    tty.send(b"echo wronh\x08g; exit\r");
    vm.expect("\r\nwrong\r\n");
    vm.wait().expect_status(0);
    tty.assert_as_found();
}

fn pastes_and_floods_are_whole_and_in_order(kernel: &Kernel) {
    let script = "
dmesg -n 1
stty raw -echo crtscts
echo ready
read -r paste lines
echo paste
head -c $paste | md5sum
seq 1 $lines
echo flooded
";
    let guest = Guest::new(kernel, Some(script));
    let start = Instant::now();
    let mut vm = guest.start(&["--cmdline", "quiet"]);
    vm.expect("ready\n");
    // An emulated host takes 100 to 500 µs for a byte, another about 5.
    let (bytes, lines) = match start.elapsed().as_millis() {
        0..1000 => (1 << 20, 150_000),
        _ => (64 << 10, 4_000),
    };
    eprintln!("{bytes} bytes in, {lines} lines out");
    vm.send(format!("{bytes} {lines}\n").as_bytes());
    vm.expect("paste\n");
    let paste = pattern(bytes);
    let sum = md5(&paste);
    let mut stdin = vm.take_stdin();
    let sending = std::thread::spawn(move || stdin.write_all(&paste).map(|()| stdin).unwrap());
    vm.expect("  -\n");
    let stdin = sending.join().unwrap();
    let ended = vm.wait();
    drop(stdin);
    ended.expect_status(0);
    // Exactly the kernel's and the script's bytes: raw, the guest's terminal changes nothing.
    let console = String::from_utf8_lossy(&ended.stdout);
    let (_, behind) = console.split_once("paste\n").unwrap();
    let (got, flood) = behind.split_once("  -\n").unwrap();
    assert_eq!(got, sum, "the paste has changed on its way");
    let (flood, _) = flood
        .split_once("flooded\n")
        .unwrap_or_else(|| panic!("no end of the flood\n{}", ended.report()));
    let wanted: String = (1..=lines).map(|n| format!("{n}\n")).collect();
    assert_same_bytes("the flood", flood.as_bytes(), wanted.as_bytes());
}

fn a_large_initrd_arrives_whole(kernel: &Kernel) {
    let large = pattern(100_000_000);
    let sum = md5(&large);
    let mut guest = Guest::new(kernel, Some("dmesg -n 1; md5sum /large"));
    guest.builder.files.push(("large".into(), large, 0o644));
    let ended = guest.run(&["--cmdline", "quiet", "--memory", "512M"]);
    let console = ended.expect_status(0).console();
    assert!(
        console.contains(&format!("{sum}  /large")),
        "{}",
        ended.report()
    );
}

// ---- Errors that need a real kernel ----

#[test]
fn a_truncated_or_damaged_bzimage_is_refused() {
    let dir = temp_dir();
    let whole = std::fs::read(Kernel::debian().image).unwrap();
    let path = dir.path().join("vmlinuz");
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let cache = temp_dir();
        let mut command = husk();
        command
            .args(["run", "--kernel", text(&path)])
            .env("HUSK_CACHE", cache.path());
        let ended = Vm::start(&mut command, LIMIT).finish();
        ended.expect_status(2);
        let said = &ended.stderr;
        assert!(
            said.starts_with("husk: ") && said.contains(text(&path)),
            "{said}"
        );
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
        assert!(
            !said.contains("panicked") && !said.contains("internal error"),
            "{said}"
        );
        assert!(ended.stdout.is_empty());
        let left: Vec<_> = std::fs::read_dir(cache.path()).unwrap().collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    };
    for length in [
        100,
        512,
        514,
        1024,
        4096,
        20_000,
        whole.len() / 2,
        whole.len() * 9 / 10,
    ] {
        refused(&whole[..length]);
    }
    // Some formats (lz4) have no checksum: small damage is not always seen, this is.
    let mut damaged = whole.clone();
    damaged[whole.len() / 2..][..256 << 10].fill(0);
    refused(&damaged);
}
