//! A host made of files in a temporary directory.

use crate::host::{Host, Processor};
use std::fs;
use std::path::PathBuf;

pub struct FakeHost {
    root: tempfile::TempDir,
    pub processor: Processor,
}

impl FakeHost {
    pub fn new() -> Self {
        Self {
            root: tempfile::tempdir().unwrap(),
            processor: Processor::default(),
        }
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path.trim_start_matches('/'))
    }

    pub fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Put a link to the real `target` at `path`: /dev/null stands for any device that can be opened.
    pub fn link(&self, target: &str, path: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(target, path).unwrap();
    }

    pub fn module(&self, name: &str) {
        fs::create_dir_all(self.path("/sys/module").join(name)).unwrap();
    }

    pub fn host(&self) -> Host {
        Host::new(self.root.path(), self.processor.clone())
    }
}
