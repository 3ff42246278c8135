//! What clones of a VM go on from.

use crate::devices::{Disk, Opened};
use crate::error::Error;
use crate::snapshot::{Saved, Snapshot};
use husk_config::{Fork, Overlay, VmConfig};
use husk_devices::block::{Block, unnamed, usual_directory};
use husk_mmds::Mmds;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

/// A VM as it was at some moment: its state, its memory, and its disks, all of which clones share until they write to it.
pub struct Template {
    saved: Saved,
    /// Copies of disks that the VM goes on writing to, by name.
    disks: BTreeMap<String, File>,
    /// What the guest's metadata service answered from, and how many bytes a clone's may have.
    metadata: serde_json::Value,
    metadata_limit: usize,
}

/// Bytes of metadata that a clone has more than the VM: who it is.
const OWN_METADATA: usize = 4096;

/// Which clone it is.
pub struct CloneOf<'a> {
    /// Its number.
    pub number: u32,
    /// Its name.
    pub id: &'a str,
    /// How it was asked for.
    pub fork: &'a Fork,
}

impl Template {
    pub(crate) fn new(
        snapshot: Snapshot,
        config: VmConfig,
        memory: File,
        disks: BTreeMap<String, File>,
    ) -> Self {
        Self {
            saved: Saved::of_template(snapshot, config, memory),
            disks,
            metadata: serde_json::Value::Null,
            metadata_limit: 0,
        }
    }

    /// Copy the disks that a guest writes to, but for those that every clone has a file of its own for. Nobody writes to them meanwhile.
    pub(crate) fn copy_disks(
        config: &VmConfig,
        fork: &Fork,
    ) -> Result<BTreeMap<String, File>, Error> {
        let mut disks = BTreeMap::new();
        for drive in &config.drives {
            let has_own = fork
                .drive_overrides
                .iter()
                .any(|own| own.drive_id == drive.drive_id);
            if has_own || drive.read_only() {
                continue;
            }
            let id = &drive.drive_id;
            let copy = copy_image(drive.path()).map_err(|e| Error::CopyDisk(id.clone(), e))?;
            disks.insert(id.clone(), copy);
        }
        Ok(disks)
    }

    pub(crate) fn with_metadata(mut self, of: &Mmds) -> Self {
        self.metadata = of.get();
        self.metadata_limit = of.limit().saturating_add(OWN_METADATA);
        self
    }

    /// Bytes that a clone's metadata may have.
    pub fn metadata_limit(&self) -> usize {
        self.metadata_limit
    }

    /// The descriptors that a process needs for it.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let disks = self.disks.values().map(File::as_raw_fd);
        disks.chain(self.saved.descriptor()).collect()
    }

    /// What a clone is built from, with its disks open, and its guest's metadata.
    pub(crate) fn for_clone(
        self,
        clone: &CloneOf<'_>,
        opened: &mut Opened,
    ) -> Result<(Saved, serde_json::Value), Error> {
        let Self {
            mut saved,
            mut disks,
            mut metadata,
            ..
        } = self;
        let mut random = [0; 8];
        crate::fill_random(&mut random)?;
        clone.fork.apply(clone.number, &mut saved.config, random)?;
        let own = |id: &str| {
            clone
                .fork
                .drive_overrides
                .iter()
                .any(|own| own.drive_id == id)
        };
        for drive in &mut saved.config.drives {
            let id = drive.drive_id.clone();
            if drive.read_only() || own(&id) {
                continue;
            }
            let base = disks.remove(&id).ok_or_else(|| Error::NoCopy(id.clone()))?;
            drive.direct = false;
            drive.overlay = Some(Overlay::default());
            let block =
                Block::over(drive, base).map_err(|e| Error::Device(id.clone(), Box::new(e)))?;
            opened.drives.insert(id, Disk::Own(Box::new(block)));
        }
        // By this a hook in the guest learns who it is.
        if let serde_json::Value::Object(fields) = &mut metadata {
            let own = serde_json::json!({ "id": clone.id, "clone": clone.number.to_string() });
            fields.insert("husk".into(), own);
        }
        Ok((saved, metadata))
    }
}

/// A copy of the image at `path`, in a file without a name.
fn copy_image(path: &Path) -> io::Result<File> {
    let image = File::open(path)?;
    let about = image.metadata()?;
    if !about.is_file() {
        let why = "it is no regular file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let beside = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    // Blocks can be shared on one file system only.
    let copy = match unnamed(beside.unwrap_or(Path::new("."))) {
        Ok(copy) => copy,
        Err(_) => unnamed(&usual_directory())?,
    };
    husk_snapshot::copy_file(&image, &copy, about.len())?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_of_an_image_has_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, b"image").unwrap();
        let copy = copy_image(&path).unwrap();
        let count = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(count, 1, "it has no name");
        assert_eq!(copy.metadata().unwrap().len(), 5);
        assert!(copy_image(dir.path()).is_err(), "a directory");
    }
}
