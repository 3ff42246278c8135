use super::*;

const BASE: u64 = layout::ACPI;

fn slots(count: u32) -> Vec<MmioSlot> {
    (0..count)
        .map(|index| MmioSlot {
            address: layout::VIRTIO_MMIO + u64::from(index) * layout::VIRTIO_MMIO_SIZE,
            size: layout::VIRTIO_MMIO_SIZE,
            irq: layout::VIRTIO_IRQ + index,
        })
        .collect()
}

fn build(cpus: u32, virtio_mmio: &[MmioSlot]) -> Vec<u8> {
    let config = AcpiConfig {
        cpus,
        virtio_mmio,
        pci: false,
        hotplug_slots: 0,
        keyboard: false,
    };
    tables(&config, BASE).unwrap()
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn le(bytes: &[u8], at: usize, size: usize) -> u64 {
    bytes[at..at + size]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The table at a guest-physical address, its checksum verified.
fn table_at(image: &[u8], address: u64) -> &[u8] {
    assert!(address.is_multiple_of(8));
    let table = &image[(address - BASE) as usize..];
    let table = &table[..le(table, 4, 4) as usize];
    assert_eq!(sum(table), 0, "{}", String::from_utf8_lossy(&table[..4]));
    table
}

/// FADT, MADT and DSDT, found as a guest would.
fn follow(image: &[u8]) -> [&[u8]; 3] {
    assert_eq!(&image[..8], b"RSD PTR ");
    assert_eq!(image[15], 2, "revision");
    assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
    let xsdt = table_at(image, le(image, 24, 8));
    assert_eq!(&xsdt[..4], b"XSDT");
    assert_eq!(xsdt.len(), 36 + 2 * 8);
    let fadt = table_at(image, le(xsdt, 36, 8));
    let madt = table_at(image, le(xsdt, 44, 8));
    let dsdt = table_at(image, le(fadt, 140, 8));
    assert_eq!(
        [&fadt[..4], &madt[..4], &dsdt[..4]],
        [b"FACP", b"APIC", b"DSDT"]
    );
    [fadt, madt, dsdt]
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn the_tables_of_a_small_vm_fit_a_page_and_those_of_the_largest_their_place() {
    assert!(build(4, &slots(8)).len() <= 4096);
    let largest = build(layout::MAX_CPUS, &slots(18));
    assert!(largest.len() as u64 <= layout::ACPI_SIZE);
    follow(&largest);
}

#[test]
fn the_fadt_gives_sleep_and_reset_registers_and_no_fixed_hardware() {
    let image = build(1, &[]);
    let [fadt, _, _] = follow(&image);
    assert_eq!((fadt.len(), fadt[8]), (276, 6), "FADT of revision 6");
    let flags = le(fadt, 112, 4);
    for (bit, name) in [
        (0, "WBINVD"),
        (4, "PWR"),
        (5, "SLP"),
        (10, "RESET"),
        (20, "HW"),
    ] {
        assert_ne!(flags & 1 << bit, 0, "{name}");
    }
    assert_eq!(
        le(fadt, 109, 2),
        0b10_0100,
        "no VGA, no CMOS clock, no 8042"
    );
    // System I/O, 8 bits wide from bit 0, byte access.
    let register = |port: u16| [&[1, 8, 0, 1][..], &u64::from(port).to_le_bytes()].concat();
    assert_eq!(fadt[116..128], register(layout::RESET_PORT));
    assert_eq!(fadt[128], layout::RESET_VALUE);
    assert_eq!(fadt[244..256], register(layout::SLEEP_CONTROL_PORT));
    assert_eq!(fadt[256..268], register(layout::SLEEP_STATUS_PORT));
    assert!(
        fadt[148..244].iter().all(|byte| *byte == 0),
        "no fixed hardware"
    );
    assert_eq!(&fadt[268..276], b"HUSK\0\0\0\0");
}

#[test]
fn the_madt_lists_every_processor_and_the_io_apic() {
    for cpus in [1, 2, 64] {
        let image = build(cpus, &[]);
        let [_, madt, _] = follow(&image);
        assert_eq!(le(madt, 36, 4), layout::LOCAL_APIC);
        let mut rest = &madt[44..];
        let mut processors = 0;
        while rest[0] == 0 {
            let id = processors as u8;
            assert_eq!(rest[..8], [0, 8, id, id, 1, 0, 0, 0]);
            rest = &rest[8..];
            processors += 1;
        }
        assert_eq!(processors, cpus);
        assert_eq!(rest[..2], [1, 12]);
        assert_eq!(le(rest, 4, 4), layout::IO_APIC);
        assert_eq!(le(rest, 8, 4), 0, "GSI base");
        assert_eq!(rest.len(), 12, "nothing else");
    }
}

#[test]
fn the_dsdt_has_a_device_for_each_slot_and_no_other() {
    let image = build(1, &slots(3));
    let [_, _, dsdt] = follow(&image);
    for (index, slot) in slots(3).iter().enumerate() {
        assert!(contains(dsdt, format!("V{index:03X}").as_bytes()));
        let mut memory = vec![0x86, 9, 0, 1];
        memory.extend((slot.address as u32).to_le_bytes());
        memory.extend((slot.size as u32).to_le_bytes());
        assert!(contains(dsdt, &memory), "Memory32Fixed of slot {index}");
        // Consumer, edge, active high, exclusive.
        let interrupt = [0x89, 6, 0, 3, 1, slot.irq as u8, 0, 0, 0];
        assert!(contains(dsdt, &interrupt), "interrupt of slot {index}");
    }
    let devices = dsdt
        .windows(8)
        .filter(|window| window == b"LNRO0005")
        .count();
    assert_eq!(devices, 3);
    assert!(!contains(&build(1, &[]), b"LNRO0005"));
}

#[test]
fn registers_above_4_gib_are_described_in_64_bits() {
    let slot = MmioSlot {
        address: 0x12_0000_0000,
        size: 0x1000,
        irq: 6,
    };
    let image = build(1, &[slot]);
    let [_, _, dsdt] = follow(&image);
    let mut range = slot.address.to_le_bytes().to_vec();
    range.extend((slot.address + 0xfff).to_le_bytes());
    assert!(contains(dsdt, &range));
}

#[test]
fn the_dsdt_has_what_a_guest_needs_to_power_off_and_to_hear_the_power_button() {
    let image = build(1, &[]);
    let [_, _, dsdt] = follow(&image);
    // Name (\_S5, Package () {5, 0, 0, 0})
    assert!(contains(
        dsdt,
        b"\x08\\_S5_\x12\x07\x04\x0a\x05\x00\x00\x00"
    ));
    // Notify (\_SB.PWRB, 0x80)
    assert!(contains(dsdt, b"\x86\\\x2e_SB_PWRB\x0a\x80"));
    for id in [
        &b"ACPI0013"[..],
        b"QEMU0001",
        b"\x41\xd0\x05\x01",
        b"\x41\xd0\x0c\x0c",
    ] {
        assert!(contains(dsdt, id), "{id:02x?}");
    }
    let ged = [0x89, 6, 0, 3, 1, layout::EVENTS_IRQ as u8, 0, 0, 0];
    assert!(contains(dsdt, &ged));
}

#[test]
fn a_guest_finds_the_generation_id_and_is_told_of_a_new_one() {
    let image = build(1, &[]);
    let [_, _, dsdt] = follow(&image);
    // Name (ADDR, Package () {low, high})
    let mut address = b"\x08ADDR\x12\x08\x02\x0c".to_vec();
    address.extend((layout::GENERATION_ID as u32).to_le_bytes());
    address.push(0);
    for part in [
        &b"\x08_HID\x0dVMGENCTR\0"[..],
        b"\x08_CID\x0dVM_Gen_Counter\0",
        b"\x08_DDN\x0dVM_Gen_Counter\0",
        &address,
        // Notify (\_SB.VGEN, 0x80)
        b"\x86\\\x2e_SB_VGEN\x0a\x80",
    ] {
        assert!(contains(dsdt, part), "{part:02x?}");
    }
    // 8-byte aligned, in memory that is there and that no guest takes for its own.
    assert!(layout::GENERATION_ID.is_multiple_of(8));
    for (range, kind) in crate::memory_map::e820(32 << 20) {
        let inside = range.start <= layout::GENERATION_ID && layout::GENERATION_ID < range.end();
        assert_eq!(inside, kind == crate::memory_map::TYPE_RESERVED);
    }
}

#[test]
fn with_pci_there_are_a_host_bridge_its_window_and_ecam_which_is_reserved() {
    let config = AcpiConfig {
        cpus: 1,
        virtio_mmio: &[],
        pci: true,
        hotplug_slots: 0,
        keyboard: false,
    };
    let image = tables(&config, BASE).unwrap();
    let xsdt = table_at(&image, le(&image, 24, 8));
    assert_eq!(xsdt.len(), 36 + 3 * 8);
    let mcfg = table_at(&image, le(xsdt, 52, 8));
    assert_eq!((&mcfg[..4], mcfg[8], mcfg.len()), (&b"MCFG"[..], 1, 60));
    assert_eq!(mcfg[36..44], [0; 8]);
    assert_eq!(le(mcfg, 44, 8), layout::PCI_ECAM);
    assert_eq!(mcfg[52..60], [0; 8], "segment 0, bus 0 to 0");

    let fadt = table_at(&image, le(xsdt, 36, 8));
    let dsdt = table_at(&image, le(fadt, 140, 8));
    // Memory32Fixed, writable.
    let mut ecam = vec![0x86, 9, 0, 1];
    ecam.extend((layout::PCI_ECAM as u32).to_le_bytes());
    ecam.extend((layout::PCI_ECAM_SIZE as u32).to_le_bytes());
    // Word address space: bus numbers, produced, both ends fixed; 0 to 0, one of them.
    let buses = [0x88, 13, 0, 2, 0xc, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    // Dword address space: memory, produced, both ends fixed, writable; no translation.
    let mut window = vec![0x87, 23, 0, 0, 0xc, 1, 0, 0, 0, 0];
    window.extend((layout::PCI_WINDOW as u32).to_le_bytes());
    window.extend(((layout::PCI_WINDOW + layout::PCI_WINDOW_SIZE - 1) as u32).to_le_bytes());
    window.extend([0; 4]);
    window.extend((layout::PCI_WINDOW_SIZE as u32).to_le_bytes());
    for part in [&ecam[..], &buses, &window] {
        assert!(contains(dsdt, part), "{part:02x?}");
    }
    // EISA IDs of PNP0A08, PNP0A03 and PNP0C02.
    for id in [0x080a_d041_u32, 0x030a_d041, 0x020c_d041] {
        assert!(contains(dsdt, &id.to_le_bytes()), "{id:#x}");
        assert!(!contains(&build(1, &[]), &id.to_le_bytes()));
    }
    assert!(!contains(&build(1, &[]), b"MCFG"));
    let most = AcpiConfig {
        cpus: layout::MAX_CPUS,
        virtio_mmio: &slots(18),
        pci: true,
        hotplug_slots: 0,
        keyboard: false,
    };
    tables(&most, BASE).unwrap();
}

#[test]
fn slots_that_cannot_work_are_refused() {
    let refused = |slots: &[MmioSlot]| {
        tables(
            &AcpiConfig {
                cpus: 1,
                virtio_mmio: slots,
                pci: false,
                hotplug_slots: 0,
                keyboard: false,
            },
            BASE,
        )
        .unwrap_err()
    };
    let good = slots(1)[0];
    for irq in [0, layout::COM1_IRQ, layout::EVENTS_IRQ, 24, 32, u32::MAX] {
        let error = refused(&[MmioSlot { irq, ..good }]);
        assert_eq!(error, Error::SlotIrq { slot: 0, irq });
    }
    assert_eq!(
        refused(&[good, good]),
        Error::SlotIrq {
            slot: 1,
            irq: good.irq
        }
    );
    for (address, size) in [(0x1000, 0), (u64::MAX, 2), (2, u64::MAX)] {
        let error = refused(&[MmioSlot {
            address,
            size,
            ..good
        }]);
        assert_eq!(
            error,
            Error::SlotRange {
                slot: 0,
                address,
                size
            }
        );
    }
    let text = refused(&[good, good]).to_string();
    assert!(
        !text.contains("  ") && !text.contains('\n'),
        "one clean line: {text}"
    );
}

#[test]
fn a_processor_number_or_base_that_does_not_fit_is_refused() {
    for cpus in [0, 65, 256, u32::MAX] {
        let config = AcpiConfig {
            cpus,
            virtio_mmio: &[],
            pci: false,
            hotplug_slots: 0,
            keyboard: false,
        };
        assert_eq!(tables(&config, BASE), Err(Error::Cpus(cpus)));
    }
    let config = AcpiConfig {
        cpus: 1,
        virtio_mmio: &[],
        pci: false,
        hotplug_slots: 0,
        keyboard: false,
    };
    for base in [BASE + 8, 0xffff_fff0, u64::MAX] {
        assert_eq!(tables(&config, base), Err(Error::Base(base)));
    }
}

#[test]
fn a_keyboard_is_announced_only_where_there_is_one() {
    let config = AcpiConfig {
        cpus: 1,
        virtio_mmio: &[],
        pci: false,
        hotplug_slots: 0,
        keyboard: true,
    };
    let image = tables(&config, BASE).unwrap();
    let [fadt, _, dsdt] = follow(&image);
    assert_eq!(le(fadt, 109, 2), 0b10_0110, "an 8042");
    // PNP0303, ports 0x60 and 0x64, line 1.
    let id = 0x0303_d041_u32.to_le_bytes();
    let port = |port: u8| [0x47, 1, port, 0, port, 0, 0, 1];
    let line = [0x89, 6, 0, 3, 1, 1, 0, 0, 0];
    for part in [&id[..], &port(0x60), &port(0x64), &line] {
        assert!(contains(dsdt, part), "{part:02x?}");
    }
    assert!(!contains(&build(1, &[]), &id));
}

#[test]
fn with_pci_each_slot_can_be_filled_and_emptied() {
    let config = AcpiConfig {
        cpus: 1,
        virtio_mmio: &[],
        pci: true,
        hotplug_slots: 31,
        keyboard: false,
    };
    let image = tables(&config, BASE).unwrap();
    for slot in 1..32u32 {
        let name = format!("S{slot:03X}");
        // Device, then Name (_ADR, slot << 16).
        let mut device = name.clone().into_bytes();
        device.extend(b"\x08_ADR\x0c");
        device.extend((slot << 16).to_le_bytes());
        assert!(contains(&image, &device), "{name}");
        // Notify (name, Arg1)
        let notify = [b"\x86", name.as_bytes(), b"\x69"].concat();
        assert!(contains(&image, &notify), "{name}");
    }
    assert!(!contains(&image, b"S000") && !contains(&image, b"S020"));
    for part in [
        &b"_EJ0"[..],
        b"TELLCAME\x01",
        b"TELLGOES\x0a\x03",
        b"_SB_PCI0LOOK",
    ] {
        assert!(contains(&image, part), "{}", String::from_utf8_lossy(part));
        assert!(!contains(&build(1, &[]), part));
    }
    // As many as there are to be, and none for a guest that nobody can give a device.
    for count in [0, 3] {
        let fewer = AcpiConfig {
            hotplug_slots: count,
            ..config
        };
        let image = tables(&fewer, BASE).unwrap();
        assert_eq!(contains(&image, b"S003"), count == 3);
        assert!(!contains(&image, b"S004"));
        assert_eq!(contains(&image, b"LOOK"), count > 0);
    }
}
