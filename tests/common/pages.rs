//! A handler of page faults, as Firecracker's users write them.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;
use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

const UFFDIO_COPY: u32 = opcode::read_write::<Copy>(0xaa, 3);
/// _IOR, though it is read by the kernel.
const UFFDIO_UNREGISTER: u32 = opcode::read::<[u64; 2]>(0xaa, 1);
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;

/// struct uffdio_copy.
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

/// What a monitor has sent.
pub struct Pages {
    pub socket: Option<UnixStream>,
    pub mappings: Value,
    userfault: OwnedFd,
}

/// What becomes of a fault.
pub enum Answer {
    /// The page of the memory file.
    Page,
    /// Other bytes.
    Wrong(u8),
    /// The handler does no more.
    Leave,
}

impl Pages {
    /// The first monitor that calls.
    pub fn accept(listener: &UnixListener) -> Self {
        let (socket, _) = listener.accept().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = vec![0; 4096];
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(&socket, &mut parts, &mut ancillary, RecvFlags::empty()).unwrap();
        let mut descriptors = ancillary.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect::<Vec<_>>(),
            _ => Vec::new(),
        });
        let userfault = descriptors.next().expect("a userfaultfd comes with it");
        assert!(descriptors.next().is_none());
        Self {
            mappings: serde_json::from_slice(&bytes[..received.bytes]).unwrap(),
            socket: Some(socket),
            userfault,
        }
    }

    /// Answer faults from `memory` as `how` says of each, counted from 0, until the monitor is gone.
    pub fn serve(&self, memory: &File, mut how: impl FnMut(u64) -> Answer) {
        for count in 0.. {
            let Some(address) = self.next_fault() else {
                return;
            };
            let (mapping, size) = self.mapping_of(address);
            let mut page = vec![0; size as usize];
            let address = address & !(size - 1);
            match how(count) {
                Answer::Leave => return,
                Answer::Wrong(byte) => page.fill(byte),
                Answer::Page => {
                    let base = mapping["base_host_virt_addr"].as_u64().unwrap();
                    let offset = mapping["offset"].as_u64().unwrap() + (address - base);
                    memory.read_exact_at(&mut page, offset).unwrap();
                }
            }
            self.copy(address, &page);
        }
    }

    fn mapping_of(&self, address: u64) -> (&Value, u64) {
        let mapping = self.mappings.as_array().unwrap().iter().find(|mapping| {
            let base = mapping["base_host_virt_addr"].as_u64().unwrap();
            (base..base + mapping["size"].as_u64().unwrap()).contains(&address)
        });
        let mapping = mapping.expect("an address in memory");
        (mapping, mapping["page_size"].as_u64().unwrap())
    }

    /// The address that somebody waits for; None when the monitor is gone.
    fn next_fault(&self) -> Option<u64> {
        loop {
            let mut polled = vec![PollFd::new(&self.userfault, PollFlags::IN)];
            let socket = self.socket.as_ref();
            polled.extend(socket.map(|socket| PollFd::new(socket, PollFlags::RDHUP)));
            let limit = Timespec {
                tv_sec: 60,
                tv_nsec: 0,
            };
            assert!(poll(&mut polled, Some(&limit)).unwrap() > 0, "nobody asks");
            let gone = |polled: &PollFd| !(polled.revents() - PollFlags::IN).is_empty();
            if polled.iter().any(gone) {
                return None;
            }
            let mut message = [0; 32];
            match rustix::io::read(&self.userfault, &mut message) {
                Ok(32) if message[0] == UFFD_EVENT_PAGEFAULT => {
                    return Some(u64::from_le_bytes(message[16..24].try_into().unwrap()));
                }
                Ok(32) | Err(rustix::io::Errno::AGAIN) => {}
                Ok(0) | Err(_) => return None,
                Ok(other) => panic!("{other} bytes"),
            }
        }
    }

    fn copy(&self, address: u64, page: &[u8]) {
        let mut copy = Copy {
            to: address,
            from: page.as_ptr() as u64,
            length: page.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: the argument is a struct uffdio_copy, and `from` is as long as it says.
        let result = unsafe {
            ioctl(
                &self.userfault,
                Updater::<UFFDIO_COPY, Copy>::new(&mut copy),
            )
        };
        // It may have gone meanwhile, or somebody else was faster.
        let _ = result;
    }

    /// Let the kernel fill the rest with zeros.
    pub fn unregister(&self) {
        for mapping in self.mappings.as_array().unwrap() {
            let number = |name: &str| mapping[name].as_u64().unwrap();
            let mut range = [number("base_host_virt_addr"), number("size")];
            // SAFETY: the argument is a struct uffdio_range.
            unsafe {
                let update = Updater::<UFFDIO_UNREGISTER, [u64; 2]>::new(&mut range);
                ioctl(&self.userfault, update).unwrap();
            }
        }
    }
}

/// A process that answers the first monitor that calls with `count` pages, and is gone. This test program is started again
/// for it: `test` is what calls [`be_a_process`].
pub fn process(test: &str, socket: &Path, memory: &Path, count: u64) -> std::process::Child {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored"]);
    let words = [socket.to_str().unwrap(), memory.to_str().unwrap()];
    command.env(VARIABLE, format!("{} {} {count}", words[0], words[1]));
    // It is a test's program itself, and what it says of itself is no result.
    command.stdout(std::process::Stdio::null());
    let child = command.spawn().unwrap();
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while !socket.exists() {
        assert!(std::time::Instant::now() < until, "it does not listen");
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

const VARIABLE: &str = "HUSK_TEST_PAGES";

/// What such a process does.
pub fn be_a_process() {
    let Ok(words) = std::env::var(VARIABLE) else {
        return;
    };
    let words: Vec<&str> = words.split(' ').collect();
    let listener = UnixListener::bind(words[0]).unwrap();
    let pages = Pages::accept(&listener);
    let most: u64 = words[2].parse().unwrap();
    let memory = File::open(words[1]).unwrap();
    pages.serve(&memory, |count| match count < most {
        true => Answer::Page,
        false => std::process::exit(0),
    });
}
