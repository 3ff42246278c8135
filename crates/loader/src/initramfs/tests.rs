use std::collections::BTreeMap;
use std::io::{Read, Seek};

use super::*;
use crate::Compression;
use crate::testing::{Part, elf, load, pack, write};

/// Names, modes and contents of an archive, read back independently of the writer.
fn entries(mut data: &[u8]) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut entries = BTreeMap::new();
    loop {
        let field = |index: usize| {
            let text = std::str::from_utf8(&data[6 + 8 * index..14 + 8 * index]).unwrap();
            u32::from_str_radix(text, 16).unwrap()
        };
        assert_eq!(&data[..6], b"070701");
        let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
        let name = String::from_utf8(data[110..110 + name_size - 1].to_vec()).unwrap();
        let start = (110 + name_size).next_multiple_of(4);
        if name == "TRAILER!!!" {
            return entries;
        }
        entries.insert(name, (mode, data[start..start + size].to_vec()));
        data = &data[(start + size).next_multiple_of(4)..];
    }
}

struct Fixture {
    directory: tempfile::TempDir,
    builder: Builder,
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let busybox = elf(0x1000, &[load(0x1000, b"busybox", 16)]);
    let builder = Builder::new(write(directory.path(), "busybox", &busybox));
    Fixture { directory, builder }
}

/// A module tree with the four ways that a module file can be packed.
fn modules(fixture: &mut Fixture) {
    let root = fixture.directory.path().join("modules");
    std::fs::create_dir_all(root.join("kernel")).unwrap();
    write(&root, "kernel/button.ko", b"button");
    write(
        &root,
        "kernel/evdev.ko.xz",
        &pack(Compression::Xz, b"evdev"),
    );
    write(
        &root,
        "kernel/pvpanic-mmio.ko.zst",
        &pack(Compression::Zstd, b"mmio"),
    );
    write(
        &root,
        "kernel/pvpanic.ko.gz",
        &pack(Compression::Gzip, b"pvpanic"),
    );
    write(
        &root,
        "modules.dep",
        b"kernel/button.ko:\nkernel/evdev.ko.xz:\n\
        kernel/pvpanic-mmio.ko.zst: kernel/pvpanic.ko.gz\nkernel/pvpanic.ko.gz:\n",
    );
    fixture.builder.modules_dir = Some(root);
}

#[test]
fn the_default_guest_has_what_it_needs_to_start() {
    let entries = entries(&fixture().builder.build().unwrap());
    assert_eq!(entries["init"].0, 0o100_755);
    assert!(entries["init"].1.starts_with(b"#!/bin/sh\n"));
    assert_eq!(entries["bin/sh"], (0o120_777, b"busybox".to_vec()));
    assert_eq!(entries["bin/busybox"].0, 0o100_755);
    assert_eq!(entries["dev/console"].0, 0o020_600);
    assert_eq!(entries["etc/husk/console"].0, 0o100_755);
    assert_eq!(entries["etc/acpi/PWRF/00000080"].0, 0o100_755);
    assert_eq!(entries["proc"].0, 0o040_755);
    assert!(!entries.contains_key("script"));
}

#[test]
fn script_and_files_are_added_with_their_directories() {
    let mut builder = fixture().builder;
    let directory = tempfile::tempdir().unwrap();
    builder.busybox = write(
        directory.path(),
        "busybox",
        &elf(0x1000, &[load(0x1000, b"busybox", 16)]),
    );
    builder.script = Some("echo hi\n".to_owned());
    builder.files = vec![("/opt/a/b".to_owned(), b"data".to_vec(), 0o640)];
    let entries = entries(&builder.build().unwrap());
    assert_eq!(entries["script"].1, b"echo hi\n");
    assert_eq!(entries["opt/a/b"], (0o100_640, b"data".to_vec()));
    assert_eq!(entries["opt/a"].0, 0o040_755);
    builder.files = vec![("../escape".to_owned(), Vec::new(), 0o644)];
    assert!(matches!(builder.build(), Err(Error::Name { .. })));
}

#[test]
fn modules_are_unpacked_and_listed_after_what_they_need() {
    let mut fixture = fixture();
    modules(&mut fixture);
    let entries = entries(&fixture.builder.build().unwrap());
    assert_eq!(
        entries["etc/modules"].1,
        b"button\nevdev\npvpanic\npvpanic_mmio\n"
    );
    for (name, data) in [
        ("button", "button"),
        ("evdev", "evdev"),
        ("pvpanic", "pvpanic"),
        ("pvpanic_mmio", "mmio"),
    ] {
        assert_eq!(
            entries[&format!("lib/modules/husk/{name}.ko")].1,
            data.as_bytes()
        );
    }
}

#[test]
fn chains_load_from_the_last_and_each_module_once() {
    let mut fixture = fixture();
    let root = fixture.directory.path().to_owned();
    for name in ["a-a", "b", "c"] {
        write(&root, &format!("{name}.ko"), name.as_bytes());
    }
    write(
        &root,
        "modules.dep",
        b"a-a.ko: b.ko c.ko\nb.ko: c.ko\nc.ko:\n",
    );
    fixture.builder.modules_dir = Some(root);
    fixture.builder.modules = ["b", "a_a", "c"].map(str::to_owned).to_vec();
    let entries = entries(&fixture.builder.build().unwrap());
    assert_eq!(entries["etc/modules"].1, b"c\nb\na_a\n");
}

#[test]
fn modules_that_are_missing_built_in_damaged_or_outside_are_left_out() {
    let mut fixture = fixture();
    modules(&mut fixture);
    let root = fixture.builder.modules_dir.clone().unwrap();
    write(&root, "kernel/evdev.ko.xz", b"\xfd7zXZ\0 damaged");
    write(fixture.directory.path(), "outside.ko", b"outside");
    let dep = std::fs::read_to_string(root.join("modules.dep")).unwrap();
    let dep = format!("{dep}../outside.ko:\n/etc/passwd.ko:\nnot a line\n");
    write(&root, "modules.dep", dep.as_bytes());
    write(&root, "modules.builtin", b"kernel/virtio.ko\n");
    fixture.builder.modules = ["evdev", "outside", "passwd", "virtio", "none", "button"]
        .map(str::to_owned)
        .to_vec();
    let entries = entries(&fixture.builder.build().unwrap());
    assert_eq!(entries["etc/modules"].1, b"button\n");
    fixture.builder.modules_dir = None;
    fixture.builder.kernel_release = Some("../../etc".to_owned());
    assert!(fixture.builder.build().is_ok());
}

#[test]
fn a_busybox_that_cannot_run_alone_is_refused() {
    let mut fixture = fixture();
    let interpreter = Part {
        kind: 3,
        physical: 0,
        virtual_: 0,
        data: b"/lib/ld.so\0".to_vec(),
        memory: 11,
    };
    let cases = [
        (
            elf(0x1000, &[load(0x1000, b"x", 1), interpreter]),
            "dynamically linked",
        ),
        (b"#!/bin/sh\n".to_vec(), "not an x86-64 ELF program"),
        (b"\x7fELF\x01".to_vec(), "not an x86-64 ELF program"),
        (b"\x7fELF\x02".to_vec(), "truncated"),
        (Vec::new(), "empty"),
    ];
    for (data, expected) in cases {
        write(fixture.directory.path(), "busybox", &data);
        let message = fixture.builder.build().unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    fixture.builder.busybox = fixture.directory.path().join("none");
    assert!(matches!(
        fixture.builder.build(),
        Err(Error::NotFound { .. })
    ));
}

#[test]
fn equal_inputs_give_equal_bytes_and_the_cache_keeps_inputs_apart() {
    let mut fixture = fixture();
    modules(&mut fixture);
    let cache = Cache::new(fixture.directory.path().join("cache"));
    let read = |builder: &Builder| {
        let mut file = builder.open(&cache).unwrap();
        let mut data = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut data).unwrap();
        data
    };
    let plain = fixture.builder.build().unwrap();
    assert_eq!(plain, fixture.builder.build().unwrap());
    assert_eq!(
        (read(&fixture.builder), read(&fixture.builder)),
        (plain.clone(), plain.clone())
    );
    fixture.builder.script = Some("true".to_owned());
    assert_eq!(read(&fixture.builder), fixture.builder.build().unwrap());
    assert_ne!(read(&fixture.builder), plain);
}

#[test]
fn an_unpacked_package_without_modules_dep_serves_as_well() {
    let mut fixture = fixture();
    let root = fixture.directory.path().to_owned();
    let module = |depends: &str| format!("\0author=x\0depends={depends}\0name=y\0");
    // A circle, which no kernel has, must end all the same.
    write(&root, "evdev.ko", module("").as_bytes());
    write(&root, "c.ko", module("a-a").as_bytes());
    write(
        &root,
        "b.ko.xz",
        &pack(Compression::Xz, module("c").as_bytes()),
    );
    write(&root, "a-a.ko", module("b,c,none").as_bytes());
    write(
        &root,
        "modules.order",
        b"a-a.ko\nb.ko\nc.ko\nevdev.ko\ngone.ko\n../out.ko\n",
    );
    fixture.builder.modules_dir = Some(root);
    fixture.builder.modules = ["evdev", "a_a", "b", "gone", "out"]
        .map(str::to_owned)
        .to_vec();
    let entries = entries(&fixture.builder.build().unwrap());
    assert_eq!(entries["etc/modules"].1, b"evdev\nc\nb\na_a\n");
}
