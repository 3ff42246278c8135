//! A file or named pipe that takes the guest's output instead of standard output.

use husk_metrics::METRICS;
use rustix::io::Errno;
use std::fs::File;
use std::path::Path;

/// The guest's output on its way to a file or named pipe. Nothing waits for it: what finds a pipe full or a file that
/// cannot grow is dropped.
pub struct FileOutput {
    file: File,
}

impl FileOutput {
    /// Append to the file at `path`, which is made when it is not there. A named pipe need not have a reader yet.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = File::options()
            // A named pipe that is open for writing alone fails without a reader.
            .read(true)
            .append(true)
            .create(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)?;
        Ok(Self { file })
    }
}

impl husk_devices::serial::Output for FileOutput {
    fn write(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match rustix::io::write(&self.file, bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(e) => {
                    METRICS.uart.error_count.inc();
                    return log::debug!("output of the serial console is lost: {e}");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_devices::serial::Output;

    #[test]
    fn a_named_pipe_without_a_reader_keeps_nobody_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let output = FileOutput::open(&path).unwrap();
        for _ in 0..1000 {
            output.write(&[b'x'; 1000]);
        }
    }

    #[test]
    fn a_folder_takes_no_output() {
        let dir = tempfile::tempdir().unwrap();
        assert!(FileOutput::open(dir.path()).is_err());
    }
}
