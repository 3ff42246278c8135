//! A snapshot's state file. An input is what follows its first line, which is made to fit; and it is a whole file as well.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

fuzz_target!(|input: &[u8]| {
    let line = husk_snapshot::first_line(input).expect("a line of JSON");
    for parts in [[&line[..], input], [&[], input]] {
        let memory = memfd_create("state", MemfdFlags::CLOEXEC).expect("memory");
        let mut file = File::from(memory);
        file.write_all(&parts.concat()).expect("memory");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        match husk_vmm::describe_snapshot(path.as_ref()) {
            Ok(said) => assert!(said.starts_with("a snapshot")),
            Err(refused) => assert!(!husk_vmm::chain(&refused).is_empty()),
        }
    }
});
