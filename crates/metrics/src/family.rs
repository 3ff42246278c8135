//! What there may be several of.

use crate::section::Section;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// Devices that were taken away and that no line has told of yet, at most; the oldest go first.
const MOST_GONE: usize = 64;

/// How the members of a family are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Naming {
    /// A VM has one at most: it needs no name.
    Single,
    /// By this label in Prometheus; JSON has all together only.
    Label(&'static str),
    /// By this label in Prometheus; JSON has each beside all together. They may come and go.
    Listed(&'static str),
}

/// Structures of the same kind, one for each device, by name.
///
/// A device takes its own when it is made, and keeps it. When the device is dropped, a last line of JSON tells what it had
/// counted, and it is forgotten. One that is made again under the same name before (a guest that reboots) goes on counting.
#[derive(Debug)]
pub struct Family<T> {
    naming: Naming,
    members: Mutex<Vec<(Arc<str>, Arc<T>)>>,
}

impl<T: Section + Default + 'static> Family<T> {
    pub(crate) const fn new(naming: Naming) -> Self {
        Self {
            naming,
            members: Mutex::new(Vec::new()),
        }
    }

    /// What the device called `name` counts in.
    pub fn member(&self, name: &str) -> Arc<T> {
        let mut members = self.lock();
        if let Some((_, own)) = members.iter().find(|(id, _)| **id == *name) {
            return Arc::clone(own);
        }
        let gone = members.iter().filter(|(_, own)| is_gone(own)).count();
        if gone >= MOST_GONE
            && let Some(oldest) = members.iter().position(|(_, own)| is_gone(own))
        {
            members.remove(oldest);
        }
        let own = Arc::new(T::default());
        members.push((name.into(), Arc::clone(&own)));
        own
    }

    pub(crate) fn naming(&self) -> Naming {
        self.naming
    }

    pub(crate) fn all(&self) -> Vec<(Arc<str>, Arc<T>)> {
        self.lock().clone()
    }

    /// Call `what` with all members; with none while somebody else is at the list, who may be the thread that a signal has
    /// interrupted. Allocates nothing and does not wait.
    pub(crate) fn with_all_at_once(&self, what: impl FnOnce(&[(Arc<str>, Arc<T>)])) {
        match self.members.try_lock() {
            Ok(members) => what(&members),
            Err(TryLockError::Poisoned(e)) => what(&e.into_inner()),
            Err(TryLockError::WouldBlock) => what(&[]),
        }
    }

    pub(crate) fn forget_gone(&self) {
        if matches!(self.naming, Naming::Listed(_)) {
            self.lock().retain(|(_, own)| !is_gone(own));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Arc<str>, Arc<T>)>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The list is the only one that still has it.
fn is_gone<T>(own: &Arc<T>) -> bool {
    Arc::strong_count(own) == 1
}
