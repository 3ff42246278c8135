//! What a kernel finds in memory and in the boot vCPU's registers when it is entered: the 64-bit Linux boot
//! protocol (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol") and PVH (Xen's misc/pvh.pandoc).
//!
//! Nothing is written here: the result says which bytes go where.

use crate::layout::{
    ACPI, BOOT_STACK, CMDLINE, GDT, IDT, PAGE_TABLES, PVH_INFO, SETUP_DATA, ZERO_PAGE,
};
use crate::memory_map::{Range, e820};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

/// What both boot protocols tell the kernel.
#[derive(Clone, Debug)]
pub struct BootInfo<'a> {
    /// Guest memory in bytes.
    pub memory_size: u64,
    /// At most [`crate::layout::CMDLINE_MAX`] bytes, without a NUL; checked by the configuration.
    pub cmdline: &'a str,
    /// Where the initrd was put.
    pub initrd: Option<Range>,
    /// The setup header of the bzImage (from offset 0x1f1) from which the kernel was unpacked.
    pub setup_header: Option<&'a [u8]>,
    /// First address behind everything that the kernel occupies.
    pub kernel_end: u64,
    /// Fresh random bytes for the kernel's pool; a PVH boot cannot pass them.
    pub random_seed: [u8; 32],
}

/// Bytes for guest memory, and how the boot vCPU starts.
#[derive(Debug)]
pub struct BootState {
    /// Guest-physical address and contents.
    pub writes: Vec<(u64, Vec<u8>)>,
    /// General registers.
    pub regs: kvm_regs,
    mode: Mode,
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    Protected32,
    Long64,
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
/// SETUP_RNG_SEED of Linux's `struct setup_data`.
const SETUP_RNG_SEED: u32 = 9;
/// XEN_HVM_START_MAGIC_VALUE.
const PVH_MAGIC: u32 = 0x336e_c578;

/// Enter a Linux kernel at its 64-bit entry: RSI holds the zero page, memory is mapped one to one.
pub fn linux(info: &BootInfo, entry: u64) -> BootState {
    let mut writes = vec![
        (ZERO_PAGE, zero_page(info)),
        (SETUP_DATA, setup_data(info)),
        (CMDLINE, nul_terminated(info.cmdline)),
        (GDT, gdt(Mode::Long64)),
        (IDT, vec![0; 8]),
    ];
    writes.extend(page_tables(info.kernel_end));
    BootState {
        writes,
        regs: kvm_regs {
            rip: entry,
            rsi: ZERO_PAGE,
            rsp: BOOT_STACK,
            rbp: BOOT_STACK,
            rflags: 2,
            ..Default::default()
        },
        mode: Mode::Long64,
    }
}

/// Enter a kernel at its PVH entry: 32 bits, no paging, EBX holds `hvm_start_info`.
pub fn pvh(info: &BootInfo, entry: u32) -> BootState {
    BootState {
        writes: vec![
            (PVH_INFO, start_info(info)),
            (CMDLINE, nul_terminated(info.cmdline)),
            (GDT, gdt(Mode::Protected32)),
            (IDT, vec![0; 8]),
        ],
        regs: kvm_regs {
            rip: u64::from(entry),
            rbx: PVH_INFO,
            rflags: 2,
            ..Default::default()
        },
        mode: Mode::Protected32,
    }
}

impl BootState {
    /// Change what `sregs` (as KVM gives them for a new vCPU) must hold.
    pub fn apply(&self, sregs: &mut kvm_sregs) {
        let (code, data, task) = segments(self.mode);
        sregs.cs = code;
        for segment in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *segment = data;
        }
        sregs.tr = task;
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 31;
        sregs.idt.base = IDT;
        sregs.idt.limit = 7;
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.cr4 = 0;
        sregs.efer = 0;
        if let Mode::Long64 = self.mode {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
    }
}

/// Selectors as Linux's boot protocol asks for them: `__BOOT_CS` 0x10, `__BOOT_DS` 0x18.
fn segments(mode: Mode) -> (kvm_segment, kvm_segment, kvm_segment) {
    let long = u8::from(matches!(mode, Mode::Long64));
    let flat = kvm_segment {
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let code = kvm_segment {
        selector: 0x10,
        type_: 0xb,
        l: long,
        db: 1 - long,
        ..flat
    };
    let data = kvm_segment {
        selector: 0x18,
        type_: 3,
        db: 1,
        ..flat
    };
    let task = kvm_segment {
        limit: 0x67,
        selector: 0x20,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    (code, data, task)
}

/// The descriptors behind [`segments`], for a kernel that reloads a selector before it has a GDT of its own.
fn gdt(mode: Mode) -> Vec<u8> {
    let code: u64 = match mode {
        Mode::Protected32 => 0x00cf_9b00_0000_ffff,
        Mode::Long64 => 0x00af_9b00_0000_ffff,
    };
    let data: u64 = 0x00cf_9300_0000_ffff;
    [0, 0, code, data]
        .iter()
        .flat_map(|d: &u64| d.to_le_bytes())
        .collect()
}

/// Identity map of the first GiB, and of as many more as the kernel reaches into, in pages of 2 MiB.
fn page_tables(kernel_end: u64) -> Vec<(u64, Vec<u8>)> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let directories = kernel_end.div_ceil(GIB).clamp(1, 4);
    let pdpt = PAGE_TABLES + PAGE;
    let first_directory = pdpt + PAGE;
    let table = |entries: Vec<u64>| {
        entries
            .iter()
            .flat_map(|e| e.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let mut writes = vec![
        (PAGE_TABLES, table(vec![pdpt | PRESENT_WRITABLE])),
        (
            pdpt,
            table(
                (0..directories)
                    .map(|i| (first_directory + i * PAGE) | PRESENT_WRITABLE)
                    .collect(),
            ),
        ),
    ];
    for directory in 0..directories {
        let entries = (0..512).map(|i| (directory * GIB + (i << 21)) | LARGE | PRESENT_WRITABLE);
        writes.push((first_directory + directory * PAGE, table(entries.collect())));
    }
    writes
}

fn nul_terminated(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// `struct setup_data` with a seed: Linux has entropy from its first instruction and waits for none.
fn setup_data(info: &BootInfo) -> Vec<u8> {
    let mut bytes = 0u64.to_le_bytes().to_vec();
    bytes.extend(SETUP_RNG_SEED.to_le_bytes());
    bytes.extend((info.random_seed.len() as u32).to_le_bytes());
    bytes.extend(info.random_seed);
    bytes
}

/// Offsets in `struct boot_params` (arch/x86/include/uapi/asm/bootparam.h, Documentation/arch/x86/zero-page.rst).
mod offset {
    pub const ACPI_RSDP_ADDR: usize = 0x70;
    pub const EXT_RAMDISK_IMAGE: usize = 0xc0;
    pub const EXT_RAMDISK_SIZE: usize = 0xc4;
    pub const E820_ENTRIES: usize = 0x1e8;
    pub const SETUP_HEADER: usize = 0x1f1;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const HEADER: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const LOADFLAGS: usize = 0x211;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const CMD_LINE_PTR: usize = 0x228;
    pub const KERNEL_ALIGNMENT: usize = 0x230;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const SETUP_DATA: usize = 0x250;
    /// End of the setup header of the newest protocol, 2.15.
    pub const SETUP_HEADER_END: usize = 0x26c;
    pub const E820_TABLE: usize = 0x2d0;
}

fn zero_page(info: &BootInfo) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = page.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    let low_half = |value: u64| (value as u32).to_le_bytes();
    let high_half = |value: u64| ((value >> 32) as u32).to_le_bytes();

    // A header from a file is only what the kernel says of itself; each field that a loader answers for is set below.
    if let Some(header) = info.setup_header {
        let length = header
            .len()
            .min(offset::SETUP_HEADER_END - offset::SETUP_HEADER);
        put(
            offset::SETUP_HEADER,
            header.get(..length).unwrap_or_default(),
        );
    } else {
        put(offset::VERSION, &0x020fu16.to_le_bytes());
        put(offset::KERNEL_ALIGNMENT, &0x100_0000u32.to_le_bytes());
        put(offset::CMDLINE_SIZE, &2047u32.to_le_bytes());
        put(offset::LOADFLAGS, &[1]); // LOADED_HIGH
    }
    put(offset::BOOT_FLAG, &0xaa55u16.to_le_bytes());
    put(offset::HEADER, b"HdrS");
    put(offset::TYPE_OF_LOADER, &[0xff]); // "undefined": no number is assigned to Husk
    put(offset::ACPI_RSDP_ADDR, &ACPI.to_le_bytes());
    put(offset::CMD_LINE_PTR, &low_half(CMDLINE));
    put(offset::SETUP_DATA, &SETUP_DATA.to_le_bytes());
    let initrd = info.initrd.unwrap_or(Range { start: 0, size: 0 });
    put(offset::RAMDISK_IMAGE, &low_half(initrd.start));
    put(offset::EXT_RAMDISK_IMAGE, &high_half(initrd.start));
    put(offset::RAMDISK_SIZE, &low_half(initrd.size));
    put(offset::EXT_RAMDISK_SIZE, &high_half(initrd.size));

    let map = e820(info.memory_size);
    put(offset::E820_ENTRIES, &[map.len() as u8]);
    for (index, (range, kind)) in map.iter().enumerate() {
        let at = offset::E820_TABLE + index * 20;
        put(at, &range.start.to_le_bytes());
        put(at + 8, &range.size.to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    page
}

/// `struct hvm_start_info`, version 1, with its memory map and its list of one module behind it.
fn start_info(info: &BootInfo) -> Vec<u8> {
    const SIZE: u64 = 56;
    const MODULE_SIZE: u64 = 32;
    let map = e820(info.memory_size);
    let modules = PVH_INFO + SIZE;
    let memory_map = modules + MODULE_SIZE;
    let mut bytes = Vec::with_capacity(256);
    let mut word = |value: u32| bytes.extend(value.to_le_bytes());
    for value in [PVH_MAGIC, 1, 0, u32::from(info.initrd.is_some())] {
        word(value);
    }
    let mut quad = |value: u64| bytes.extend(value.to_le_bytes());
    let module_list = if info.initrd.is_some() { modules } else { 0 };
    for value in [module_list, CMDLINE, ACPI, memory_map, map.len() as u64] {
        quad(value);
    }
    let module = info.initrd.unwrap_or(Range { start: 0, size: 0 });
    for value in [module.start, module.size, 0, 0] {
        quad(value);
    }
    for (range, kind) in &map {
        for value in [range.start, range.size, u64::from(*kind)] {
            quad(value);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info<'a>() -> BootInfo<'a> {
        BootInfo {
            memory_size: 6 * GIB,
            cmdline: "console=ttyS0",
            initrd: Some(Range {
                start: 0x1_2345_6000,
                size: 0x1000,
            }),
            setup_header: None,
            kernel_end: 0x200_0000,
            random_seed: [7; 32],
        }
    }

    fn at(state: &BootState, address: u64) -> &[u8] {
        &state.writes.iter().find(|w| w.0 == address).unwrap().1
    }

    fn number(bytes: &[u8], at: usize, size: usize) -> u64 {
        bytes[at..at + size]
            .iter()
            .rev()
            .fold(0, |n, b| n << 8 | u64::from(*b))
    }

    #[test]
    fn linux_finds_its_zero_page_in_rsi() {
        let state = linux(&info(), 0x100_0000);
        assert_eq!((state.regs.rip, state.regs.rsi), (0x100_0000, ZERO_PAGE));
        let page = at(&state, ZERO_PAGE);
        assert_eq!(page.len(), 4096);
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(number(page, 0x228, 4), CMDLINE);
        assert_eq!(number(page, 0x218, 4), 0x2345_6000);
        assert_eq!(number(page, 0xc0, 4), 1);
        assert_eq!(number(page, 0x21c, 4), 0x1000);
        assert_eq!(number(page, 0x70, 8), ACPI);
        assert_eq!(number(page, 0x1e8, 1), 4);
        assert_eq!(number(page, 0x2d0 + 3 * 20, 8), 4 * GIB);
        assert_eq!(at(&state, CMDLINE), b"console=ttyS0\0");
    }

    #[test]
    fn a_kernels_own_header_is_kept_but_for_the_loaders_fields() {
        let mut header = vec![0xee; 0x300];
        header[0x202 - 0x1f1..0x206 - 0x1f1].copy_from_slice(b"HdrS");
        let info = BootInfo {
            setup_header: Some(&header),
            ..info()
        };
        let state = linux(&info, 0);
        let page = at(&state, ZERO_PAGE);
        assert_eq!(page[0x236], 0xee); // xloadflags: the kernel's
        assert_eq!(page[0x210], 0xff); // type_of_loader: the loader's
        assert_eq!(page[0x26c], 0); // behind the header
    }

    #[test]
    fn the_random_seed_is_announced() {
        let state = linux(&info(), 0);
        assert_eq!(number(at(&state, ZERO_PAGE), 0x250, 8), SETUP_DATA);
        let data = at(&state, SETUP_DATA);
        assert_eq!((number(data, 8, 4), number(data, 12, 4)), (9, 32));
        assert_eq!(data[16..], [7; 32]);
    }

    #[test]
    fn every_address_of_the_kernel_maps_to_itself() {
        let high = BootInfo {
            kernel_end: 3 * GIB + 1,
            ..info()
        };
        let state = linux(&high, 0);
        let entry = |table: u64, index: u64| number(at(&state, table), index as usize * 8, 8);
        for address in [0u64, 0x100_0000, GIB + 0x20_0000, 3 * GIB] {
            let pdpt = entry(PAGE_TABLES, 0) & !0xfff;
            let directory = entry(pdpt, address / GIB) & !0xfff;
            let page = entry(directory, (address % GIB) >> 21);
            assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff);
            assert_eq!(page & 0x83, 0x83);
        }
        let low = linux(&info(), 0);
        assert_eq!(low.writes.len(), state.writes.len() - 3);
    }

    #[test]
    fn nothing_overlaps_in_memory() {
        for state in [linux(&info(), 0), pvh(&info(), 0)] {
            let mut places: Vec<_> = state
                .writes
                .iter()
                .map(|w| (w.0, w.0 + w.1.len() as u64))
                .collect();
            places.sort_unstable();
            assert!(places.windows(2).all(|w| w[0].1 <= w[1].0), "{places:x?}");
        }
    }

    #[test]
    fn pvh_finds_its_start_info_in_ebx() {
        let state = pvh(&info(), 0x100_0040);
        assert_eq!((state.regs.rip, state.regs.rbx), (0x100_0040, PVH_INFO));
        let start = at(&state, PVH_INFO);
        assert_eq!(number(start, 0, 4), 0x336e_c578);
        assert_eq!(number(start, 12, 4), 1);
        let module = (number(start, 16, 8) - PVH_INFO) as usize;
        assert_eq!(number(start, module, 8), 0x1_2345_6000);
        assert_eq!(number(start, 24, 8), CMDLINE);
        assert_eq!(number(start, 32, 8), ACPI);
        let map = (number(start, 40, 8) - PVH_INFO) as usize;
        assert_eq!(number(start, 48, 4), 4);
        assert_eq!(start.len(), map + 4 * 24);
        assert_eq!(number(start, map + 3 * 24, 8), 4 * GIB);
    }

    #[test]
    fn registers_are_those_of_the_protocols() {
        let mut sregs = kvm_sregs::default();
        linux(&info(), 0).apply(&mut sregs);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.selector), (1, 0, 0x10));
        assert_eq!((sregs.cr3, sregs.efer), (PAGE_TABLES, 0x500));
        let mut sregs = kvm_sregs::default();
        pvh(&info(), 0).apply(&mut sregs);
        assert_eq!((sregs.cs.l, sregs.cs.db), (0, 1));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
    }
}
