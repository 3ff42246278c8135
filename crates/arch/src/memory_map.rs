//! Where guest memory lies, and what the guest is told of it.

use crate::layout::{HIGH_MEMORY, HOLE_END, HOLE_START, LOW_MEMORY_END};

/// A range of guest-physical addresses: start and length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
}

impl Range {
    /// First address behind the range.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }
}

/// Type of an E820 and of a PVH memory map entry: usable memory.
pub const TYPE_RAM: u32 = 1;
/// Type of an E820 and of a PVH memory map entry: not to be touched.
pub const TYPE_RESERVED: u32 = 2;

/// The one or two ranges that `size` bytes of memory fill: below the hole and, for the rest, above it.
///
/// None when the upper one would run past the end of a 64-bit address.
pub fn memory_ranges(size: u64) -> Option<(Range, Option<Range>)> {
    let low = Range {
        start: 0,
        size: size.min(HOLE_START),
    };
    let rest = size - low.size;
    HOLE_END.checked_add(rest)?;
    let high = (rest > 0).then_some(Range {
        start: HOLE_END,
        size: rest,
    });
    Some((low, high))
}

/// The memory map that the guest is given, in E820's terms, for `size` bytes of memory.
pub fn e820(size: u64) -> Vec<(Range, u32)> {
    let range = |start: u64, end: u64| Range {
        start,
        size: end.saturating_sub(start),
    };
    let Some((low, high)) = memory_ranges(size) else {
        return Vec::new();
    };
    let mut map = vec![
        (range(0, LOW_MEMORY_END), TYPE_RAM),
        // ACPI tables and the MP table live here.
        (range(LOW_MEMORY_END, HIGH_MEMORY), TYPE_RESERVED),
        (range(HIGH_MEMORY, low.end()), TYPE_RAM),
    ];
    map.extend(high.map(|high| (high, TYPE_RAM)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_splits_at_the_hole_and_none_is_lost() {
        for size in [32 << 20, 3 * GIB - 1, 3 * GIB, 3 * GIB + 4096, 512 * GIB] {
            let (low, high) = memory_ranges(size).unwrap();
            assert_eq!(low.size + high.map_or(0, |h| h.size), size);
            assert!(low.end() <= HOLE_START);
            assert!(high.is_none_or(|h| h.start == HOLE_END && size > 3 * GIB));
        }
        assert_eq!(memory_ranges(u64::MAX), None);
    }

    #[test]
    fn the_map_covers_all_memory_without_overlap() {
        let map = e820(6 * GIB);
        assert_eq!(map.len(), 4);
        assert!(map.windows(2).all(|w| w[0].0.end() <= w[1].0.start));
        let ram: u64 = map
            .iter()
            .filter(|e| e.1 == TYPE_RAM)
            .map(|e| e.0.size)
            .sum();
        assert_eq!(ram, 6 * GIB - (HIGH_MEMORY - LOW_MEMORY_END));
    }
}
