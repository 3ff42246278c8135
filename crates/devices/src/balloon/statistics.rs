//! What the guest says of its memory (virtio 1.2, 5.5.6.3).

/// The guest's statistics, in bytes where they are sizes; None: the guest did not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    values: [Option<u64>; NAMES.len()],
}

/// By tag, as Firecracker's API calls them.
const NAMES: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kill",
    "alloc_stall",
    "async_scan",
    "direct_scan",
    "async_reclaim",
    "direct_reclaim",
];

/// Tag and value.
const RECORD: usize = 10;

impl Statistics {
    /// Take what the guest has sent; tags that nobody knows are left out, and what was said before is forgotten.
    pub fn take(&mut self, bytes: &[u8]) {
        *self = Self::default();
        for record in bytes.chunks_exact(RECORD) {
            let (tag, value) = record.split_at(2);
            let tag = tag.iter().rev().fold(0, |n, &b| n << 8 | usize::from(b));
            let value = value.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
            if let Some(slot) = self.values.get_mut(tag) {
                *slot = Some(value);
            }
        }
    }

    /// What the guest said, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let named = NAMES.into_iter().zip(self.values);
        named.filter_map(|(name, value)| Some((name, value?)))
    }

    /// One of them.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.iter()
            .find_map(|(own, value)| (own == name).then_some(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_and_strange_ones_left_out() {
        let mut statistics = Statistics::default();
        let record = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let bytes = [
            record(4, 123 << 20),
            record(999, 1),
            record(5, 456 << 20),
            vec![1, 2, 3],
        ];
        statistics.take(&bytes.concat());
        let all: Vec<_> = statistics.iter().collect();
        assert_eq!(
            all,
            [("free_memory", 123 << 20), ("total_memory", 456 << 20)]
        );
        assert_eq!(statistics.get("swap_in"), None);
        statistics.take(&[]);
        assert_eq!(statistics.iter().count(), 0);
    }
}
