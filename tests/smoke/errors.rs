//! What Husk refuses, and how: one line that names the thing, an exit status, and nothing left behind.

use crate::common::{Ended, Vm, pattern, temp_dir, text, wrapped};
use crate::{LIMIT, file, line_after, payload, run};
use std::fs::File;
use std::process::Command;

#[test]
fn a_kernel_that_is_none_is_refused() {
    let dir = temp_dir();
    let good = std::fs::read(payload("linux", "")).unwrap();
    let mut elf32 = good.clone();
    elf32[4] = 1;
    let mut arm = good.clone();
    arm[18..20].copy_from_slice(&183u16.to_le_bytes());
    let mut object = good.clone();
    object[16] = 1;
    let script =
        b"#!/bin/sh\necho this is no kernel, though it is long enough to be one\n".repeat(99);
    let plain = file(&dir, "text", &script);
    let packed = Command::new("gzip")
        .arg("-c")
        .arg(&plain)
        .output()
        .unwrap()
        .stdout;
    let directory = dir.path().join("directory");
    std::fs::create_dir(&directory).unwrap();
    for (path, word) in [
        (dir.path().join("missing"), "does not exist"),
        (plain.join("below-a-file"), ""),
        (directory, "directory"),
        (file(&dir, "empty", b""), "empty"),
        (plain, "not a kernel"),
        (file(&dir, "text.gz", &packed), ""),
        (file(&dir, "zeros", &[0; 100_000]), "not a kernel"),
        (file(&dir, "elf32", &elf32), "32-bit"),
        (file(&dir, "arm64", &arm), "183"),
        (file(&dir, "object", &object), "executable"),
        ("/dev/null".into(), "regular"),
    ] {
        Refused::by(&["--kernel", text(&path)]).with(2, &[text(&path), word]);
    }
    Refused::by(&["--kernel", ""]).with(2, &["kernel"]);
}

#[test]
fn a_truncated_kernel_is_refused() {
    let dir = temp_dir();
    let whole = std::fs::read(payload("linux", "")).unwrap();
    // The end of what is loaded; behind it are only names for debuggers.
    let end = program_headers(&whole)
        .iter()
        .map(|&(offset, size)| offset + size)
        .max()
        .unwrap();
    let few = [
        1, 2, 3, 4, 5, 15, 16, 17, 18, 19, 20, 24, 32, 52, 63, 64, 65, 100, 119, 120, 200,
    ];
    let many = (1..8).map(|part| end * part / 8);
    for length in few.into_iter().chain(many).chain([end - 1]) {
        let path = file(&dir, &format!("cut-{length}"), &whole[..length]);
        Refused::by(&["--kernel", text(&path)]).with(2, &[text(&path)]);
    }
    let path = file(&dir, "cut-behind", &whole[..end]);
    run(&["--kernel", text(&path)]).expect_status(0);
}

#[test]
fn a_kernel_that_does_not_fit_memory_is_refused() {
    let dir = temp_dir();
    for (name, address, size) in [
        ("large", 0x100_0000, 64 << 20),
        ("huge", 0x100_0000, 1 << 40),
        ("behind", 0x1000_0000, 4096),
        ("across-the-end", (64 << 20) - 4096, 8192),
        ("in-the-hole", 0xd000_0000, 4096),
        ("above-4g", 0x1_0000_0000, 4096),
        ("below-1m", 0x9_0000, 4096),
        ("at-zero", 0, 4096),
        ("beyond-everything", u64::MAX - 4095, 4096),
    ] {
        let path = file(&dir, name, &small_elf(address, size));
        Refused::by(&["--kernel", text(&path), "--memory", "64M"]).with(2, &[text(&path)]);
    }
    let path = file(&dir, "good", &small_elf(0x100_0000, 4096));
    run(&["--kernel", text(&path), "--memory", "64M"]).expect_status(0);
}

#[test]
fn an_unreadable_file_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = temp_dir();
    let kernel = payload("linux", "");
    let secret = dir.path().join("secret");
    std::fs::copy(&kernel, &secret).unwrap();
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o000)).unwrap();
    let secret = text(&secret);
    // For root, too, once the right to read everything is given up.
    let without = if rustix::process::geteuid().is_root() {
        &["setpriv", "--inh-caps=-all", "--bounding-set=-all"][..]
    } else {
        &[]
    };
    let refused = |arguments: &[&str]| Refused::wrapped(without, arguments);
    refused(&["--kernel", secret]).with(2, &[secret]);
    refused(&["--kernel", &kernel, "--initrd", secret]).with(2, &[secret]);
    refused(&["--config", secret]).with(2, &[secret]);
}

#[test]
fn an_initrd_that_cannot_be_used_is_refused() {
    let dir = temp_dir();
    let kernel = payload("linux", "");
    let large = dir.path().join("large");
    File::create(&large).unwrap().set_len(64 << 20).unwrap();
    let endless = dir.path().join("endless");
    File::create(&endless).unwrap().set_len(1 << 43).unwrap();
    for (path, word) in [
        (dir.path().join("missing"), ""),
        (dir.path().to_path_buf(), "directory"),
        (file(&dir, "empty", b""), "empty"),
        ("/dev/null".into(), "empty"),
        (large, "--memory"),
        (endless, "--memory"),
        ("/dev/zero".into(), "--memory"),
    ] {
        let arguments = [
            "--kernel",
            &kernel,
            "--initrd",
            text(&path),
            "--memory",
            "64M",
        ];
        Refused::by(&arguments).with(2, &[text(&path), word]);
    }
}

#[test]
fn values_out_of_range_are_refused() {
    let kernel = payload("linux", "");
    let more_than_the_host = format!("{}M", host_memory_mib() + 1);
    let long = "x".repeat(2048);
    let refused = |arguments: &[&str]| Refused::by(&[&["--kernel", &kernel], arguments].concat());
    for (value, word) in [
        ("0", "0 MiB"),
        ("1M", "1 MiB"),
        ("31", "31 MiB"),
        ("16777216G", ""),
        ("18446744073709551615T", "18446744073709551615T"),
        (&more_than_the_host, ""),
        ("abc", "abc"),
        ("1.5G", "1.5G"),
        ("", "memory"),
        ("-5", ""),
    ] {
        refused(&["--memory", value]).with(2, &[word]);
    }
    for value in ["0", "65", "4294967295"] {
        refused(&["--cpus", value]).with(2, &[value, "--cpus"]);
    }
    refused(&["--cpus", "-1"]).with(2, &["-1"]);
    refused(&["--cpus", "many"]).with(2, &["many"]);
    refused(&["--cpus", "4294967296"]).with(2, &["4294967296"]);
    refused(&["--no-default-cmdline", "--cmdline", &long]).with(2, &["2048"]);
    refused(&["--cmdline", &long]).with(2, &["command line"]);
}

#[test]
fn wrong_flags_are_refused() {
    let kernel = payload("linux", "");
    let refused = |arguments: &[&str]| Refused::by(&[&["--kernel", &kernel], arguments].concat());
    refused(&["--no-such-flag"]).with(2, &["--no-such-flag"]);
    refused(&["stray"]).with(2, &["stray"]);
    refused(&["--boot-protocol", "efi"]).with(2, &["efi"]);
    refused(&["--on-reboot", "maybe"]).with(2, &["maybe"]);
    refused(&["--log-level", "loud"]).with(2, &["loud"]);
    Refused::by(&["--kernel"]).with(2, &["--kernel"]);
}

#[test]
fn a_configuration_file_that_is_wrong_is_refused() {
    let dir = temp_dir();
    let deep = format!("{}{}", "[".repeat(50_000), "]".repeat(50_000));
    let nested = format!("{{\"boot-source\":{}", "{\"a\":".repeat(50_000));
    let kernel = payload("linux", "");
    let with = |rest: &str| format!("{{\"boot-source\":{{\"kernel_image_path\":\"{kernel}\"{rest}");
    for (name, content, word) in [
        ("text", "vcpus = 2", ""),
        ("nothing", "", ""),
        ("half", "{\"boot-source\":", ""),
        ("twice", "{} {}", ""),
        ("list", "[]", ""),
        ("unknown", "{\"boot-sauce\":{}}", "boot-sauce"),
        ("inner", &with(",\"kernel\":1}}"), "kernel"),
        (
            "type",
            &with("},\"machine-config\":{\"vcpu_count\":\"2\",\"mem_size_mib\":64}}"),
            "",
        ),
        (
            "negative",
            &with("},\"machine-config\":{\"vcpu_count\":-1,\"mem_size_mib\":64}}"),
            "",
        ),
        (
            "fraction",
            &with("},\"machine-config\":{\"vcpu_count\":1.5,\"mem_size_mib\":64}}"),
            "",
        ),
        (
            "large",
            &with("},\"machine-config\":{\"vcpu_count\":1e30,\"mem_size_mib\":64}}"),
            "",
        ),
        ("deep", &deep, ""),
        ("nested", &nested, ""),
    ] {
        let path = file(&dir, name, content.as_bytes());
        Refused::by(&["--config", text(&path)]).with(2, &[text(&path), word]);
    }
    for (name, content, word) in [
        ("nul", with(",\"boot_args\":\"a\\u0000b\"}}"), "NUL"),
        (
            "cpus",
            with("},\"machine-config\":{\"vcpu_count\":65,\"mem_size_mib\":64}}"),
            "65",
        ),
        (
            "memory",
            with("},\"machine-config\":{\"vcpu_count\":1,\"mem_size_mib\":0}}"),
            "0 MiB",
        ),
        (
            "args",
            with(&format!(",\"boot_args\":\"{}\"}}}}", "x".repeat(2048))),
            "2048",
        ),
        (
            "metadata",
            with("},\"mmds-config\":{\"network_interfaces\":[\"eth7\"]}}"),
            "eth7",
        ),
    ] {
        let path = file(&dir, name, content.as_bytes());
        Refused::by(&["--config", text(&path)]).with(2, &[word]);
    }
    let missing = dir.path().join("missing");
    Refused::by(&["--config", text(&missing)]).with(2, &[text(&missing)]);
    Refused::by(&["--config", text(dir.path())]).with(2, &[text(dir.path())]);
    let bytes = file(&dir, "bytes", &pattern(5000));
    Refused::by(&["--config", text(&bytes)]).with(2, &[text(&bytes)]);
    Refused::by(&["--config", "/dev/zero"]).with(2, &["/dev/zero"]);
}

#[test]
fn a_host_without_kvm_or_permission_for_it_is_named() {
    let kernel = payload("linux", "");
    let dir = temp_dir();
    let locked = file(&dir, "locked", b"");
    std::fs::set_permissions(&locked, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
    // A mount namespace of its own, in a user namespace of its own where this is not root.
    let unshare = match rustix::process::geteuid().is_root() {
        true => vec!["unshare", "--mount"],
        false => vec!["unshare", "--mount", "--map-root-user"],
    };
    let no_device = "mount -t tmpfs none /dev && exec \"$@\"";
    let no_permission = format!(
        "mount --bind '{}' /dev/kvm && exec setpriv --inh-caps=-all --bounding-set=-all \"$@\"",
        locked.display()
    );
    for (script, word) in [(no_device, "there is no"), (&no_permission, "permission")] {
        let wrapper = [&unshare[..], &["sh", "-c", script, "sh"]].concat();
        Refused::wrapped(&wrapper, &["--kernel", &kernel]).with(1, &["/dev/kvm", word]);
    }
}

#[test]
fn a_log_file_that_cannot_be_written_is_refused() {
    let dir = temp_dir();
    let kernel = payload("linux", "");
    for path in [
        dir.path().join("no/such/directory"),
        dir.path().to_path_buf(),
    ] {
        Refused::by(&["--kernel", &kernel, "--log-file", text(&path)]).with(2, &[text(&path)]);
    }
}

#[test]
fn a_device_that_cannot_be_is_refused() {
    let kernel = payload("linux", "");
    let dir = temp_dir();
    let folder = text(dir.path());
    for (arguments, named) in [
        (&["--disk", "/nonexistent/disk"][..], "/nonexistent/disk"),
        (&["--disk", folder], folder),
        (&["--disk", "/dev/null"], "/dev/null"),
        (&["--disk", "x,readonly"], "readonly"),
        (&["--disk", "x,id=a", "--disk", "y,id=a"], "twice"),
        (&["--net", "tap=nosuch"], "ip tuntap add"),
        (&["--net", "tap=a,mac=01:00:00:00:00:00"], "guest_mac"),
        (&["--net", "fd=77"], "77"),
        (&["-p", "80:80"], "--net user"),
        (&["--vsock", "cid=2,uds=v"], "guest_cid 2"),
        (&["--vsock", "cid=3,uds=/nonexistent/v"], "/nonexistent/v"),
        (&["--balloon", "lots"], "lots"),
        (&["--entropy", "rate=fast"], "fast"),
        (&["--metadata", "/nonexistent/json"], "/nonexistent/json"),
    ] {
        let arguments = [&["--kernel", kernel.as_str()], arguments].concat();
        Refused::by(&arguments).with(2, &[named]);
    }
}

// ---- Help ----

/// A Husk that is to refuse to start.
pub struct Refused {
    ended: Ended,
    arguments: String,
    cache: tempfile::TempDir,
    temporary: tempfile::TempDir,
}

impl Refused {
    /// Run it with `arguments`.
    pub fn by(arguments: &[&str]) -> Self {
        Self::wrapped(&[], arguments)
    }

    fn wrapped(wrapper: &[&str], arguments: &[&str]) -> Self {
        let (cache, temporary) = (temp_dir(), temp_dir());
        let mut command = wrapped(wrapper);
        command
            .arg("run")
            .args(arguments)
            .env("HUSK_CACHE", cache.path())
            .env("TMPDIR", temporary.path());
        let mut shown = format!("{arguments:?}");
        shown.truncate(300);
        Self {
            ended: Vm::start(&mut command, LIMIT).finish(),
            arguments: shown,
            cache,
            temporary,
        }
    }

    /// It has refused as every refusal must look: its exit status, one line on stderr that has all of `words` in it,
    /// nothing on the console and nothing left behind.
    #[track_caller]
    pub fn with(self, status: i32, words: &[&str]) {
        let Self {
            ended, arguments, ..
        } = &self;
        assert!(
            ended.status.code() == Some(status),
            "{arguments}: ended with {} instead of exit status {status}\n{}",
            ended.status,
            ended.report()
        );
        let said = &ended.stderr;
        assert!(said.starts_with("husk: "), "{arguments}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{arguments}: {said}");
        for word in words {
            assert!(said.contains(word), "{arguments}: no {word:?} in {said}");
        }
        assert!(!said.contains("panicked"), "{arguments}: {said}");
        assert!(!said.contains("internal error"), "{arguments}: {said}");
        assert!(ended.stdout.is_empty(), "{arguments}: {}", ended.console());
        for dir in [&self.cache, &self.temporary] {
            let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
            assert!(left.is_empty(), "{arguments}: left behind: {left:?}");
        }
    }
}

/// Place in the file, offset and length, of each of an ELF file's loadable segments.
fn program_headers(elf: &[u8]) -> Vec<(usize, usize)> {
    let number = |at: usize, size: usize| {
        elf[at..at + size]
            .iter()
            .rev()
            .fold(0usize, |n, &b| n << 8 | usize::from(b))
    };
    let table = number(32, 8);
    (0..number(56, 2))
        .map(|index| table + index * 56)
        .filter(|&header| number(header, 4) == 1)
        .map(|header| (number(header + 8, 8), number(header + 32, 8)))
        .collect()
}

/// An ELF kernel of one segment that takes `size` bytes of memory at `address`, and powers off.
fn small_elf(address: u64, size: u64) -> Vec<u8> {
    // mov dx, 0x600; mov al, 0x34; out dx, al; hlt; jmp to the hlt
    let code = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd];
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend(2u16.to_le_bytes()); // ET_EXEC
    elf.extend(62u16.to_le_bytes()); // EM_X86_64
    elf.extend(1u32.to_le_bytes());
    elf.extend(address.to_le_bytes()); // e_entry
    elf.extend(64u64.to_le_bytes()); // e_phoff
    elf.resize(52, 0);
    for half in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes()); // PT_LOAD
    elf.extend(7u32.to_le_bytes());
    for word in [120, address, address, code.len() as u64, size, 1] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// Memory and swap, which is what Husk compares with.
fn host_memory_mib() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kib = |name: &str| -> u64 {
        let line = line_after(&info, name);
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    (kib("MemTotal:") + kib("SwapTotal:")) / 1024
}
