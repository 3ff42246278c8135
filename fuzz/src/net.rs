//! A network interface with the user network, whose other end, passt's place, is ours.
//!
//! The device starts `bin/passt` here, a program that does nothing, and what it was given as its standard input is taken over:
//! a socket on which the host can say anything. It needs no privileges and no network.

use crate::bytes::{Bytes, Few, Number};
use crate::entropy::limits;
use crate::guest::{Chain, Guest, Subject};
use arbitrary::Arbitrary;
use husk_config::{DeviceUpdate, NetworkInterface, UserNetwork};
use husk_virtio::VirtioDevice;
use husk_virtio::testing::{Buffers, Driver, Layout};
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// Bytes of `struct virtio_net_hdr` (5.1.6).
const HEADER: usize = 12;
/// Set in the environment once [`prepare`] has been there.
const PREPARED: &str = "HUSK_FUZZ_PASST";

/// The device's other end.
pub struct Net {
    far: OwnedFd,
    /// What it said may not have been whole frames, so the device may have given it up.
    strained: bool,
}

/// What a driver asks for.
#[derive(Debug, Arbitrary)]
pub enum Request {
    /// To receive into these.
    Receive(Few<Number, 8>),
    /// To send a frame with this header: its beginning, and the length of the rest.
    Send {
        /// Beginning of header and frame, cut where the buffers end.
        parts: Few<Bytes, 4>,
        /// Zeroes behind.
        rest: Number,
    },
}

/// What the host does.
#[derive(Debug, Arbitrary)]
pub enum Host {
    /// Sends a frame: its beginning, and the length of the rest.
    Frame(Bytes, u16),
    /// Says anything.
    Say(Bytes),
    /// Receives.
    Hear,
    /// Says no more.
    ShutDown,
    /// Plugs the cable in, or pulls it out.
    Plug(bool),
    /// Limits come and go.
    Limit(bool),
}

/// Start this program anew, so that the device finds our `passt`.
pub fn prepare() {
    if std::env::var_os(PREPARED).is_some() {
        return;
    }
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = std::iter::once(own).chain(std::env::split_paths(&path));
    let path = std::env::join_paths(all).expect("a path without colons");
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    let error = Command::new("/proc/self/exe")
        .arg0(name)
        .args(arguments)
        .env("PATH", path)
        .env(PREPARED, "1")
        .exec();
    panic!("this program does not start again: {error}");
}

/// The only child of this thread.
fn child() -> Pid {
    let children = std::fs::read_to_string("/proc/thread-self/children").expect("procfs");
    let last = children
        .split_whitespace()
        .last()
        .and_then(|pid| pid.parse().ok());
    last.and_then(Pid::from_raw)
        .expect("the device started a process")
}

impl Net {
    /// Say something, as far as there is room; whether there was room for some of it and not for all.
    fn say(&self, data: &[u8]) -> bool {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        rustix::net::send(&self.far, data, flags).is_ok_and(|count| count < data.len())
    }

    /// Take in what was sent, as much as fits; whether there was something.
    fn hear(&self) -> bool {
        let mut data = [0; 4096];
        matches!(
            rustix::net::recv(&self.far, &mut data[..], RecvFlags::DONTWAIT),
            Ok((1.., _))
        )
    }
}

impl Subject for Net {
    type Request = Request;
    type Host = Host;

    fn new(variant: u8) -> (Self, Box<dyn VirtioDevice>) {
        let mut config = NetworkInterface::new("eth0");
        config.user = Some(UserNetwork::default());
        if variant & 1 != 0 {
            config.rx_rate_limiter = Some(limits(Some(64 << 10)));
            config.tx_rate_limiter = Some(limits(Some(64 << 10)));
        }
        let device = husk_devices::net::Net::new(&config).expect("an interface");
        let process = pidfd_open(child(), PidfdFlags::empty()).expect("our child");
        let far = pidfd_getfd(&process, 0, PidfdGetfdFlags::empty()).expect("its standard input");
        let net = Self {
            far,
            strained: false,
        };
        (net, Box::new(device))
    }

    fn chain(&self, request: Request) -> Chain {
        match request {
            Request::Receive(lengths) => Chain {
                queue: 0,
                writable: lengths.0.iter().map(|number| number.get()).collect(),
                ..Chain::default()
            },
            Request::Send { parts, rest } => {
                let mut readable: Vec<Vec<u8>> = parts.0.into_iter().map(|part| part.0).collect();
                readable.push(vec![0; rest.get() as usize % (128 << 10)]);
                Chain {
                    queue: 1,
                    readable,
                    ..Chain::default()
                }
            }
        }
    }

    fn host(&mut self, action: Host, guest: &mut Guest) {
        match action {
            Host::Frame(start, rest) => {
                let length = start.0.len() + usize::from(rest);
                // Others are for `Say`.
                if !(14..=65_536).contains(&length) {
                    return;
                }
                let mut data = (length as u32).to_be_bytes().to_vec();
                data.extend(start.0);
                data.resize(4 + length, 0);
                self.strained |= self.say(&data);
            }
            Host::Say(bytes) => {
                self.strained = true;
                let _ = self.say(&bytes.0);
            }
            Host::Hear => drop(self.hear()),
            Host::ShutDown => {
                self.strained = true;
                let _ = rustix::net::shutdown(&self.far, Shutdown::Write);
            }
            Host::Plug(up) => guest.update(DeviceUpdate::Network {
                rx_rate_limiter: None,
                tx_rate_limiter: None,
                link_up: Some(up),
            }),
            Host::Limit(on) => {
                let limits = limits(on.then_some(64 << 10));
                guest.update(DeviceUpdate::Network {
                    rx_rate_limiter: Some(limits),
                    tx_rate_limiter: Some(limits),
                    link_up: None,
                });
            }
        }
    }

    /// A packet is taken; and where nothing was done that spoils frames, it comes out, and others go in.
    fn check(&mut self, driver: &mut Driver) {
        driver.registers.with_core(&mut |core| {
            core.with_device(|device| {
                drop(device.update(&DeviceUpdate::Network {
                    rx_rate_limiter: None,
                    tx_rate_limiter: None,
                    link_up: Some(true),
                }));
            });
        });
        let frame = [5; 60];
        let chain = driver.chain(&[&[0; HEADER], &frame], &[]);
        driver.queues[1].add(&chain, Layout::Direct, 0);
        driver.registers.notify(1);
        while driver.queues[1].take_used().is_none() {
            // What is left of a frame before may have filled the socket.
            self.hear();
            assert_eq!(driver.registers.status(), 15, "the device needs a reset");
            std::thread::yield_now();
        }
        if self.strained {
            return;
        }
        while self.hear() {}
        let room = driver.chain(&[], &[65_600]);
        self.receive(driver, &room);
    }
}

impl Net {
    /// Packets come in until one of ours is there.
    fn receive(&self, driver: &mut Driver, room: &Buffers) {
        let mut mine = (100_u32).to_be_bytes().to_vec();
        mine.extend([0xab; 100]);
        loop {
            driver.queues[0].add(room, Layout::Direct, 0);
            driver.registers.notify(0);
            let _ = self.say(&mine);
            let (_, written) = driver.wait_used(0);
            let packet = room.written(&driver.mem, written as usize);
            if packet.get(HEADER..) == mine.get(4..) {
                return;
            }
        }
    }
}
