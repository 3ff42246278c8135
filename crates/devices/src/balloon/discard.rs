//! Giving memory back to the host.
#![allow(unsafe_code)] // madvise

use husk_virtio::GuestMemory;
use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Give whole pages of `length` bytes at `address` back to the host: they read as zeroes, or as the file that was mapped
/// there, until they are written again. What is not memory, or no whole page, stays as it is: a guest that lies harms itself.
/// The bytes that went back.
pub fn discard(mem: &GuestMemory, address: u64, length: u64) -> u64 {
    const PAGE: u64 = 4096;
    let Some(end) = address.checked_add(length) else {
        return 0;
    };
    let Some(start) = address.checked_next_multiple_of(PAGE) else {
        return 0;
    };
    let Some(size) = (end & !(PAGE - 1)).checked_sub(start).filter(|&s| s > 0) else {
        return 0;
    };
    let Ok(slice) = mem.get_slice(GuestAddress(start), size as usize) else {
        return 0;
    };
    let host = slice.ptr_guard_mut();
    if !(host.as_ptr() as u64).is_multiple_of(PAGE) {
        return 0;
    }
    // Of memory that others map as well, the page itself must go, not only its place here.
    let region = mem.find_region(GuestAddress(start));
    let advice = match region.is_some_and(|region| region.file_offset().is_some()) {
        true => Advice::LinuxRemove,
        false => Advice::LinuxDontNeed,
    };
    // SAFETY: the range lies within the mapping of guest memory, which `mem` keeps alive, and is whole pages of it. Nobody
    // holds references into guest memory: it is read and written by volatile copies, by system calls and by KVM, all of
    // which must expect the guest to change it at any time.
    let result = unsafe { madvise(host.as_ptr().cast(), size as usize, advice) };
    if let Err(e) = result {
        log::debug!("{size} bytes of guest memory were not given back: {e}");
        return 0;
    }
    size
}
