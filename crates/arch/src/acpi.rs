//! Hardware-reduced ACPI tables (ACPI 6.5): RSDP, XSDT, FADT, MADT, DSDT.
//!
//! Hardware-reduced means that there is no fixed hardware: no PM timer, no SCI, no fixed power
//! button. Linux then leaves the 8254 timer and the 8259 alone as well. What takes their place: the
//! sleep and reset registers of the FADT, and a Generic Event Device for the power button.

use acpi_tables::aml::{self, Path};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::layout;

/// What the tables describe, beside what every VM has.
#[derive(Debug, Clone, Copy)]
pub struct AcpiConfig<'a> {
    /// Number of vCPUs, 1 to [`layout::MAX_CPUS`]. The local APIC id of a vCPU is its index.
    pub cpus: u32,
    /// The virtio-mmio slots that have a device; the index is the `_UID`.
    pub virtio_mmio: &'a [MmioSlot],
}

/// Registers and interrupt line of a device on virtio-mmio.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioSlot {
    /// Guest-physical address of the registers.
    pub address: u64,
    /// Size of the registers in bytes, not 0.
    pub size: u64,
    /// GSI, edge-triggered and active high: [`layout::VIRTIO_IRQ`] up to, not including,
    /// [`layout::IO_APIC_PINS`].
    pub irq: u32,
}

/// Why there are no ACPI tables.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The number of vCPUs is outside 1 to [`layout::MAX_CPUS`].
    #[error("ACPI tables for {0} vCPUs: give 1 to {max}", max = layout::MAX_CPUS)]
    Cpus(u32),
    /// The RSDP has to be 16-byte aligned, with [`layout::ACPI_SIZE`] bytes of address space.
    #[error("ACPI tables at {0:#x}: place them at a 16-byte aligned address below 4 GiB")]
    Base(u64),
    /// The registers of a slot are empty or wrap around the end of the address space.
    #[error(
        "virtio-mmio slot {slot} has {size:#x} bytes at {address:#x}: give it a size, and an \
         address at which it fits"
    )]
    SlotRange {
        /// Index of the slot.
        slot: usize,
        /// Its address.
        address: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The interrupt line of a slot does not exist or is another device's.
    #[error(
        "virtio-mmio slot {slot} has interrupt line {irq}: use one of {first} to {last} that no \
         other device has",
        first = layout::VIRTIO_IRQ, last = layout::IO_APIC_PINS - 1
    )]
    SlotIrq {
        /// Index of the slot.
        slot: usize,
        /// Its interrupt line.
        irq: u32,
    },
    /// The tables do not fit their place.
    #[error("ACPI tables have {0} bytes, {max} fit: use fewer devices", max = layout::ACPI_SIZE)]
    TooLarge(usize),
}

const OEM_ID: [u8; 6] = *b"HUSK  ";
const OEM_TABLE_ID: [u8; 8] = *b"HUSKVM  ";
const OEM_REVISION: u32 = 1;
const HYPERVISOR_VENDOR: u64 = u64::from_le_bytes(*b"HUSK\0\0\0\0");

/// Size of a table header in bytes (5.2.6).
const HEADER_SIZE: u32 = 36;
/// RSDP size in bytes since ACPI 2.0 (5.2.5.3).
const RSDP_SIZE: usize = 36;

/// IAPC_BOOT_ARCH (5.2.9.3): do not probe for VGA.
const NO_VGA: u16 = 1 << 2;
/// IAPC_BOOT_ARCH: there is no CMOS real-time clock.
const NO_CMOS_RTC: u16 = 1 << 5;

/// Revision of the MADT in ACPI 6.5.
const MADT_REVISION: u8 = 6;
/// MADT flag: there are two 8259 as well, which the guest must mask (5.2.12). KVM's in-kernel
/// interrupt chip has them.
const PCAT_COMPAT: u32 = 1;
/// What KVM's I/O APIC has in its identification register after a reset.
const IO_APIC_ID: u8 = 0;

/// Revision of the DSDT: integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// `_STA`: present, enabled, shown, working.
const STA_WORKING: u8 = 0xf;
/// Notification of a control-method button: it was pressed (4.8.2.2.1.2).
const NOTIFY_BUTTON_PRESSED: u8 = 0x80;

// One byte of a local APIC entry holds the id; 255 is the broadcast id.
const _: () = assert!(layout::MAX_CPUS < 255);

/// The bytes of all ACPI tables, to be written at guest-physical address `base`, at which the RSDP
/// begins. They are contiguous: for a few vCPUs and devices one 4 KiB page holds them all.
///
/// There is no PCI, and there are no processor devices (`ACPI0007`): Linux takes the processors from
/// the MADT and would use the devices for C-states, P-states and hotplug only, none of which exists.
///
/// # Errors
/// A value in `config` is outside its range, `base` is not 16-byte aligned below 4 GiB, or the
/// tables need more than [`layout::ACPI_SIZE`] bytes.
pub fn tables(config: &AcpiConfig<'_>, base: u64) -> Result<Vec<u8>, Error> {
    let cpus = match u8::try_from(config.cpus) {
        Ok(cpus @ 1..) if u32::from(cpus) <= layout::MAX_CPUS => cpus,
        _ => return Err(Error::Cpus(config.cpus)),
    };
    if !base.is_multiple_of(16) || base > u64::from(u32::MAX) - layout::ACPI_SIZE {
        return Err(Error::Base(base));
    }

    let mut image = Image {
        base,
        bytes: vec![0; RSDP_SIZE],
    };
    let dsdt = image.add(dsdt(config.virtio_mmio)?.as_slice());
    let fadt = image.add(&bytes_of(&fadt(dsdt)));
    let madt = image.add(madt(cpus).as_slice());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = image.add(&bytes_of(&xsdt));

    let mut bytes = image.bytes;
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    bytes.splice(..RSDP_SIZE, rsdp);
    if bytes.len() as u64 > layout::ACPI_SIZE {
        return Err(Error::TooLarge(bytes.len()));
    }
    Ok(bytes)
}

/// The tables so far, as they will be in guest memory.
struct Image {
    base: u64,
    bytes: Vec<u8>,
}

impl Image {
    /// Adds a table, 8-byte aligned, and says at which guest-physical address.
    fn add(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let address = self.base + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

fn bytes_of(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

/// A one-byte register on an I/O port.
fn io_register(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}

/// 5.2.9. The `PwrButton` and `SlpButton` flags say that there is *no fixed* button.
fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::TmrValExt);
    // The 8042 bit stays clear, although a write to its port does reset the machine: announced, it
    // would be probed, at a cost of milliseconds.
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = io_register(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = io_register(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = io_register(layout::SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = HYPERVISOR_VENDOR.into();
    fadt.finalize()
}

/// 5.2.12. No interrupt source override: the only ISA interrupts in use are edge-triggered, active
/// high, and on the pin of their number.
fn madt(cpus: u8) -> Sdt {
    let mut body = Vec::new();
    body.dword(layout::LOCAL_APIC as u32);
    body.dword(PCAT_COMPAT);
    for id in 0..cpus {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    IoApic::new(IO_APIC_ID, layout::IO_APIC as u32, 0).to_aml_bytes(&mut body);
    table(b"APIC", MADT_REVISION, &body)
}

fn dsdt(virtio_mmio: &[MmioSlot]) -> Result<Sdt, Error> {
    let mut devices = Vec::new();
    com1(&mut devices);
    power_button(&mut devices);
    generic_event_device(&mut devices);
    pvpanic(&mut devices);
    let mut lines_taken = 0;
    for (index, slot) in virtio_mmio.iter().enumerate() {
        check_line(index, slot, &mut lines_taken)?;
        virtio_mmio_device(&mut devices, index, slot)?;
    }
    let mut body = aml::Scope::raw("\\_SB_".into(), devices);
    // Only the first element counts with hardware-reduced ACPI; some parsers want to see all four.
    let [s5, zero] = [layout::SLEEP_TYPE_S5, 0];
    let s5 = aml::Package::new(vec![&s5, &zero, &zero, &zero]);
    aml::Name::new("\\_S5_".into(), &s5).to_aml_bytes(&mut body);
    Ok(table(b"DSDT", DSDT_REVISION, &body))
}

fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let (oem, oem_table) = (OEM_ID, OEM_TABLE_ID);
    let mut table = Sdt::new(
        *signature,
        HEADER_SIZE,
        revision,
        oem,
        oem_table,
        OEM_REVISION,
    );
    table.append_slice(body);
    table
}

fn hid(id: &dyn Aml) -> aml::Name {
    aml::Name::new("_HID".into(), id)
}

fn resources(list: Vec<&dyn Aml>) -> aml::Name {
    aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(list))
}

/// An exclusive, edge-triggered, active high line that the device consumes.
fn interrupt(line: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, line)
}

fn com1(out: &mut Vec<u8>) {
    // A block of 8 ports.
    let ports = aml::IO::new(
        layout::COM1_PORT,
        layout::COM1_PORT,
        0,
        layout::COM1_PORTS as u8,
    );
    let irq = interrupt(layout::COM1_IRQ);
    aml::Device::new(
        "COM1".into(),
        vec![
            &hid(&aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &resources(vec![&ports, &irq]),
        ],
    )
    .to_aml_bytes(out);
}

/// Control-method power button (4.8.2.2.1.2).
fn power_button(out: &mut Vec<u8>) {
    let id = aml::EISAName::new("PNP0C0C");
    aml::Device::new("PWRB".into(), vec![&hid(&id)]).to_aml_bytes(out);
}

/// Generic Event Device (5.6.9). `_EVT` reads the events register once, as reading clears it.
fn generic_event_device(out: &mut Vec<u8>) {
    let irq = interrupt(layout::EVENTS_IRQ);
    let region = aml::OpRegion::new(
        "EVRG".into(),
        aml::OpRegionSpace::SystemIO,
        &layout::EVENTS_PORT,
        &aml::ONE,
    );
    let field = aml::Field::new(
        "EVRG".into(),
        aml::FieldAccessType::Byte,
        aml::FieldLockRule::NoLock,
        aml::FieldUpdateRule::Preserve,
        vec![aml::FieldEntry::Named(*b"EVTS", 8)],
    );
    let events = aml::Local(0);
    let register = Path::new("EVTS");
    let read = aml::Store::new(&events, &register);
    let pressed = aml::And::new(&aml::ZERO, &events, &layout::EVENT_POWER_BUTTON);
    let button = Path::new("\\_SB_.PWRB");
    let notify = aml::Notify::new(&button, &NOTIFY_BUTTON_PRESSED);
    let handle = aml::If::new(&pressed, vec![&notify]);
    let method = aml::Method::new("_EVT".into(), 1, true, vec![&read, &handle]);
    aml::Device::new(
        "GED_".into(),
        vec![
            &hid(&"ACPI0013"),
            &resources(vec![&irq]),
            &region,
            &field,
            &method,
        ],
    )
    .to_aml_bytes(out);
}

fn pvpanic(out: &mut Vec<u8>) {
    let port = aml::IO::new(layout::PVPANIC_PORT, layout::PVPANIC_PORT, 0, 1);
    aml::Device::new(
        "PEVT".into(),
        vec![
            &hid(&"QEMU0001"),
            &aml::Name::new("_STA".into(), &STA_WORKING),
            &resources(vec![&port]),
        ],
    )
    .to_aml_bytes(out);
}

/// Lines are exclusive, so this also bounds the number of slots to the number of lines.
fn check_line(slot: usize, config: &MmioSlot, taken: &mut u32) -> Result<(), Error> {
    const _: () = assert!(layout::IO_APIC_PINS <= u32::BITS);
    let irq = config.irq;
    let exists = (layout::VIRTIO_IRQ..layout::IO_APIC_PINS).contains(&irq);
    if !exists || *taken & 1 << irq != 0 {
        return Err(Error::SlotIrq { slot, irq });
    }
    *taken |= 1 << irq;
    Ok(())
}

fn virtio_mmio_device(out: &mut Vec<u8>, index: usize, slot: &MmioSlot) -> Result<(), Error> {
    let MmioSlot { address, size, irq } = *slot;
    let out_of_range = Error::SlotRange {
        slot: index,
        address,
        size,
    };
    let last = size
        .checked_sub(1)
        .and_then(|size| address.checked_add(size))
        .ok_or(out_of_range)?;
    let fixed;
    let wide;
    let registers: &dyn Aml = match (u32::try_from(address), u32::try_from(last)) {
        (Ok(first), Ok(last)) if last - first < u32::MAX => {
            fixed = aml::Memory32Fixed::new(true, first, last - first + 1);
            &fixed
        }
        _ => {
            let cacheable = aml::AddressSpaceCacheable::NotCacheable;
            wide = aml::AddressSpace::new_memory(cacheable, true, address, last, None);
            &wide
        }
    };
    let irq = interrupt(irq);
    aml::Device::new(
        Path::new(&format!("V{index:03X}")),
        vec![
            &hid(&"LNRO0005"),
            &aml::Name::new("_UID".into(), &index),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &resources(vec![registers, &irq]),
        ],
    )
    .to_aml_bytes(out);
    Ok(())
}

#[cfg(test)]
mod tests {
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
        tables(&AcpiConfig { cpus, virtio_mmio }, BASE).unwrap()
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
    fn slots_that_cannot_work_are_refused() {
        let refused = |slots: &[MmioSlot]| {
            tables(
                &AcpiConfig {
                    cpus: 1,
                    virtio_mmio: slots,
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
            };
            assert_eq!(tables(&config, BASE), Err(Error::Cpus(cpus)));
        }
        let config = AcpiConfig {
            cpus: 1,
            virtio_mmio: &[],
        };
        for base in [BASE + 8, 0xffff_fff0, u64::MAX] {
            assert_eq!(tables(&config, base), Err(Error::Base(base)));
        }
    }
}
