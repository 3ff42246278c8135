//! x86-64: memory layout, boot protocols, CPUID, MSRs, ACPI, MP table.
//!
//! **Architecture Invariant:** pure functions from values to bytes and registers. No file, no ioctl, no guest memory.
#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod cpu_templates;
pub mod cpuid;
pub mod host_check;
pub mod layout;
pub mod memory_map;
pub mod mptable;
pub mod msrs;
