use super::*;
use crate::testing::{Buffers, DriverQueue, Layout, MEMORY};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

/// Where a second region begins, with a gap before it.
const SECOND: u64 = 2 * MEMORY;

struct Nobody;

impl Interrupt for Nobody {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
    fn needs_reset(&self) {}
}

/// A queue of eight descriptors in memory of two regions, from both sides.
fn queue() -> (DriverQueue, ActiveQueue) {
    let size = MEMORY as usize;
    let ranges = [(GuestAddress(0), size), (GuestAddress(SECOND), size)];
    let mem = GuestMemory::from_ranges(&ranges).unwrap();
    let state = QueueState {
        size: 8,
        descriptors: 0x10_0000,
        available: 0x10_1000,
        used: 0x10_2000,
        ..QueueState::default()
    };
    let driver = DriverQueue::new(0, state, mem.clone(), true);
    let ends: (_, Arc<dyn Interrupt>) = (
        Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        Arc::new(Nobody),
    );
    let device = ActiveQueue::new(0, driver.state, true, mem, ends).unwrap();
    (driver, device)
}

fn add(driver: &mut DriverQueue, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
    let buffers = Buffers {
        readable: readable.to_vec(),
        writable: writable.to_vec(),
    };
    driver.add(&buffers, Layout::Direct, 0)
}

fn buffers(list: &[(u64, u32)]) -> Vec<Buffer> {
    list.iter()
        .map(|&(address, length)| Buffer {
            address: GuestAddress(address),
            length,
        })
        .collect()
}

#[test]
fn what_a_device_writes_is_noted() {
    for event_idx in [true, false] {
        let (mut driver, device) = queue();
        let log = Arc::new(WriteLog::new([(0, MEMORY), (SECOND, MEMORY)]));
        let mut device = device.log_writes(Some(Arc::clone(&log)));
        device.event_idx = event_idx;
        let noted = |log: &WriteLog| {
            let mut pages = Vec::new();
            for (region, words) in log.take().iter().enumerate() {
                let bits = words.iter().zip((0..).step_by(64));
                let bits =
                    bits.flat_map(|(word, at)| (0..64).map(move |bit| (word >> bit & 1, at + bit)));
                pages.extend(
                    bits.filter(|(set, _)| *set == 1)
                        .map(|(_, page)| (region, page)),
                );
            }
            pages
        };
        let used = (0, 0x10_2000 / 4096);
        add(
            &mut driver,
            &[(0x5000, 10)],
            &[(0x1fff, 2), (SECOND + 0x3000, 1)],
        );
        let mut chain = Chain::default();
        assert!(device.pop(&mut chain).unwrap());
        assert_eq!(noted(&log), [(0, 1), (0, 2), (1, 3)]);
        // Buffers that are in the chain already were noted before.
        add(&mut driver, &[], &[(0x7000, 4096)]);
        assert!(device.pop_more(&mut chain).unwrap());
        assert_eq!(noted(&log), [(0, 7)]);
        device.add_used(chain.head, 1).unwrap();
        assert_eq!(noted(&log), [used]);
        device.publish().unwrap();
        assert_eq!(noted(&log), [used]);
        device.enable_kicks().unwrap();
        assert_eq!(noted(&log), [used]);
        device.disable_kicks().unwrap();
        assert_eq!(noted(&log).len(), usize::from(!event_idx));
        device.note_written(0x9000, 8192);
        assert_eq!(noted(&log), [(0, 9), (0, 10)]);
    }
}

#[test]
fn chains_follow_each_other_in_one_list() {
    let (mut driver, mut device) = queue();
    let (a, b, c) = ((0x1000, 10), (SECOND, 20), (MEMORY - 30, 30));
    let heads = [
        add(&mut driver, &[], &[a, b]),
        add(&mut driver, &[c], &[]),
        add(&mut driver, &[], &[c]),
    ];
    let mut chain = Chain::default();
    for head in heads {
        assert!(device.pop_more(&mut chain).unwrap());
        assert_eq!(chain.head, head);
    }
    assert!(!device.pop_more(&mut chain).unwrap());
    // Each is in order by itself: readable before writable.
    assert_eq!(chain.readable, buffers(&[c]));
    assert_eq!(chain.writable, buffers(&[a, b, c]));
    device.undo_pop();
    assert!(device.pop(&mut chain).unwrap());
    assert_eq!(chain.readable, []);
    assert_eq!(chain.writable, buffers(&[c]));
}

#[test]
fn a_buffer_is_checked_wherever_the_one_before_was() {
    let ends_inside = [(MEMORY - 1, 1), (SECOND, 1), (SECOND + MEMORY - 8, 8)];
    let outside = [
        (MEMORY - 1, 2),
        (MEMORY, 1),
        (SECOND - 1, 2),
        (SECOND + MEMORY - 1, 2),
        (SECOND + MEMORY, 1),
        (u64::MAX, 1),
        (u64::MAX - 1, u32::MAX),
        (0, u32::MAX),
    ];
    for before in ends_inside {
        for bad in outside {
            for alone in [true, false] {
                let (mut driver, mut device) = queue();
                add(&mut driver, &[], &[before]);
                let (two, one) = ([(0x1000, 4), bad], [bad]);
                let list: &[(u64, u32)] = if alone { &one } else { &two };
                add(&mut driver, &[], list);
                let mut chain = Chain::default();
                assert!(device.pop(&mut chain).unwrap());
                assert_eq!(chain.writable, buffers(&[before]));
                let result = device.pop(&mut chain);
                let refused = matches!(
                    result,
                    Err(QueueError::Buffer { address, size }) if (address, size) == bad
                );
                assert!(refused, "{bad:x?} behind {before:x?}: {result:?}");
            }
        }
    }
}

#[test]
fn a_chain_of_one_descriptor_keeps_the_rules_of_others() {
    let (mut driver, mut device) = queue();
    let mut chain = Chain::default();
    // Empty, wherever.
    driver.describe(7, u64::MAX, 0, 2, 0);
    driver.make_available(7);
    assert!(device.pop(&mut chain).unwrap());
    assert!(chain.readable.is_empty() && chain.writable.is_empty());
    for head in [8, u16::MAX] {
        let (mut driver, mut device) = queue();
        driver.make_available(head);
        let result = device.pop(&mut chain);
        assert!(matches!(result, Err(QueueError::NoDescriptor(own)) if own == head));
    }
    // The next one does not exist, or is the same one.
    for (next, wanted) in [(8, "descriptor 8"), (3, "longer than 8")] {
        let (mut driver, mut device) = queue();
        driver.describe(3, 0x1000, 1, 3, next);
        driver.make_available(3);
        let error = device.pop(&mut chain).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}
