//! Copies of files with holes.

use rustix::fs::{SeekFrom, copy_file_range, ftruncate, ioctl_ficlone, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes that are copied at once where the host's kernel does not.
pub(crate) const PIECE: usize = 1 << 20;

/// Make `to`, which is empty, a copy of the `size` bytes of `from`, which nobody writes to meanwhile: where the file system can share
/// blocks of files, in an instant, else what is no hole.
pub fn copy_file(from: &File, to: &File, size: u64) -> io::Result<()> {
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    ftruncate(to, size)?;
    let data = |at, length| copy(from, to, at, length);
    each_extent(from, 0, size, data, |_, _| Ok(()))
}

/// Call `data` and `hole` for what lies between two offsets of a file: offset and length.
pub(crate) fn each_extent(
    file: &File,
    start: u64,
    end: u64,
    mut data: impl FnMut(u64, u64) -> io::Result<()>,
    mut hole: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let begin = match seek(file, SeekFrom::Data(at)) {
            Ok(begin) => begin.clamp(at, end),
            Err(Errno::NXIO) => end,
            // Nothing is known of holes: all of it is data.
            Err(_) => at,
        };
        if begin > at {
            hole(at, begin - at)?;
        }
        if begin == end {
            break;
        }
        let behind = seek(file, SeekFrom::Hole(begin)).unwrap_or(end).min(end);
        // Where a file is changed meanwhile, it is at least not for ever.
        let behind = if behind > begin { behind } else { end };
        data(begin, behind - begin)?;
        at = behind;
    }
    Ok(())
}

/// Copy a part of a file to the same place in another.
pub(crate) fn copy(from: &File, to: &File, start: u64, length: u64) -> io::Result<()> {
    let (mut at, end) = (start, start + length);
    while at < end {
        let (mut read, mut written) = (at, at);
        let rest = usize::try_from(end - at).unwrap_or(usize::MAX);
        match copy_file_range(from, Some(&mut read), to, Some(&mut written), rest) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => at += count as u64,
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP) => {
                return copy_by_hand(from, to, at, end);
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

pub(crate) fn copy_by_hand(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    let mut at = start;
    while at < end {
        let length = (end - at).min(PIECE as u64) as usize;
        let piece = buffer.get_mut(..length).unwrap_or_default();
        from.read_exact_at(piece, at)?;
        to.write_all_at(piece, at)?;
        at += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_has_the_data_and_the_holes() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let mut options = File::options();
            options.read(true).write(true).create_new(true);
            options.open(dir.path().join(name)).unwrap()
        };
        let (image, copy) = (file("image"), file("copy"));
        image.set_len(64 << 20).unwrap();
        for at in [0, 1 << 20, (64 << 20) - 4096] {
            image.write_all_at(&[at as u8 | 1; 4096], at).unwrap();
        }
        copy_file(&image, &copy, 64 << 20).unwrap();
        image.write_all_at(b"later", 0).unwrap();
        let about = copy.metadata().unwrap();
        assert_eq!(about.len(), 64 << 20);
        assert!(about.blocks() * 512 < 4 << 20, "{}", about.blocks());
        for at in [0, 1 << 20, (64 << 20) - 4096] {
            let mut piece = [0; 4096];
            copy.read_exact_at(&mut piece, at).unwrap();
            assert_eq!(piece, [at as u8 | 1; 4096], "{at}");
        }
        copy_by_hand(&image, &copy, 0, 8192).unwrap();
        let mut piece = [0; 5];
        copy.read_exact_at(&mut piece, 0).unwrap();
        assert_eq!(&piece, b"later");
    }
}
