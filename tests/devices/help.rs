//! Guests with all drivers, and what they talk to.

use crate::common::Vm;
use crate::common::guest::{Guest, Kernel, LIMIT, variable};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// The drivers that Debian's kernel has as modules.
const MODULES: [&str; 10] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "ext4",
    "erofs",
    "crc32c_generic",
];

/// A guest with all drivers and the tool of tests/guest, whose script ends in a power-off.
pub fn guest<'a>(kernel: &'a Kernel, script: &str) -> Guest<'a> {
    let mut guest = Guest::new(
        kernel,
        Some(&format!("dmesg -n 1\nstty raw -echo\n{script}")),
    );
    let modules = MODULES.iter().map(|module| (*module).to_owned());
    guest.builder.modules.extend(modules);
    let tool = std::fs::read(variable("HUSK_TEST_TOOL")).unwrap();
    guest.builder.files.push(("bin/tool".into(), tool, 0o755));
    guest
}

/// How much more a machine with real processors can do in a test than an emulated one.
pub fn scale() -> u64 {
    match std::env::var_os("HUSK_TEST_EMULATED") {
        Some(_) => 1,
        None => 16,
    }
}

/// The words of a command line: those of `text`, which has no quotes, and more.
pub fn words<'a>(text: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    text.split_whitespace()
        .chain(more.iter().copied())
        .collect()
}

/// What a guest connects to.
pub trait Listener {
    type Stream;
    fn accept_now(&self) -> std::io::Result<Self::Stream>;
}

impl Listener for TcpListener {
    type Stream = TcpStream;
    fn accept_now(&self) -> std::io::Result<TcpStream> {
        self.set_nonblocking(true)?;
        let (stream, _) = self.accept()?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(stream)
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;
    fn accept_now(&self) -> std::io::Result<UnixStream> {
        self.set_nonblocking(true)?;
        let (stream, _) = self.accept()?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(stream)
    }
}

pub trait Accept {
    fn accept<L: Listener>(&self, listener: &L) -> L::Stream;
}

impl Accept for Vm {
    /// Wait until the guest connects.
    #[track_caller]
    fn accept<L: Listener>(&self, listener: &L) -> L::Stream {
        let until = Instant::now() + LIMIT;
        loop {
            match listener.accept_now() {
                Ok(stream) => return stream,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => panic!("{e}"),
            }
            let hopeless = self.stdout.has_ended() || Instant::now() >= until;
            assert!(!hopeless, "no connection\n{}", self.report());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

pub fn listen(address: &str, port: u16) -> TcpListener {
    TcpListener::bind((address, port)).unwrap()
}

/// A connection from the host to a port of the guest.
pub fn connect(socket: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "the guest refuses");
        answer.push(byte[0]);
    }
    assert!(answer.starts_with(b"OK "), "{answer:?}");
    stream
}
