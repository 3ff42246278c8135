use super::*;
use proptest::prelude::*;

fn one(line: &str) -> Option<(String, u64, i64)> {
    let calls = parse(line);
    assert!(calls.len() <= 1, "{calls:?}");
    calls
        .into_iter()
        .next()
        .map(|call| (call.name, call.us, call.returned))
}

#[test]
fn lines_of_all_kernels_are_understood() {
    let acpi = Some(("acpi_init".to_owned(), 4021, 0));
    for line in [
        "[    0.123456] initcall acpi_init+0x0/0x5d0 returned 0 after 4021 usecs",
        "[    0.123456] initcall acpi_init+0x0/0x5d0 returned 0 after 4021 usecs \r",
        "[    0.123456][    T1] initcall acpi_init+0x0/0x5d0 returned 0 after 4021 usecs\r\n",
        "<7>[    0.123456] initcall acpi_init+0x0/0x5d0 returned 0 after 4021 usecs",
        "initcall acpi_init+0x0/0x5d0 returned 0 after 4021 usecs",
        "\rinitcall acpi_init returned 0 after 4021 usecs",
    ] {
        assert_eq!(one(line), acpi, "{line}");
    }
    let module = "[    1.5] initcall virtio_net_driver_init+0x0/0xff0 [virtio_net] returned -19 after 12 usecs";
    assert_eq!(
        one(module),
        Some(("virtio_net_driver_init [virtio_net]".into(), 12, -19))
    );
    let old = "initcall ide_init+0x0/0x7a returned 0 after 32 msecs";
    assert_eq!(one(old), Some(("ide_init".into(), 32_000, 0)));
    let lto = "initcall foo.llvm.123+0x0/0x1 returned 1 after 0 usecs";
    assert_eq!(one(lto), Some(("foo.llvm.123".into(), 0, 1)));
}

#[test]
fn what_only_looks_like_one_is_passed_over() {
    for line in [
        "[    0.1] calling  acpi_init+0x0/0x5d0 @ 1",
        "[    0.1] initcall acpi_init+0x0/0x5d0 blacklisted",
        "[    0.1] entering initcall level: device",
        "initcall acpi_init+0x0/0x5d0 returned with preemption imbalance ",
        "initcall  returned 0 after 1 usecs",
        "initcall a returned 0 after 1 usec",
        "initcall a returned 0 after -1 usecs",
        "initcall a returned +0 after 1 usecs",
        "initcall a returned 0 after 99999999999999999999 usecs",
        "initcall a returned 0 after 9223372036854775807 msecs",
        "initcall a returned - after 1 usecs",
        "initcall a returned 0 after  usecs",
        "initcall a\u{1b}[2J returned 0 after 1 usecs",
        "initcall a<script b returned 0 after 1 usecs",
        "\u{1b}[31m initcall a returned 0 after 1 usecs",
        "initcall a returned 0 after 1 usecs and more",
    ] {
        assert_eq!(one(line), None, "{line:?}");
    }
    let long = format!(
        "initcall {} returned 0 after 1 usecs",
        "a".repeat(MAX_NAME + 1)
    );
    assert_eq!(one(&long), None);
}

#[test]
fn the_slowest_come_first_and_there_are_not_too_many() {
    let text = "initcall a returned 0 after 5 usecs\ninitcall b returned 0 after 9 usecs\r\ninitcall c returned 0 after 5 usecs";
    let names: Vec<_> = parse(text).into_iter().map(|call| call.name).collect();
    assert_eq!(names, ["b", "a", "c"]);
    assert_eq!(
        parse(&"initcall a returned 0 after 5 usecs\n".repeat(MAX + 10)).len(),
        MAX
    );
}

proptest! {
    #[test]
    fn any_text_is_borne(text in "(\\PC|[\r\n\t]|initcall |\\+0x0/0x1| returned | after |[0-9]{1,25}| usecs|\\[|\\]){0,60}") {
        for call in parse(&text) {
            prop_assert!(!call.name.is_empty() && call.name.len() <= MAX_NAME);
            prop_assert!(call.name.bytes().all(|c| c.is_ascii_graphic() || c == b' '));
        }
    }

    #[test]
    fn what_a_kernel_prints_comes_back(
        name in "[a-z_][a-z0-9_.]{0,40}", module in proptest::option::of("[a-z][a-z0-9_]{0,10}"),
        us in 0..=i64::MAX as u64, returned: i32, time in "\\[ {1,4}[0-9]{1,4}\\.[0-9]{6}\\]", caller in "(\\[ {1,4}[TC][0-9]{1,5}\\])?",
    ) {
        let suffix = module.as_deref().map(|module| format!(" [{module}]")).unwrap_or_default();
        let line = format!("{time}{caller} initcall {name}+0x0/0x5d0{suffix} returned {returned} after {us} usecs\r\n");
        prop_assert_eq!(one(&line), Some((format!("{name}{suffix}"), us, returned.into())));
    }
}
