//! An image as it is now, for those who go on from there.

use super::overlay::{unnamed, usual_directory};
use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io::{Error as IoError, ErrorKind, Result as IoResult};
use std::path::Path;

/// Copy the image at `path`, which nobody writes to meanwhile, to a file without a name: where the file system can share blocks of files,
/// in an instant, else what is no hole.
///
/// # Errors
/// It is no regular file, or there is no room.
pub fn copy_image(path: &Path) -> IoResult<File> {
    let image = File::open(path)?;
    let about = image.metadata()?;
    if !about.is_file() {
        let why = "it is no regular file";
        return Err(IoError::new(ErrorKind::InvalidInput, why));
    }
    let beside = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    // Blocks can be shared on one file system only.
    if let Ok(copy) = unnamed(beside.unwrap_or(Path::new("."))) {
        if ioctl_ficlone(&copy, &image).is_ok() {
            return Ok(copy);
        }
        return fill(image, copy, about.len());
    }
    fill(image, unnamed(&usual_directory())?, about.len())
}

fn fill(image: File, copy: File, length: u64) -> IoResult<File> {
    copy.set_len(length)?;
    let mut at = 0;
    while at < length {
        let data = match seek(&image, SeekFrom::Data(at)) {
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            other => other?,
        };
        let end = seek(&image, SeekFrom::Hole(data))?;
        let (mut from, mut to) = (data, data);
        while from < end {
            let left = usize::try_from(end - from).unwrap_or(usize::MAX);
            match copy_file_range(&image, Some(&mut from), &copy, Some(&mut to), left) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                // Between some file systems the host's kernel copies nothing.
                Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP) => {
                    copy_by_hand(&image, &copy, from, end)?;
                    from = end;
                }
                Err(e) => return Err(e.into()),
            }
        }
        at = end;
    }
    Ok(copy)
}

fn copy_by_hand(image: &File, copy: &File, mut at: u64, end: u64) -> IoResult<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; 256 << 10];
    while at < end {
        let left = usize::try_from(end - at).unwrap_or(usize::MAX);
        let length = buffer.len().min(left);
        let piece = buffer.get_mut(..length).unwrap_or_default();
        image.read_exact_at(piece, at)?;
        copy.write_all_at(piece, at)?;
        at += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn a_copy_has_the_data_and_the_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let mut options = File::options();
        let image = options
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        image.set_len(64 << 20).unwrap();
        for at in [0, 1 << 20, (64 << 20) - 4096] {
            image.write_all_at(&[at as u8 | 1; 4096], at).unwrap();
        }
        let copy = copy_image(&path).unwrap();
        image.write_all_at(b"later", 0).unwrap();
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            1,
            "it has no name"
        );
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
        assert!(copy_image(dir.path()).is_err(), "a directory");
    }
}
