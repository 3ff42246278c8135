//! Hardware-reduced ACPI tables (ACPI 6.5): RSDP, XSDT, FADT, MADT, DSDT, and MCFG where there is PCI.
//!
//! Hardware-reduced means that there is no fixed hardware: no PM timer, no SCI, no fixed power
//! button. Linux then leaves the 8254 timer and the 8259 alone as well. What takes their place: the
//! sleep and reset registers of the FADT, and a Generic Event Device for the power button.

use acpi_tables::aml::{self, Path};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
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
    /// There is a PCI host bridge, with ECAM at [`layout::PCI_ECAM`] and its window at [`layout::PCI_WINDOW`].
    pub pci: bool,
    /// Slots of the PCI bus in which devices come and go, from device number 1 on, 31 at most; 0 without PCI. Each costs a guest
    /// that boots some time.
    pub hotplug_slots: u32,
    /// There is a keyboard at the i8042.
    pub keyboard: bool,
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

/// IAPC_BOOT_ARCH (5.2.9.3): there is an 8042, or what looks like one.
const HAS_8042: u16 = 1 << 1;
/// IAPC_BOOT_ARCH: do not probe for VGA.
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
/// Notification of the VM generation ID's device: it is a new one.
const NOTIFY_GENERATION: u8 = 0x80;

// One byte of a local APIC entry holds the id; 255 is the broadcast id.
const _: () = assert!(layout::MAX_CPUS < 255);

/// The bytes of all ACPI tables, to be written at guest-physical address `base`, at which the RSDP
/// begins. They are contiguous: for a few vCPUs and devices one 4 KiB page holds them all.
///
/// There are no processor devices (`ACPI0007`): Linux takes the processors from
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
    let dsdt = image.add(dsdt(config)?.as_slice());
    let fadt = image.add(&bytes_of(&fadt(dsdt, config.keyboard)));
    let madt = image.add(madt(cpus).as_slice());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if config.pci {
        xsdt.add_entry(image.add(&bytes_of(&mcfg())));
    }
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
fn fadt(dsdt: u64, keyboard: bool) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::TmrValExt);
    // Without a keyboard the 8042 bit stays clear, although a write to its port does reset the
    // machine: announced, it would be probed, at a cost of milliseconds.
    let i8042 = if keyboard { HAS_8042 } else { 0 };
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC | i8042).into();
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

/// PCI Firmware 3.3, 4.1.2: segment 0, bus 0.
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM, 0, 0, 0);
    mcfg
}

fn dsdt(config: &AcpiConfig<'_>) -> Result<Sdt, Error> {
    let mut devices = Vec::new();
    com1(&mut devices);
    power_button(&mut devices);
    generation_id(&mut devices);
    generic_event_device(&mut devices, config.hotplug_slots > 0);
    if config.keyboard {
        keyboard(&mut devices);
    }
    pvpanic(&mut devices);
    let mut lines_taken = 0;
    for (index, slot) in config.virtio_mmio.iter().enumerate() {
        check_line(index, slot, &mut lines_taken)?;
        virtio_mmio_device(&mut devices, index, slot)?;
    }
    if config.pci {
        pci_host_bridge(&mut devices, config.hotplug_slots.min(MOST_SLOTS));
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

/// Where the VM generation ID lies (Microsoft, "Virtual Machine Generation ID"): `ADDR` is the lower and the upper half of its
/// address. Guests know the device by its `_CID`, Linux by a `_HID` of its own, too.
fn generation_id(out: &mut Vec<u8>) {
    let [low, high] = [0, 32].map(|shift| (layout::GENERATION_ID >> shift) as u32);
    let address = aml::Package::new(vec![&low, &high]);
    aml::Device::new(
        "VGEN".into(),
        vec![
            &hid(&"VMGENCTR"),
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new("ADDR".into(), &address),
        ],
    )
    .to_aml_bytes(out);
}

/// Generic Event Device (5.6.9). `_EVT` reads the events register once, as reading clears it.
fn generic_event_device(out: &mut Vec<u8>, hotplug: bool) {
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
    let cloned = aml::And::new(&aml::ZERO, &events, &layout::EVENT_GENERATION);
    let generation = Path::new("\\_SB_.VGEN");
    let notify = aml::Notify::new(&generation, &NOTIFY_GENERATION);
    let renewed = aml::If::new(&cloned, vec![&notify]);
    let changed = aml::And::new(&aml::ZERO, &events, &layout::EVENT_PCI);
    let look = aml::MethodCall::new("\\_SB_.PCI0.LOOK".into(), Vec::new());
    let slots = aml::If::new(&changed, vec![&look]);
    let mut body: Vec<&dyn Aml> = vec![&read, &handle, &renewed];
    if hotplug {
        body.push(&slots);
    }
    let method = aml::Method::new("_EVT".into(), 1, true, body);
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

/// An AT keyboard at the i8042's data and command ports.
fn keyboard(out: &mut Vec<u8>) {
    let (first, command) = (layout::I8042_PORT, layout::I8042_PORT + 4);
    let data = aml::IO::new(first, first, 0, 1);
    let command = aml::IO::new(command, command, 0, 1);
    let irq = interrupt(layout::KEYBOARD_IRQ);
    aml::Device::new(
        "KBD_".into(),
        vec![
            &hid(&aml::EISAName::new("PNP0303")),
            &resources(vec![&data, &command, &irq]),
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

/// A PCI Express host bridge with memory and one bus: no I/O ports, and no `_PRT`, as nothing has INTx. ECAM is no
/// resource of the bridge's; PCI Firmware 3.3, 4.1.2 wants it reserved by a motherboard resource, else Linux does not use it.
fn pci_host_bridge(out: &mut Vec<u8>, hotplug_slots: u32) {
    let (ecam, size) = (layout::PCI_ECAM as u32, layout::PCI_ECAM_SIZE as u32);
    let ecam = aml::Memory32Fixed::new(true, ecam, size);
    aml::Device::new(
        "MBRD".into(),
        vec![
            &hid(&aml::EISAName::new("PNP0C02")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &resources(vec![&ecam]),
        ],
    )
    .to_aml_bytes(out);

    let buses = aml::AddressSpace::new_bus_number(0u16, 0u16);
    let first = layout::PCI_WINDOW as u32;
    let last = first + (layout::PCI_WINDOW_SIZE - 1) as u32;
    let cacheable = aml::AddressSpaceCacheable::NotCacheable;
    let window = aml::AddressSpace::new_memory(cacheable, true, first, last, None);
    aml::Device::new(
        "PCI0".into(),
        vec![
            &hid(&aml::EISAName::new("PNP0A08")),
            &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_SEG".into(), &aml::ZERO),
            &aml::Name::new("_BBN".into(), &aml::ZERO),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &resources(vec![&buses, &window]),
            &Encoded(pci_slots(hotplug_slots)),
        ],
    )
    .to_aml_bytes(out);
}

/// AML that is there already.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Device numbers of the PCI bus; 0 is the bridge's.
const MOST_SLOTS: u32 = 31;
/// Notification: look for a device (5.6.6).
const NOTIFY_DEVICE_CHECK: u8 = 1;
/// Notification: let the device go, by `_EJ0`.
const NOTIFY_EJECT_REQUEST: u8 = 3;

/// In the host bridge: the slots with their `_EJ0`, the slots' registers, and `LOOK`, which the Generic Event Device calls.
fn pci_slots(count: u32) -> Vec<u8> {
    let mut out = Vec::new();
    if count == 0 {
        return out;
    }
    let ports = layout::PCI_HOTPLUG_PORTS;
    let (space, base) = (aml::OpRegionSpace::SystemIO, layout::PCI_HOTPLUG_PORT);
    aml::OpRegion::new("SLRG".into(), space, &base, &ports).to_aml_bytes(&mut out);
    let names = [*b"CAME", *b"GOES", *b"EJCT"];
    aml::Field::new(
        "SLRG".into(),
        aml::FieldAccessType::DWord,
        aml::FieldLockRule::NoLock,
        aml::FieldUpdateRule::WriteAsZeroes,
        names.map(|name| aml::FieldEntry::Named(name, 32)).to_vec(),
    )
    .to_aml_bytes(&mut out);

    let mut told = Vec::new();
    for slot in 1..=count {
        let (name, bit) = (format!("S{slot:03X}"), 1u32 << slot);
        let eject = Path::new("EJCT");
        let let_go = aml::Store::new(&eject, &bit);
        aml::Device::new(
            Path::new(&name),
            vec![
                &aml::Name::new("_ADR".into(), &(slot << 16)),
                &aml::Name::new("_SUN".into(), &slot),
                &aml::Method::new("_EJ0".into(), 1, true, vec![&let_go]),
            ],
        )
        .to_aml_bytes(&mut out);
        let is_it = aml::And::new(&aml::ZERO, &aml::Arg(0), &bit);
        let slot = Path::new(&name);
        let notify = aml::Notify::new(&slot, &aml::Arg(1));
        aml::If::new(&is_it, vec![&notify]).to_aml_bytes(&mut told);
    }
    // TELL (slots, notification)
    aml::Method::new("TELL".into(), 2, true, vec![&Encoded(told)]).to_aml_bytes(&mut out);
    let (came, goes) = (Path::new("CAME"), Path::new("GOES"));
    let came = aml::MethodCall::new("TELL".into(), vec![&came, &NOTIFY_DEVICE_CHECK]);
    let goes = aml::MethodCall::new("TELL".into(), vec![&goes, &NOTIFY_EJECT_REQUEST]);
    aml::Method::new("LOOK".into(), 0, true, vec![&came, &goes]).to_aml_bytes(&mut out);
    out
}

#[cfg(test)]
mod tests;
