//! Configuration files, what the command line says of itself, and the log.

use crate::common::{husk, temp_dir, text};
use crate::{file, line_after, payload, run, run_bare};
use std::process::Command;

#[test]
fn a_configuration_file_is_enough_and_flags_override_it() {
    let dir = temp_dir();
    let initrd = file(&dir, "initrd", b"from the file");
    let content = format!(
        r#"{{"boot-source": {{"kernel_image_path": "{}", "initrd_path": "{}", "boot_args": "from=file"}},
            "machine-config": {{"vcpu_count": 2, "mem_size_mib": 48}}, "on-reboot": "restart"}}"#,
        payload("linux", ""),
        initrd.display()
    );
    let config = file(&dir, "vm.json", content.as_bytes());
    let found = |more: &[&str]| {
        let ended = run_bare(&[&["--config", text(&config)], more].concat());
        let console = ended.expect_status(0).console();
        let memory = console
            .lines()
            .find(|l| l.starts_with("e820 0000000000100000 "));
        let size = memory.and_then(|l| l.split(' ').nth(2)).unwrap();
        let size = u64::from_str_radix(size, 16).unwrap() + (1 << 20);
        let cpus = u64::from_str_radix(line_after(&console, "cpus ").trim(), 16).unwrap();
        let cmdline = line_after(&console, "cmdline ").to_owned();
        (size >> 20, cpus, cmdline, console)
    };
    let (memory, cpus, cmdline, console) = found(&[]);
    assert_eq!((memory, cpus, cmdline.as_str()), (48, 2, "from=file"));
    assert_eq!(line_after(&console, "initrd "), "from the file");

    let other = file(&dir, "other", b"from the flag");
    let (memory, cpus, cmdline, console) = found(&[
        "--cpus",
        "5",
        "--memory",
        "0064M",
        "--initrd",
        text(&other),
        "--cmdline",
        "from=flag",
    ]);
    assert_eq!((memory, cpus), (64, 5));
    assert!(cmdline.ends_with(" from=flag") && !cmdline.contains("from=file"));
    assert_eq!(line_after(&console, "initrd "), "from the flag");

    // One flag leaves the rest of the file as it is; a kernel may be overridden as well.
    assert_eq!(found(&["--cpus", "1"]).0, 48);
    let ended = run_bare(&[
        "--config",
        text(&config),
        "--kernel",
        &payload("end", "POWER_OFF"),
    ]);
    assert_eq!(ended.expect_status(0).console(), "go\n");
}

#[test]
fn help_version_completions_and_man_page() {
    let print = |arguments: &[&str]| {
        let output = husk().args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for arguments in [
        &["--help"][..],
        &["-h"],
        &["help"],
        &["run", "--help"],
        &["run", "-h"],
    ] {
        let help = print(arguments);
        assert!(help.contains("Usage: husk"), "{help}");
        assert!(help.contains("xit status"), "{help}");
    }
    let help = print(&["run", "--help"]);
    for word in [
        "--kernel",
        "--initrd",
        "--cmdline",
        "--cpus",
        "--memory",
        "--config",
        "Examples",
        "Ctrl-A x",
    ] {
        assert!(help.contains(word), "{word}: {help}");
    }
    let version = print(&["--version"]);
    assert_eq!(version, format!("husk {}\n", env!("CARGO_PKG_VERSION")));
    for shell in ["bash", "zsh", "fish"] {
        let script = print(&["completions", shell]);
        assert!(
            script.contains("husk") && script.contains("on-reboot"),
            "{shell}"
        );
    }
    let dir = temp_dir();
    let script = file(
        &dir,
        "husk.bash",
        print(&["completions", "bash"]).as_bytes(),
    );
    let status = Command::new("bash").arg("-n").arg(script).status().unwrap();
    assert!(status.success());
    let page = print(&["man"]);
    assert!(page.contains(".TH husk 1"), "{page}");
    assert!(page.contains(".SH SYNOPSIS"), "{page}");
}

#[test]
fn the_log_goes_to_stderr_or_its_file_and_never_to_the_console() {
    let dir = temp_dir();
    let kernel = payload("end", "TRIPLE_FAULT");
    let log = dir.path().join("log");
    let ended = run(&[
        "--kernel",
        &kernel,
        "--log-file",
        text(&log),
        "--log-level",
        "trace",
    ]);
    assert_eq!(ended.expect_status(4).console(), "go\n");
    assert_eq!(ended.stderr, "");
    let first = std::fs::read_to_string(&log).unwrap();
    assert!(first.contains("triple fault"), "{first}");
    // A second run adds to it.
    run(&["--kernel", &kernel, "--log-file", text(&log)]).expect_status(4);
    let both = std::fs::read_to_string(&log).unwrap();
    assert!(both.starts_with(&first) && both.len() > first.len());

    let ended = run(&["--kernel", &kernel, "--log-level", "trace"]);
    assert_eq!(ended.expect_status(4).console(), "go\n");
    assert!(ended.stderr.contains("triple fault"), "{}", ended.stderr);
    assert!(
        ended.stderr.lines().all(|l| l.starts_with("husk: ")),
        "{}",
        ended.stderr
    );
    let ended = run(&["--kernel", &kernel, "--log-level", "off"]);
    assert_eq!(ended.expect_status(4).stderr, "");
}

#[test]
fn the_timeline_has_every_phase_in_order() {
    let ended = run(&["--kernel", &payload("linux", ""), "--timeline"]);
    let timeline = ended.expect_status(0).stderr.clone();
    let lines: Vec<&str> = timeline.lines().collect();
    assert!(lines[0].starts_with("husk: timeline"), "{timeline}");
    let times: Vec<f64> = lines[1..]
        .iter()
        .map(|line| line.trim().split(' ').next().unwrap().parse().unwrap())
        .collect();
    assert!(times.is_sorted(), "{timeline}");
    for phase in [
        "VM created",
        "kernel loaded",
        "guest entered",
        "first guest exit",
        "guest ended",
    ] {
        assert!(timeline.contains(phase), "{phase}: {timeline}");
    }
    assert!(ended.console().ends_with("end\n"));
}
