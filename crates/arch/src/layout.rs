//! The guest-physical address space, the I/O ports and the interrupt lines of a Husk VM.
//!
//! Everything that the monitor puts into guest memory, and every address at which a device answers,
//! is named here, so that two things can never be given the same place.
//!
//! ```text
//! 0x0000_0500  boot GDT, IDT
//! 0x0000_6000  PVH start info, memory map, module list
//! 0x0000_7000  Linux boot_params ("zero page")
//! 0x0000_9000  identity-mapping page tables
//! 0x0001_0000  setup_data (random seed)
//! 0x0002_0000  kernel command line
//! 0x0009_fc00  end of usable low memory
//! 0x000e_0000  ACPI tables
//! 0x000f_0000  MP floating pointer and MP table
//! 0x000f_2000  VM generation ID
//! 0x0010_0000  high memory: kernel, initrd, the rest
//! 0xc000_0000  the hole: devices; nothing below 4 GiB is memory from here on
//! 0x1_0000_0000  memory again
//! ```

/// Boot GDT (4 descriptors of 8 bytes).
pub const GDT: u64 = 0x500;
/// Boot IDT: empty, limit 7.
pub const IDT: u64 = 0x520;
/// `hvm_start_info` of a PVH boot; the memory map and module list follow in the same page.
pub const PVH_INFO: u64 = 0x6000;
/// Linux's `boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer of the boot vCPU.
pub const BOOT_STACK: u64 = 0x8ff0;
/// First of the page-table pages (PML4, then PDPT, then PDs) of a 64-bit boot.
pub const PAGE_TABLES: u64 = 0x9000;
/// `setup_data` list for Linux.
pub const SETUP_DATA: u64 = 0x1_0000;
/// Kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line in bytes without its NUL: Linux's x86 `COMMAND_LINE_SIZE` is 2048.
pub const CMDLINE_MAX: usize = 2047;
/// End of the memory that the guest may use below 1 MiB.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// RSDP, and all ACPI tables behind it.
pub const ACPI: u64 = 0xe_0000;
/// Room for ACPI tables, in bytes.
pub const ACPI_SIZE: u64 = 0x1_0000;
/// MP floating pointer structure (where Linux and others scan for it), the MP table behind it.
pub const MP_TABLE: u64 = 0xf_0000;
/// Room for the MP table, in bytes.
pub const MP_TABLE_SIZE: u64 = 0x2000;
/// VM generation ID, in a page of its own, which the guest's memory map reserves.
pub const GENERATION_ID: u64 = 0xf_2000;
/// Start of high memory.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Start of the hole below 4 GiB in which devices live.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole: memory goes on here.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// Firecracker's boot timer, a page, where a VM has it.
pub const BOOT_TIMER: u64 = HOLE_START;
/// First virtio-mmio slot; each is [`VIRTIO_MMIO_SIZE`] bytes long.
pub const VIRTIO_MMIO: u64 = HOLE_START + 0x1000;
/// Size of a virtio-mmio slot in bytes.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Window of the PCI host bridge: BARs lie here.
pub const PCI_WINDOW: u64 = 0xd000_0000;
/// Size of the window in bytes.
pub const PCI_WINDOW_SIZE: u64 = 0x1000_0000;
/// PCI configuration spaces (ECAM) of segment 0, bus 0.
pub const PCI_ECAM: u64 = 0xe000_0000;
/// Size of ECAM in bytes: one bus.
pub const PCI_ECAM_SIZE: u64 = 0x10_0000;
/// I/O APIC registers (KVM's in-kernel one).
pub const IO_APIC: u64 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Page that KVM needs for its identity map on some Intel hosts.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs for its task state segment on some Intel hosts.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Number of I/O ports of COM1.
pub const COM1_PORTS: u16 = 8;
/// i8042 command port: writing 0xfe resets the machine.
pub const I8042_PORT: u16 = 0x60;
/// Number of I/O ports of the i8042 (0x60 data, 0x64 command and status).
pub const I8042_PORTS: u16 = 5;
/// pvpanic, at QEMU's port.
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI SLEEP_CONTROL_REG (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI SLEEP_STATUS_REG.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI RESET_REG: writing [`RESET_VALUE`] resets the machine.
pub const RESET_PORT: u16 = 0x602;
/// Pending events of the Generic Event Device, read (and cleared by reading) in its `_EVT`.
pub const EVENTS_PORT: u16 = 0x603;
/// Boot mark: a byte that guest software writes to say how far it has come.
pub const MARK_PORT: u16 = 0x604;
/// First port of the block 0x600..0x605 that holds the five registers above.
pub const POWER_PORTS: (u16, u16) = (SLEEP_CONTROL_PORT, 5);
/// Three registers of 32 bits, a bit for each slot of the PCI bus: what came, what shall go, what the guest lets go.
pub const PCI_HOTPLUG_PORT: u16 = 0x610;
/// Number of I/O ports of the slots' registers.
pub const PCI_HOTPLUG_PORTS: u16 = 12;
/// Value for the reset register.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of S5 (soft off), as the DSDT's `\_S5` says it.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Bit of [`EVENTS_PORT`]: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1;
/// Bit of [`EVENTS_PORT`]: a device came to the PCI bus, or shall go.
pub const EVENT_PCI: u8 = 2;
/// Bit of [`EVENTS_PORT`]: the VM generation ID is a new one.
pub const EVENT_GENERATION: u8 = 4;

/// Interrupt line of the keyboard, where a VM has one.
pub const KEYBOARD_IRQ: u32 = 1;
/// Interrupt line of COM1.
pub const COM1_IRQ: u32 = 4;
/// Interrupt line of the Generic Event Device (edge, active high).
pub const EVENTS_IRQ: u32 = 5;
/// First interrupt line for virtio-mmio devices.
pub const VIRTIO_IRQ: u32 = 6;
/// Number of I/O APIC pins.
pub const IO_APIC_PINS: u32 = 24;

const _: () =
    assert!(MP_TABLE + MP_TABLE_SIZE <= GENERATION_ID && GENERATION_ID + 0x1000 <= HIGH_MEMORY);
// Slots of virtio-mmio are far fewer than would reach the window.
const _: () = assert!(VIRTIO_MMIO + 256 * VIRTIO_MMIO_SIZE <= PCI_WINDOW);
const _: () = assert!(PCI_WINDOW + PCI_WINDOW_SIZE <= PCI_ECAM);
const _: () = assert!(PCI_ECAM + PCI_ECAM_SIZE <= IO_APIC);

/// Most vCPUs that a VM may have.
pub const MAX_CPUS: u32 = 64;
