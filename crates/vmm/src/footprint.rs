//! What the process asks of the host for itself: memory that it gives back, and how its threads are scheduled.

use rustix::mm::{Advice, madvise};

const PAGE: usize = 4096;

unsafe extern "C" {
    // The linker's: where the executable begins in memory, and where its code ends.
    static __executable_start: u8;
    static etext: u8;
}

/// Let go of the pages of the executable's code and constants that were used so far. They come back from the host's page cache
/// when they are used again, a fault for each 64 KiB. What only starts a VM is not kept resident while the VM runs.
pub fn forget_code() {
    let start = (&raw const __executable_start).addr();
    let end = (&raw const etext).addr() & !(PAGE - 1);
    let Some(size) = end.checked_sub(start) else {
        return;
    };
    // SAFETY: the range is the executable's own segments of constants and code, which are mapped privately from its file and
    // never written: relocations are elsewhere. What is dropped is read again from the same file, which cannot be written
    // while it runs (ETXTBSY).
    let result = unsafe { madvise(start as *mut _, size, Advice::LinuxDontNeed) };
    if let Err(e) = result {
        log::debug!("the executable's pages are kept: {e}");
    }
}

/// Have this thread scheduled in batches (SCHED_BATCH): when it wakes up it does not preempt who runs. It still runs at once where
/// a processor is free.
pub fn schedule_in_batches() {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is this thread, and the parameter lives as long as the call.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &parameter) };
    if result != 0 {
        let e = std::io::Error::last_os_error();
        log::debug!("a thread is scheduled as any other: {e}");
    }
}

/// Have all threads allocate from one heap. libc would make one of its own for each, with five system calls and pages that nobody
/// else can use, and no thread of Husk's allocates so often that it would wait for another.
pub fn share_heap() {
    // SAFETY: it sets a number of libc's own, under libc's lock.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } != 1 {
        log::debug!("each thread has a heap of its own");
    }
}
