//! Writing a file whose pages of zeros are holes: they take no room, and nobody who maps the file has to touch them.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};

const PAGE: usize = 4096;

/// A writer that starts at the beginning of an empty file.
pub(crate) struct Sparse<'a> {
    file: &'a File,
    position: u64,
}

impl<'a> Sparse<'a> {
    pub(crate) fn new(file: &'a File) -> Self {
        Self { file, position: 0 }
    }

    /// Gives the file its length, which a hole at the end has not.
    pub(crate) fn finish(self) -> io::Result<()> {
        self.file.set_len(self.position)
    }

    fn put(&mut self, bytes: &[u8], zero: bool) -> io::Result<()> {
        if !zero && !bytes.is_empty() {
            self.file.seek(SeekFrom::Start(self.position))?;
            self.file.write_all(bytes)?;
        }
        self.position += bytes.len() as u64;
        Ok(())
    }
}

impl Write for Sparse<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let to_boundary = PAGE - (self.position % PAGE as u64) as usize;
        let (first, rest) = bytes.split_at(to_boundary.min(bytes.len()));
        // Neighbours of the same kind go out in one call.
        let mut run = (0, is_zero(first));
        let mut end = first.len();
        for page in rest.chunks(PAGE) {
            let zero = is_zero(page);
            if zero != run.1 {
                self.put(bytes.get(run.0..end).unwrap_or_default(), run.1)?;
                run = (end, zero);
            }
            end += page.len();
        }
        self.put(bytes.get(run.0..end).unwrap_or_default(), run.1)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn what_is_written_is_read_whatever_the_pieces() {
        let mut bytes = vec![0; 40 * PAGE + 17];
        bytes[5 * PAGE..6 * PAGE + 1].fill(1);
        bytes[20 * PAGE - 1] = 2;
        for piece in [1000, PAGE, 7 * PAGE + 3, bytes.len()] {
            let mut file = tempfile::tempfile().unwrap();
            let mut sparse = Sparse::new(&file);
            for piece in bytes.chunks(piece) {
                sparse.write_all(piece).unwrap();
            }
            sparse.finish().unwrap();
            let mut read = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut read).unwrap();
            assert!(read == bytes, "pieces of {piece}");
        }
    }

    #[test]
    fn pages_of_zeros_take_no_room() {
        let file = tempfile::tempfile().unwrap();
        let mut sparse = Sparse::new(&file);
        sparse.write_all(&vec![0; 256 * PAGE]).unwrap();
        sparse.write_all(&[1; PAGE]).unwrap();
        sparse.write_all(&vec![0; 256 * PAGE]).unwrap();
        sparse.finish().unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 513 * PAGE as u64);
        assert!(
            metadata.blocks() * 512 <= 16 * PAGE as u64,
            "{} blocks",
            metadata.blocks()
        );
    }
}
