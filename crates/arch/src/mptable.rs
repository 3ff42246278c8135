//! The MP floating pointer structure and MP configuration table (MultiProcessor Specification 1.4),
//! by which a kernel without ACPI (`acpi=off`) finds the processors and the I/O APIC.

use crate::layout;

/// Why there is no MP table.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The number of vCPUs is outside 1 to [`layout::MAX_CPUS`].
    #[error("MP table for {0} vCPUs: give 1 to {max}", max = layout::MAX_CPUS)]
    Cpus(u32),
    /// The table has to be 16-byte aligned and below 4 GiB.
    #[error("MP table at {0:#x}: place it at a 16-byte aligned address well below 4 GiB")]
    Base(u64),
}

/// Specification revision 1.4.
const SPEC_REVISION: u8 = 4;
const FLOATING_POINTER_SIZE: u8 = 16;
const HEADER_SIZE: u16 = 44;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
const LOCAL_APIC_VERSION: u8 = 0x14;
/// Family 6; kernels take the real one from CPUID.
const CPU_SIGNATURE: u32 = 0x600;
/// FPU and on-chip APIC.
const CPU_FEATURES: u32 = 1 | 1 << 9;

const ISA_BUS_ID: u8 = 0;
const IO_APIC_VERSION: u8 = 0x11;
const IO_APIC_ENABLED: u8 = 1;
/// The slave 8259's line into the master: no ISA device can have it.
const CASCADE_IRQ: u8 = 2;

const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
const ALL_LOCAL_APICS: u8 = 0xff;

// Processors have the local APIC ids from 0 up, and the I/O APIC's id follows them. All are 8-bit
// fields, and 255 means "all local APICs".
const _: () = assert!(layout::MAX_CPUS < ALL_LOCAL_APICS as u32);
const _: () = assert!(layout::IO_APIC_PINS <= 240);

/// The bytes of the MP floating pointer structure and, behind it, the MP configuration table, to be
/// written at guest-physical address `base`.
///
/// It says: processors with the local APIC ids 0 to `cpus` - 1, 0 being the bootstrap processor; one
/// ISA bus; one I/O APIC at [`layout::IO_APIC`], whose pin n is ISA interrupt n as in KVM's default
/// GSI routing (the 8254 timer is on pin 0, not 2); ExtINT on LINT0 of the bootstrap processor, NMI
/// on every LINT1. Interrupts are edge-triggered and active high, the ISA bus's default.
///
/// The result is at most [`layout::MP_TABLE_SIZE`] bytes long.
///
/// # Errors
/// `cpus` is not in 1 to [`layout::MAX_CPUS`], or `base` is not 16-byte aligned below 4 GiB.
pub fn table(cpus: u32, base: u64) -> Result<Vec<u8>, Error> {
    let io_apic_id = match u8::try_from(cpus) {
        Ok(cpus @ 1..) if u32::from(cpus) <= layout::MAX_CPUS => cpus,
        _ => return Err(Error::Cpus(cpus)),
    };
    let table_address = u32::try_from(base)
        .ok()
        .filter(|base| base.is_multiple_of(16) && *base < u32::MAX - layout::MP_TABLE_SIZE as u32)
        .map(|base| base + u32::from(FLOATING_POINTER_SIZE))
        .ok_or(Error::Base(base))?;

    let mut entries = Entries::default();
    add_processors(&mut entries, io_apic_id);
    entries.add(&[ENTRY_BUS, ISA_BUS_ID, b'I', b'S', b'A', b' ', b' ', b' ']);
    add_io_apic(&mut entries, io_apic_id);
    add_local_interrupts(&mut entries);

    let mut bytes = floating_pointer(table_address).to_vec();
    let unsummed = entries.header(0);
    bytes.extend(entries.header(checksum(&[&unsummed, &entries.bytes])));
    bytes.extend(entries.bytes);
    Ok(bytes)
}

/// The entries of the configuration table's base section.
#[derive(Default)]
struct Entries {
    bytes: Vec<u8>,
    count: u16,
}

impl Entries {
    fn add(&mut self, entry: &[u8]) {
        self.bytes.extend_from_slice(entry);
        self.count += 1;
    }

    /// Section 4.2: the header of a table of these entries.
    fn header(&self, checksum: u8) -> Vec<u8> {
        // At most 64 processors of 20 bytes and fewer than 40 other entries of 8.
        let length = HEADER_SIZE + self.bytes.len() as u16;
        let mut header = Vec::with_capacity(usize::from(HEADER_SIZE));
        header.extend(b"PCMP");
        header.extend(length.to_le_bytes());
        header.extend([SPEC_REVISION, checksum]);
        header.extend(b"HUSK    ");
        header.extend(b"HUSK VM     ");
        header.extend([0; 6]); // no OEM table
        header.extend(self.count.to_le_bytes());
        header.extend((layout::LOCAL_APIC as u32).to_le_bytes());
        header.extend([0; 4]); // no extended entries
        header
    }
}

/// Section 4.1. All feature bytes are 0: a table is present, and Virtual Wire Mode is in force.
fn floating_pointer(table_address: u32) -> [u8; FLOATING_POINTER_SIZE as usize] {
    let [a0, a1, a2, a3] = table_address.to_le_bytes();
    let with = |checksum| {
        [
            b'_',
            b'M',
            b'P',
            b'_',
            a0,
            a1,
            a2,
            a3,
            1,
            SPEC_REVISION,
            checksum,
            0,
            0,
            0,
            0,
            0,
        ]
    };
    with(checksum(&[&with(0)]))
}

fn add_processors(entries: &mut Entries, cpus: u8) {
    for apic_id in 0..cpus {
        let bootstrap = if apic_id == 0 { CPU_BOOTSTRAP } else { 0 };
        let mut entry = vec![ENTRY_PROCESSOR, apic_id, LOCAL_APIC_VERSION];
        entry.push(CPU_ENABLED | bootstrap);
        entry.extend(CPU_SIGNATURE.to_le_bytes());
        entry.extend(CPU_FEATURES.to_le_bytes());
        entry.extend([0; 8]);
        entries.add(&entry);
    }
}

fn add_io_apic(entries: &mut Entries, id: u8) {
    let mut entry = vec![ENTRY_IO_APIC, id, IO_APIC_VERSION, IO_APIC_ENABLED];
    entry.extend((layout::IO_APIC as u32).to_le_bytes());
    entries.add(&entry);
    // ISA has 16 interrupts only, but Linux sets up a pin at boot if and only if it has an entry
    // here, and a `virtio_mmio.device=` on the command line can name any pin.
    for pin in (0..layout::IO_APIC_PINS as u8).filter(|pin| *pin != CASCADE_IRQ) {
        entries.add(&[
            ENTRY_IO_INTERRUPT,
            INTERRUPT_INT,
            0,
            0,
            ISA_BUS_ID,
            pin,
            id,
            pin,
        ]);
    }
}

fn add_local_interrupts(entries: &mut Entries) {
    entries.add(&[
        ENTRY_LOCAL_INTERRUPT,
        INTERRUPT_EXTINT,
        0,
        0,
        ISA_BUS_ID,
        0,
        0,
        0,
    ]);
    entries.add(&[
        ENTRY_LOCAL_INTERRUPT,
        INTERRUPT_NMI,
        0,
        0,
        ISA_BUS_ID,
        0,
        ALL_LOCAL_APICS,
        1,
    ]);
}

/// The byte that makes the sum of all bytes 0.
fn checksum(parts: &[&[u8]]) -> u8 {
    let sum = parts
        .iter()
        .copied()
        .flatten()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    sum.wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn le32(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn le16(bytes: &[u8], at: usize) -> usize {
        usize::from(u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()))
    }

    /// The entries of a table, found as a kernel would.
    fn entries(bytes: &[u8], base: u64) -> Vec<Vec<u8>> {
        assert_eq!(&bytes[..4], b"_MP_");
        assert_eq!(bytes[8], 1, "length in 16-byte units");
        assert_eq!(sum(&bytes[..16]), 0);
        let table = &bytes[(u64::from(le32(bytes, 4)) - base) as usize..];
        assert_eq!(&table[..4], b"PCMP");
        assert_eq!(table.len(), le16(table, 4));
        assert_eq!(table[6], bytes[9], "both name the same revision");
        assert_eq!(sum(table), 0);
        assert_eq!(u64::from(le32(table, 36)), layout::LOCAL_APIC);
        let mut rest = &table[44..];
        let mut entries = Vec::new();
        while let Some(kind) = rest.first() {
            let size = if *kind == ENTRY_PROCESSOR { 20 } else { 8 };
            entries.push(rest[..size].to_vec());
            rest = &rest[size..];
        }
        assert_eq!(entries.len(), le16(table, 34), "entry count");
        assert!(
            entries.is_sorted_by_key(|entry| entry[0]),
            "entries come by rising type"
        );
        entries
    }

    fn of_type(entries: &[Vec<u8>], kind: u8) -> Vec<&[u8]> {
        entries
            .iter()
            .filter(|entry| entry[0] == kind)
            .map(Vec::as_slice)
            .collect()
    }

    #[test]
    fn every_processor_is_listed_once_and_the_first_boots() {
        for cpus in [1, 2, 3, 64] {
            let bytes = table(cpus, layout::MP_TABLE).unwrap();
            assert!(bytes.len() as u64 <= layout::MP_TABLE_SIZE);
            let entries = entries(&bytes, layout::MP_TABLE);
            let processors = of_type(&entries, ENTRY_PROCESSOR);
            assert_eq!(processors.len(), cpus as usize);
            for (index, entry) in processors.iter().enumerate() {
                assert_eq!(usize::from(entry[1]), index, "local APIC id");
                assert_eq!(entry[3], if index == 0 { 3 } else { 1 }, "flags");
            }
        }
    }

    #[test]
    fn the_io_apic_is_where_kvm_has_it_and_its_id_is_no_processor_s() {
        let entries = entries(&table(4, 0xf_0000).unwrap(), 0xf_0000);
        let io_apics = of_type(&entries, ENTRY_IO_APIC);
        assert_eq!(io_apics.len(), 1);
        assert_eq!(u64::from(le32(io_apics[0], 4)), layout::IO_APIC);
        assert_eq!(io_apics[0][1], 4);
        assert_eq!(io_apics[0][3], 1, "usable");
    }

    #[test]
    fn interrupts_are_wired_as_in_kvms_default_routing() {
        let entries = entries(&table(2, 0xf_0000).unwrap(), 0xf_0000);
        let bus = of_type(&entries, ENTRY_BUS);
        assert_eq!(bus, [b"\x01\x00ISA   "]);
        let wires = of_type(&entries, ENTRY_IO_INTERRUPT);
        let pins: Vec<u8> = wires.iter().map(|wire| wire[7]).collect();
        assert_eq!(pins, (0..24).filter(|pin| *pin != 2).collect::<Vec<u8>>());
        for wire in wires {
            assert_eq!(
                wire[5], wire[7],
                "ISA interrupt n is pin n, the timer's 0 too"
            );
            assert_eq!(
                wire[1..5],
                [0, 0, 0, 0],
                "vectored, as the bus has it, from the ISA bus"
            );
            assert_eq!(wire[6], 2, "to the I/O APIC");
        }
        let local = of_type(&entries, ENTRY_LOCAL_INTERRUPT);
        assert_eq!(
            local[0][1..],
            [3, 0, 0, 0, 0, 0, 0],
            "ExtINT on the boot processor's LINT0"
        );
        assert_eq!(
            local[1][1..],
            [1, 0, 0, 0, 0, 0xff, 1],
            "NMI on every LINT1"
        );
    }

    #[test]
    fn what_does_not_fit_the_fields_is_refused() {
        for cpus in [0, 65, 255, 256, 257, u32::MAX] {
            assert_eq!(table(cpus, 0xf_0000), Err(Error::Cpus(cpus)));
        }
        for base in [0xf_0008, 0xffff_fff0, 0x1_0000_0000, u64::MAX] {
            assert_eq!(table(1, base), Err(Error::Base(base)));
        }
    }
}
