//! Model-specific registers that firmware would have set before a kernel runs.

/// IA32_MISC_ENABLE.
const MISC_ENABLE: u32 = 0x1a0;
/// Fast strings: without it Linux does not trust `rep movs` on Intel processors.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// IA32_MTRR_DEF_TYPE.
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, default type write-back: otherwise Linux takes all memory for uncached, or says that the firmware is
/// broken.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// IA32_ARCH_CAPABILITIES: which of the processor's weaknesses need no care.
pub const ARCH_CAPABILITIES: u32 = 0x10a;

/// Index and value of each MSR of a new vCPU that differs from its reset value.
pub fn boot_msrs() -> [(u32, u64); 2] {
    [
        (MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ]
}
