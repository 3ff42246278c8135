//! x86-64: memory layout, boot protocols, CPUID, MSRs, ACPI, MP table.
#![warn(missing_docs)]

pub mod layout;
