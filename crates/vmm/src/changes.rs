//! Which pages of memory may differ from the last snapshot of a VM: what a diff has.
//!
//! KVM notes what the guest and KVM write, where it was told to, and what the monitor's devices write is noted in the same log
//! ([`WriteLog`]). Where nobody was told, and memory is the private mapping of a snapshot's file, the pages that are not the file's any
//! more are known all the same: those since the load.

use crate::error::Error;
use crate::memory::GuestMemory;
use crate::snapshot::Snapshot;
use husk_config::{CreateSnapshot, SnapshotType};
use husk_snapshot::{Pages, identity};
use husk_virtio::WriteLog;
use std::path::Path;
use std::sync::Arc;

/// What is known of a VM's changes.
pub struct Changes {
    source: Source,
    base: Option<Base>,
}

/// Who knows which pages were written.
enum Source {
    Nobody,
    /// KVM and the devices; the log is empty after each snapshot.
    Log(Arc<WriteLog>),
    /// The mapping of the file from which the VM goes on. Pages that were found to be the VM's own at a snapshot stay here, for one
    /// that is given back to the host is the file's again, and not what that snapshot has.
    Mapping(WriteLog),
}

/// The snapshot to which a diff would be the difference.
#[derive(Debug)]
pub struct Base {
    id: String,
    /// Its files, whatever they are called by now.
    files: Vec<(u64, u64)>,
}

impl Base {
    /// The snapshot called `id`, if that is its name, in these files.
    pub fn of(id: Option<&str>, files: [&Path; 2]) -> Option<Self> {
        let files = files.map(std::fs::symlink_metadata);
        Some(Self {
            id: id?.into(),
            files: files.iter().flatten().map(identity).collect(),
        })
    }
}

/// What [`Changes::take`] has taken out of the log.
pub struct Taken(Vec<Vec<u64>>);

impl Taken {
    /// The pages, by their places in a memory file.
    pub fn pages(&self, memory: &GuestMemory) -> Pages {
        let sizes = memory
            .slots()
            .iter()
            .map(|(range, _)| range.size / husk_snapshot::PAGE);
        Pages::of_bits(self.0.iter().map(Vec::as_slice).zip(sizes))
    }
}

impl Changes {
    /// Of a VM that begins now, or goes on from what was `saved`.
    pub fn new(memory: &GuestMemory, saved: Option<&mut Snapshot>) -> Self {
        let source = match (memory.log(), &saved) {
            (Some(log), _) => Source::Log(Arc::clone(log)),
            (None, Some(_)) if memory.is_one_file() => Source::Mapping(memory.new_log()),
            (None, _) => Source::Nobody,
        };
        Self {
            source,
            base: saved.and_then(|saved| saved.base.take()),
        }
    }

    /// Of which snapshot the one that is wanted is to be a diff. None: it is to be complete, because that is wanted or there is none.
    pub fn parent(
        &self,
        create: &CreateSnapshot,
        memory: &GuestMemory,
    ) -> Result<Option<String>, Error> {
        if create.snapshot_type == SnapshotType::Full {
            return Ok(None);
        }
        match &self.source {
            // What was mapped since is of another file.
            Source::Mapping(_) if !memory.is_one_file() => return Err(Error::NotTracked),
            Source::Nobody => return Err(Error::NotTracked),
            _ if memory.is_shared() => return Err(Error::SharedDiff),
            _ => {}
        }
        let Some(base) = &self.base else {
            return Ok(None);
        };
        for path in [&create.snapshot_path, &create.mem_file_path] {
            let there = std::fs::symlink_metadata(path);
            if there.is_ok_and(|there| base.files.contains(&identity(&there))) {
                return Err(husk_snapshot::Error::OverBase(path.clone()).into());
            }
        }
        Ok(Some(base.id.clone()))
    }

    /// What may have changed since the last snapshot. The guest and the devices stand still from before until this has returned; what they
    /// write later belongs to the next.
    pub fn take(&self, kvm: &husk_kvm::Vm, memory: &GuestMemory) -> Result<Taken, Error> {
        let slots = memory.slots().iter().zip(0u32..).enumerate();
        Ok(Taken(match &self.source {
            Source::Nobody => Vec::new(),
            Source::Log(log) => {
                // KVM forgets what it tells: when it fails at the second, the log has what was told of the first.
                for (index, ((range, _), slot)) in slots {
                    log.add(index, &kvm.dirty_log(slot, range.size)?);
                }
                log.take()
            }
            Source::Mapping(seen) => {
                memory.note_own_pages(seen)?;
                seen.bits()
            }
        }))
    }

    /// Memory is about to be mapped from another file, which holds what it holds now: what tells of changes by the mapping would forget
    /// those until now.
    pub fn before_freeze(&self, memory: &GuestMemory) -> Result<(), Error> {
        match &self.source {
            Source::Mapping(seen) => Ok(memory.note_own_pages(seen)?),
            Source::Nobody | Source::Log(_) => Ok(()),
        }
    }

    /// There was no snapshot in the end: the next one has these as well.
    pub fn put_back(&self, taken: &Taken) {
        // What the mapping tells is not forgotten.
        if let Source::Log(log) = &self.source {
            let regions = taken.0.iter().enumerate();
            regions.for_each(|(index, bits)| log.add(index, bits));
        }
    }

    /// A snapshot called `id` is complete: the next diff is one to it.
    pub fn kept(&mut self, id: &str, create: &CreateSnapshot) {
        self.base = Base::of(Some(id), [&create.snapshot_path, &create.mem_file_path]);
    }
}
