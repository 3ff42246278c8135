//! Memory's pages.

use serde::{Deserialize, Serialize};

/// Which pages of the host are behind the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum HugePages {
    /// Small ones, and huge ones where the host gives them to everybody (`/sys/kernel/mm/transparent_hugepage/enabled`).
    #[default]
    None,
    /// Huge ones as far as the host has them, which it looks for in the background (`madvise(MADV_HUGEPAGE)`).
    Transparent,
    /// Pages of 2 MiB from the host's pool (`/proc/sys/vm/nr_hugepages`), all of them taken when the VM is built.
    #[serde(rename = "2M")]
    TwoMiB,
}
