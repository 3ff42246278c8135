//! Interrupts of queues that another process serves.

use husk_pci::Msix;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An event for each queue, to which that process writes, whatever the queue's vector is at the time. It is connected with the vector
/// while messages of that may be sent. What is written meanwhile stays in the event, and is sent when it is connected again: so no
/// interrupt is lost while a vector is masked or changed, and the process need not hear of either.
pub(super) struct Remote {
    events: Vec<EventFd>,
    /// The vector of each, while it is connected.
    connected: Mutex<Vec<Option<u16>>>,
}

impl Remote {
    /// For so many queues.
    pub(super) fn new(queues: usize) -> std::io::Result<Self> {
        let event = |_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(Self {
            events: (0..queues).map(event).collect::<std::io::Result<_>>()?,
            connected: Mutex::new(vec![None; queues]),
        })
    }

    /// The event of queue `index`.
    pub(super) fn event(&self, index: u16) -> Option<RawFd> {
        self.events.get(usize::from(index)).map(AsRawFd::as_raw_fd)
    }

    /// Something has changed: a queue's vector, or what is masked.
    pub(super) fn follow(&self, msix: &Msix, vectors: &[AtomicU16]) {
        let mut all = self.lock();
        for ((event, connected), vector) in self.events.iter().zip(all.iter_mut()).zip(vectors) {
            let vector = vector.load(Ordering::Acquire);
            let wanted = msix.is_open(vector).then_some(vector);
            if *connected == wanted {
                continue;
            }
            if let Some(before) = connected.take() {
                msix.sink().disconnect(before, event);
            }
            if let Some(vector) = wanted {
                match msix.sink().connect(vector, event) {
                    Ok(()) => *connected = wanted,
                    // A guest can give a vector a message that KVM refuses, as often as it likes.
                    Err(e) => log::debug!("a queue's interrupts are not connected: {e}"),
                }
            }
        }
    }

    /// The function goes: what that process still writes must not reach whoever has the vectors next.
    pub(super) fn disconnect(&self, msix: &Msix) {
        let mut all = self.lock();
        for (event, connected) in self.events.iter().zip(all.iter_mut()) {
            if let Some(vector) = connected.take() {
                msix.sink().disconnect(vector, event);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<u16>>> {
        self.connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
