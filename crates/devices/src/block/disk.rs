//! The file behind a disk: a raw image or a block device of the host.

use super::{Error, SECTOR, io};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags};
use std::fs::File;
use std::path::{Path, PathBuf};

/// The sector size that O_DIRECT needs where the host does not say.
const COMMON_BLOCK: u32 = 512;
/// The largest block that a disk is presented with.
const LARGEST_BLOCK: u32 = 4096;

/// How a file is opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub read_only: bool,
    pub direct: bool,
}

/// An open, locked file.
#[derive(Debug)]
pub(super) struct Disk {
    pub file: File,
    pub path: PathBuf,
    /// It is a block device.
    pub is_device: bool,
    /// Bytes that the guest sees, whole blocks.
    pub capacity: u64,
    /// Bytes of which all offsets and lengths must be multiples, a power of two from 512 on.
    pub block_size: u32,
    /// Bytes that the host reads or writes at once, a power of two, at least `block_size`.
    pub physical_size: u32,
    /// What addresses of memory must be multiples of; 1 but for O_DIRECT.
    pub memory_align: usize,
    /// What the lengths of each part of memory must be multiples of; 1 but for O_DIRECT.
    pub length_align: usize,
    /// Device and inode, which tell files apart.
    identity: (u64, u64),
}

impl Disk {
    /// Open and lock the file at `path`.
    pub(super) fn open(path: &Path, access: Access) -> Result<Self, Error> {
        Self::open_beside(path, access, None).map(|(disk, _)| disk)
    }

    /// The same while `current` is open; also whether that is the same file, which is then not locked again.
    pub(super) fn open_beside(
        path: &Path,
        access: Access,
        current: Option<&Disk>,
    ) -> Result<(Self, bool), Error> {
        Self::of(open(path, access)?, path, access, current)
    }

    /// The same with a file that is open already.
    pub(super) fn of(
        file: File,
        path: &Path,
        access: Access,
        current: Option<&Disk>,
    ) -> Result<(Self, bool), Error> {
        let failed = |e| Error::Read(path.into(), e);
        let stat = rustix::fs::fstat(&file).map_err(|e| failed(e.into()))?;
        let is_device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            _ => return Err(Error::NotADisk(path.into())),
        };
        let mut disk = Self {
            file,
            path: path.into(),
            is_device,
            capacity: 0,
            block_size: COMMON_BLOCK,
            physical_size: u32::try_from(stat.st_blksize).unwrap_or(COMMON_BLOCK),
            memory_align: 1,
            length_align: 1,
            identity: (stat.st_dev, stat.st_ino),
        };
        disk.learn_blocks(access.direct);
        disk.read_size()?;
        let same = current.is_some_and(|current| current.identity == disk.identity);
        if !same {
            disk.lock(access)?;
        }
        Ok((disk, same))
    }

    /// Read the size anew; whether it has changed.
    pub(super) fn read_size(&mut self) -> Result<bool, Error> {
        let size = match self.is_device {
            true => rustix::fs::seek(&self.file, SeekFrom::End(0)).map_err(Into::into),
            false => self.file.metadata().map(|metadata| metadata.len()),
        };
        let size = size.map_err(|e| Error::Read(self.path.clone(), e))?;
        let rest = size % u64::from(self.block_size);
        if rest != 0 {
            log::warn!(
                "the last {rest} bytes of {} are less than a block of {} bytes: the guest does not see them",
                self.path.display(),
                self.block_size
            );
        }
        let before = std::mem::replace(&mut self.capacity, size - rest);
        Ok(before != self.capacity)
    }

    /// Sectors that the guest sees.
    pub(super) fn sectors(&self) -> u64 {
        self.capacity / SECTOR
    }

    fn learn_blocks(&mut self, direct: bool) {
        if self.is_device {
            let physical = rustix::fs::ioctl_blkpbszget(&self.file);
            self.physical_size = physical.unwrap_or(COMMON_BLOCK);
        }
        if direct {
            let logical = match self.is_device {
                true => rustix::fs::ioctl_blksszget(&self.file).unwrap_or(COMMON_BLOCK),
                false => COMMON_BLOCK,
            };
            let told =
                rustix::fs::statx(&self.file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
            let told = told.ok().filter(|told| {
                told.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && told.stx_dio_offset_align != 0
            });
            let (memory, offset) = told.map_or((logical, logical), |told| {
                (told.stx_dio_mem_align, told.stx_dio_offset_align)
            });
            self.block_size = power_of_two(offset);
            self.memory_align = memory.max(1) as usize;
            self.length_align = self.block_size as usize;
        }
        self.physical_size = power_of_two(self.physical_size).max(self.block_size);
    }

    fn lock(&self, access: Access) -> Result<(), Error> {
        match io::lock(&self.file, !access.read_only) {
            Ok(true) => Ok(()),
            Ok(false) if access.read_only => Err(Error::Written(self.path.clone())),
            Ok(false) => Err(Error::Used(self.path.clone())),
            Err(e) => {
                // Some network file systems have no locks.
                log::warn!(
                    "{} cannot be locked, and so is not protected from use by two VMs at once: {e}",
                    self.path.display()
                );
                Ok(())
            }
        }
    }
}

fn open(path: &Path, access: Access) -> Result<File, Error> {
    let mut flags = match access.read_only {
        true => OFlags::RDONLY,
        false => OFlags::RDWR,
    };
    flags |= OFlags::CLOEXEC;
    if access.direct {
        flags |= OFlags::DIRECT;
    }
    // Whatever is there, opening it must not wait: a FIFO without a writer, say.
    let opened = rustix::fs::open(path, flags | OFlags::NONBLOCK, Mode::empty());
    let file: File = match opened {
        Ok(fd) => fd.into(),
        Err(e) if e == rustix::io::Errno::INVAL && access.direct => {
            return Err(Error::Direct(path.into(), e.into()));
        }
        Err(e) if access.read_only => return Err(Error::Open(path.into(), e.into())),
        Err(e) => return Err(Error::OpenToWrite(path.into(), e.into())),
    };
    // But requests do wait.
    let kept = flags & OFlags::DIRECT;
    rustix::fs::fcntl_setfl(&file, kept).map_err(|e| Error::Read(path.into(), e.into()))?;
    Ok(file)
}

/// A size of blocks as this device can present it.
fn power_of_two(size: u32) -> u32 {
    size.clamp(COMMON_BLOCK, LARGEST_BLOCK).next_power_of_two()
}
