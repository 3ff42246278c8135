//! The device with a socket that behaves like a tap: most of what it does. Real backends have files of their own.

mod mmds;
mod passt;
mod pipe;
mod queues;
mod tap;

use super::*;
use husk_virtio::testing::{Driver, Layout, Mmio, PATIENCE, memory};
use husk_virtio::transport::mmio::MmioTransport;
use husk_virtio::{DeviceThread, F_RING_RESET};
use pipe::{Far, pipe};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

/// A device that a driver has started.
struct Rig {
    driver: Driver,
    transport: Arc<MmioTransport>,
}

impl Rig {
    /// `net`, behind a transport, with all features but those `without`.
    fn start(net: Net, without: u64) -> Self {
        let thread = Arc::new(DeviceThread::start("net", || ()).unwrap());
        let mem = memory();
        let registers = Mmio::new(Box::new(net), &thread, &mem);
        let transport = Arc::clone(&registers.transport);
        let mut driver = Driver::new(Box::new(registers), mem);
        driver.start(!without, 256);
        Self { driver, transport }
    }

    /// A device with a pipe, and its far end.
    fn with_pipe(config: &NetworkInterface, without: u64) -> (Self, Far) {
        let (backend, far) = pipe(config.queues);
        let net = Net::with_backend(config, Box::new(backend)).unwrap();
        (Self::start(net, without), far)
    }

    /// Give the receive queue `count` buffers of `size` bytes.
    fn give(&mut self, queue: usize, count: usize, size: usize) -> Vec<(u16, u64)> {
        let buffers = (0..count).map(|_| {
            let buffers = self.driver.chain(&[], &[size]);
            let head = self.driver.queues[queue].add(&buffers, Layout::Direct, 0);
            (head, buffers.writable[0].0)
        });
        let buffers = buffers.collect();
        self.driver.registers.notify(queue as u16);
        buffers
    }

    /// The next packet in the receive queue, with its header, out of the buffers that [`Rig::give`] gave.
    #[track_caller]
    fn take(&mut self, queue: usize, given: &[(u16, u64)]) -> Vec<u8> {
        let mut packet = Vec::new();
        let mut left = 1;
        while left > 0 {
            let (head, written) = self.driver.wait_used(queue);
            let &(_, address) = given.iter().rfind(|(own, _)| *own == head).unwrap();
            let mut part = vec![0; written as usize];
            let mem = &self.driver.mem;
            mem.read_slice(&mut part, GuestAddress(address)).unwrap();
            if packet.is_empty() {
                left = u16::from_le_bytes([part[10], part[11]]);
                assert_ne!(left, 0, "a packet in no buffer");
            }
            packet.extend(part);
            left -= 1;
        }
        packet
    }

    /// Send a packet: header and frame in buffers of their own.
    fn send(&mut self, queue: usize, frame: &[u8]) {
        self.driver.request(queue, &[&[0; 12], frame], &[]);
    }

    fn update(&self, change: DeviceUpdate) -> Result<(), String> {
        let done = self.transport.with_core(|core| {
            core.with_device(move |device| device.update(&change).map_err(|e| e.to_string()))
        });
        done.unwrap()
    }

    fn plug(&self, up: bool) {
        self.update(DeviceUpdate::Network {
            rx_rate_limiter: None,
            tx_rate_limiter: None,
            link_up: Some(up),
        })
        .unwrap();
    }

    fn link_status(&self) -> u16 {
        let mut status = [0; 2];
        self.driver.registers.read_config(6, &mut status);
        u16::from_le_bytes(status)
    }

    #[track_caller]
    fn wait_link_down(&self) {
        wait("the link stays up", || self.link_status() == 0);
        wait("nobody was told", || self.driver.registers.take_interrupt());
    }
}

#[track_caller]
fn wait(what: &str, done: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// A frame of `length` bytes, different for each `seed`.
fn frame(seed: u8, length: usize) -> Vec<u8> {
    let bytes =
        (0..length).map(|at| (at as u8).wrapping_mul(7).wrapping_add((at >> 8) as u8) ^ seed);
    bytes.collect()
}

fn interface(name: &str) -> NetworkInterface {
    NetworkInterface::new(name)
}

#[test]
fn packets_and_bytes_are_counted_both_ways() {
    let (backend, far) = pipe(1);
    let mut net = Net::with_backend(&interface("eth0"), Box::new(backend)).unwrap();
    let m = Arc::new(NetMetrics::default());
    net.metrics = Arc::clone(&m);
    let mut rig = Rig::start(net, 0);
    for seed in 0..3 {
        rig.send(1, &frame(seed, 100));
        far.wait(0);
    }
    rig.send(1, &frame(0, 3));
    let given = rig.give(0, 8, 2048);
    for seed in 0..2 {
        far.send(0, &frame(seed, 200));
        rig.take(0, &given);
    }
    assert_eq!(
        (m.tx_packets_count.total(), m.tx_bytes_count.total()),
        (3, 300)
    );
    assert_eq!((m.tx_count.total(), m.tap_write_agg.count()), (3, 3));
    assert_eq!((m.tx_malformed_frames.total(), m.tx_fails.total()), (1, 1));
    assert_eq!(
        (m.rx_packets_count.total(), m.rx_bytes_count.total()),
        (2, 400)
    );
    assert_eq!((m.rx_count.total(), m.rx_fails.total()), (2, 0));
    assert!(m.tx_queue_event_count.total() >= 4 && m.rx_queue_event_count.total() >= 1);
}

/// A pipe of which the host wants no more.
struct Unready(pipe::Pipe);

impl Backend for Unready {
    fn facts(&self) -> backend::Facts {
        self.0.facts()
    }
    fn start(&mut self, _features: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::NotConnected.into())
    }
    fn set_pairs(&mut self, pairs: u16) -> std::io::Result<()> {
        self.0.set_pairs(pairs)
    }
    fn receive(&mut self, pair: u16, room: &mut backend::Room) -> backend::Received {
        self.0.receive(pair, room)
    }
    fn send(&mut self, pair: u16, packet: &backend::Packet) -> backend::Sent {
        self.0.send(pair, packet)
    }
    fn sources(&self) -> Vec<(RawFd, Event)> {
        self.0.sources()
    }
}

#[test]
fn starts_and_changes_that_fail_are_counted() {
    let m = Arc::new(NetMetrics::default());
    let thread = Arc::new(DeviceThread::start("net", || ()).unwrap());
    let driver = |backend: Box<dyn Backend>| {
        let mut net = Net::with_backend(&interface("eth0"), backend).unwrap();
        net.metrics = Arc::clone(&m);
        let mem = memory();
        Driver::new(Box::new(Mmio::new(Box::new(net), &thread, &mem)), mem)
    };
    let mut unready = driver(Box::new(Unready(pipe(1).0)));
    unready.set_up(u64::MAX, 16);
    unready.registers.set_status(15);
    assert_eq!(unready.registers.status(), 15 | 0x40);
    assert_eq!(m.activate_fails.total(), 1);
    let (backend, _far) = pipe(1);
    let mut driver = driver(Box::new(backend));
    driver.start_badly();
    assert_eq!((m.activate_fails.total(), m.cfg_fails.total()), (2, 0));
    driver.start(u64::MAX, 16);
    // The address was the driver's to change in the days before virtio 1.0.
    driver.registers.write_config(0, &[2; 6]);
    assert_eq!((m.activate_fails.total(), m.cfg_fails.total()), (2, 1));
}

#[test]
fn kicks_for_nothing_and_queues_that_break_are_counted() {
    let (backend, far) = pipe(1);
    let mut net = Net::with_backend(&interface("eth0"), Box::new(backend)).unwrap();
    let m = Arc::new(NetMetrics::default());
    net.metrics = Arc::clone(&m);
    let mut rig = Rig::start(net, 0);
    // Each queue is looked into once when the device starts.
    wait("nobody looks", || m.no_tx_avail_buffer.total() == 1);
    rig.send(1, &frame(1, 100));
    far.wait(0);
    assert_eq!(m.no_tx_avail_buffer.total(), 1);
    rig.driver.registers.notify(1);
    wait("nobody looks", || m.no_tx_avail_buffer.total() == 2);
    // The queue breaks without a kick: the packet finds that.
    rig.driver.queues[0].set_available_index(u16::MAX - 7);
    assert_eq!(m.event_fails.total(), 0);
    far.send(0, &frame(2, 100));
    wait("the device goes on", || {
        rig.driver.registers.status() & 0x40 != 0
    });
    assert_eq!(m.event_fails.total(), 1);
}
