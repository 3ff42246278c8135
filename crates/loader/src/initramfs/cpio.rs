//! A writer for cpio's newc format without checksums, as in Linux's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::collections::BTreeSet;

use crate::Error;

/// An archive in the making. Times, owners and devices are zero and inode numbers count from 1, so
/// that equal contents give equal bytes.
///
/// Names are relative to the root, without a leading slash. Directories on the way to a name are
/// made as needed, with mode 0755. Of two entries with one name, the guest's kernel keeps the later.
#[derive(Debug, Default)]
pub struct Archive {
    data: Vec<u8>,
    inode: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory. `mode` is the permission bits; others are ignored.
    ///
    /// # Errors
    /// [`Error::Name`] if `name` cannot be one; so for all that follow.
    pub fn directory(&mut self, name: &str, mode: u32) -> Result<(), Error> {
        self.parents(name)?;
        self.directories.insert(name.to_owned());
        self.entry(name, S_IFDIR | mode & PERMISSIONS, (0, 0), b"")
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// [`Error::FileTooLarge`] from 4 GiB on.
    pub fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<(), Error> {
        self.parents(name)?;
        self.entry(name, S_IFREG | mode & PERMISSIONS, (0, 0), data)
    }

    /// Adds a symbolic link to `target`, which may be any text without NUL.
    ///
    /// # Errors
    /// [`Error::Name`] also for the target.
    pub fn symlink(&mut self, name: &str, target: &str) -> Result<(), Error> {
        if target.is_empty() || target.len() >= MAX_NAME || target.contains('\0') {
            return Err(Error::Name {
                name: target.to_owned(),
            });
        }
        self.parents(name)?;
        self.entry(name, S_IFLNK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device node.
    ///
    /// # Errors
    /// [`Error::Name`].
    pub fn character_device(
        &mut self,
        name: &str,
        mode: u32,
        major: u32,
        minor: u32,
    ) -> Result<(), Error> {
        self.parents(name)?;
        self.entry(name, S_IFCHR | mode & PERMISSIONS, (major, minor), b"")
    }

    /// Ends the archive and returns its bytes, a multiple of 4.
    ///
    /// # Errors
    /// None today; the trailer is an entry like any other.
    pub fn finish(mut self) -> Result<Vec<u8>, Error> {
        self.inode = 0;
        self.write("TRAILER!!!", 0, 0, (0, 0), b"")?;
        Ok(self.data)
    }

    fn parents(&mut self, name: &str) -> Result<(), Error> {
        check_name(name)?;
        for (end, _) in name.match_indices('/') {
            let parent = name.get(..end).unwrap_or_default();
            if self.directories.insert(parent.to_owned()) {
                self.entry(parent, S_IFDIR | 0o755, (0, 0), b"")?;
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        device: (u32, u32),
        data: &[u8],
    ) -> Result<(), Error> {
        self.inode = self.inode.saturating_add(1);
        self.write(name, self.inode, mode, device, data)
    }

    fn write(
        &mut self,
        name: &str,
        inode: u32,
        mode: u32,
        (major, minor): (u32, u32),
        data: &[u8],
    ) -> Result<(), Error> {
        let size = u32::try_from(data.len()).map_err(|_| Error::FileTooLarge {
            name: name.to_owned(),
            size: data.len() as u64,
        })?;
        let links = if mode & S_IFDIR != 0 { 2 } else { 1 };
        // Names are shorter than 4096 bytes: `check_name`.
        let name_size = name.len() as u32 + 1;
        self.data.extend_from_slice(b"070701");
        let fields = [
            inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0,
        ];
        for field in fields {
            self.data
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.data.extend_from_slice(name.as_bytes());
        self.data.push(0);
        self.pad();
        self.data.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    /// Headers, names and contents each begin at a multiple of 4.
    fn pad(&mut self) {
        self.data.resize(self.data.len().next_multiple_of(4), 0);
    }
}

/// Linux's PATH_MAX: longer names are skipped by the kernel's unpacker without a word.
const MAX_NAME: usize = 4096;

const PERMISSIONS: u32 = 0o7777;
const S_IFCHR: u32 = 0o020_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

fn check_name(name: &str) -> Result<(), Error> {
    let odd = |part: &str| part.is_empty() || part == "." || part == "..";
    // The trailer's name ends an archive wherever it stands.
    if name.len() >= MAX_NAME
        || name.contains('\0')
        || name == "TRAILER!!!"
        || name.split('/').any(odd)
    {
        return Err(Error::Name {
            name: name.to_owned(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_documented_bytes() {
        let mut archive = Archive::new();
        archive.file("ab", 0o644, b"hello").unwrap();
        let data = archive.finish().unwrap();
        let expected = concat!(
            "070701",
            "00000001000081a40000000000000000000000010000000000000005",
            "00000000000000000000000000000000",
            "0000000300000000",
            // The header's 110 bytes and the name's 3, padded to 116.
            "ab\0\0\0\0",
            "hello\0\0\0",
        );
        assert_eq!(&data[..expected.len()], expected.as_bytes());
        assert_eq!(data.len() % 4, 0);
        assert!(data[expected.len()..].starts_with(b"070701"));
    }

    #[test]
    fn missing_parents_are_made_once() {
        let mut archive = Archive::new();
        archive.file("a/b/c", 0o644, b"").unwrap();
        archive.file("a/b/d", 0o644, b"").unwrap();
        let data = archive.finish().unwrap();
        let count = |name: &[u8]| data.windows(name.len()).filter(|w| *w == name).count();
        assert_eq!(count(b"00a\0"), 1);
        assert_eq!(count(b"00a/b\0"), 1);
    }

    #[test]
    fn a_device_has_its_numbers() {
        let mut archive = Archive::new();
        archive.character_device("console", 0o600, 5, 1).unwrap();
        let data = archive.finish().unwrap();
        assert_eq!(&data[14..22], b"00002180");
        assert_eq!(&data[78..94], b"0000000500000001");
    }

    #[test]
    fn names_that_leave_the_root_or_break_the_archive_are_refused() {
        let long = "x".repeat(4096);
        for name in [
            "",
            "/a",
            "a/",
            "a//b",
            "../a",
            "a/..",
            ".",
            "a\0b",
            "TRAILER!!!",
            &long,
        ] {
            let error = Archive::new().file(name, 0o644, b"").unwrap_err();
            assert!(matches!(error, Error::Name { .. }), "{name:?}");
        }
        assert!(Archive::new().symlink("a", "b\0c").is_err());
    }
}
