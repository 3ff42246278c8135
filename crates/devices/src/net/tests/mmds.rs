//! The metadata service on the cable, with a TCP/IP stack as the guest.

use super::*;
use husk_config::MmdsConfig;
use husk_mmds::{DEFAULT_LIMIT, LONGEST_FRAME, Mmds, Server};
use husk_virtio::testing::{Buffers, Subject, check_device};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as Time;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Address};
use std::cell::RefCell;

const GUEST: [u8; 6] = [0x52, 1, 2, 3, 4, 5];
const BUFFERS: usize = 64;
const DATA_VALID: u8 = 2;

fn stack() -> Stack {
    let mmds = Mmds::new(DEFAULT_LIMIT);
    let large = "x".repeat(50_000);
    let value = serde_json::json!({"small": "value", "large": large});
    mmds.put(value).unwrap();
    let config = MmdsConfig::new(["eth0"]);
    let server = Server::new(mmds, &config).unwrap();
    Stack::new(server, config.address()).unwrap()
}

fn net(config: &NetworkInterface) -> (Net, Far) {
    let (backend, far) = pipe(config.queues);
    let detour = Detour::new("eth0", Box::new(backend), stack()).unwrap();
    (Net::with_backend(config, Box::new(detour)).unwrap(), far)
}

/// The guest's driver, as its stack sees it.
struct Port {
    rig: Rig,
    receive: Vec<(u16, u64)>,
    send: Buffers,
    /// Packets that were not for the guest's stack.
    others: Vec<Vec<u8>>,
    /// `flags` of the last header.
    flags: u8,
}

struct Guest {
    port: Port,
    interface: Interface,
    sockets: SocketSet<'static>,
    start: Instant,
}

impl Port {
    fn give(&mut self) {
        self.receive = self.rig.give(0, BUFFERS, 1600);
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        let queue = &mut self.rig.driver.queues[0];
        let (head, written) = queue.take_used()?;
        let entry = self.receive.iter_mut().find(|(own, _)| *own == head);
        let entry = entry.unwrap();
        let mut packet = vec![0; written as usize];
        let mem = &self.rig.driver.mem;
        mem.read_slice(&mut packet, GuestAddress(entry.1)).unwrap();
        self.flags = packet[0];
        // The same buffer again.
        let buffers = Buffers {
            writable: vec![(entry.1, 1600)],
            ..Buffers::default()
        };
        entry.0 = queue.add(&buffers, Layout::Direct, 0);
        self.rig.driver.registers.notify(0);
        Some(packet.split_off(12))
    }

    fn send(&mut self, frame: &[u8]) {
        let driver = &mut self.rig.driver;
        let (address, length) = &mut self.send.readable[0];
        // VIRTIO_NET_HDR_F_NEEDS_CSUM, of TCP.
        let header = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
        let packet = [&header, frame].concat();
        driver
            .mem
            .write_slice(&packet, GuestAddress(*address))
            .unwrap();
        *length = packet.len() as u32;
        driver.queues[1].add(&self.send, Layout::Direct, 0);
        driver.registers.notify(1);
        driver.wait_used(1);
    }
}

impl Device for Port {
    type RxToken<'a> = Taken;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _time: Time) -> Option<(Taken, Sender<'_>)> {
        loop {
            let frame = self.take()?;
            if frame[6..12] == husk_mmds::MAC {
                return Some((Taken(frame), Sender(self)));
            }
            self.others.push(frame);
        }
    }

    fn transmit(&mut self, _time: Time) -> Option<Sender<'_>> {
        Some(Sender(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut all = DeviceCapabilities::default();
        all.medium = Medium::Ethernet;
        all.max_transmission_unit = 1514;
        // Left to the device; what comes back is verified.
        all.checksum.tcp = Checksum::Rx;
        all
    }
}

struct Taken(Vec<u8>);

impl RxToken for Taken {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Sender<'a>(&'a mut Port);

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        self.0.send(&frame);
        result
    }
}

impl Guest {
    fn start(config: &NetworkInterface, without: u64) -> (Self, Far) {
        let (net, far) = net(config);
        let mut rig = Rig::start(net, without);
        let send = rig.driver.chain(&[&[0; 2000]], &[]);
        let mut port = Port {
            rig,
            receive: Vec::new(),
            send,
            others: Vec::new(),
            flags: 0,
        };
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(GUEST)));
        let mut interface = Interface::new(config, &mut port, Time::ZERO);
        let address = IpCidr::new(Ipv4Address::new(172, 16, 0, 2).into(), 0);
        interface.update_ip_addrs(|all| all.extend([address]));
        let guest = Self {
            port,
            interface,
            sockets: SocketSet::new(Vec::new()),
            start: Instant::now(),
        };
        (guest, far)
    }

    fn poll(&mut self) {
        let time = Time::from_micros(self.start.elapsed().as_micros() as i64);
        self.interface.poll(time, &mut self.port, &mut self.sockets);
    }

    fn connect(&mut self, port: u16) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 60_000]);
        let mut socket = Socket::new(buffer(), buffer());
        let remote = (Ipv4Address::new(169, 254, 169, 254), 80);
        socket
            .connect(self.interface.context(), remote, port)
            .unwrap();
        self.sockets.add(socket)
    }

    /// The body of the answer to a request for `path`.
    #[track_caller]
    fn fetch(&mut self, path: &str, port: u16) -> String {
        let handle = self.connect(port);
        let mut asked = false;
        let mut text = Vec::new();
        let until = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < until, "no answer: {text:?}");
            self.poll();
            let socket = self.sockets.get_mut::<Socket>(handle);
            if socket.can_send() && !asked {
                let request = format!("GET {path} HTTP/1.0\r\n\r\n");
                socket.send_slice(request.as_bytes()).unwrap();
                asked = true;
            }
            while socket.can_recv() {
                let all = socket.recv(|data| (data.len(), data.to_vec()));
                text.extend(all.unwrap());
            }
            if asked && !socket.may_recv() && socket.state() != State::SynSent {
                break;
            }
        }
        self.sockets.remove(handle);
        let text = String::from_utf8(text).unwrap();
        text.split_once("\r\n\r\n").unwrap().1.into()
    }
}

#[test]
fn it_is_a_sound_device_with_metadata() {
    let far = RefCell::new(None);
    check_device(&Subject {
        memory: husk_virtio::testing::memory,
        make: &|| {
            let (net, other) = net(&interface("eth0"));
            *far.borrow_mut() = Some(other);
            Box::new(net)
        },
        use_again: None,
        use_it: &|driver| {
            let far = far.borrow();
            let far = far.as_ref().unwrap();
            while far.receive(0).is_some() {}
            let sent = frame(1, 100);
            driver.request(1, &[&[0; 12], &sent[..20], &sent[20..]], &[]);
            assert_eq!(far.wait(0), sent);
            // Who has 169.254.169.254, in parts that are no help.
            let ask = arp_request();
            driver.request(
                1,
                &[&[0; 5], &[0; 7], &ask[..13], &ask[13..40], &ask[40..]],
                &[],
            );
            let answer = driver.request(0, &[], &[12, 10, 1400]);
            assert_eq!(answer[12..18], GUEST);
            assert_eq!(answer[18..24], husk_mmds::MAC);
            far.send(0, &sent);
            assert_eq!(driver.request(0, &[], &[12, 100, 1400])[12..], sent);
            assert!(far.receive(0).is_none(), "the host saw it");
        },
        eager: &[1],
    });
}

fn arp_request() -> Vec<u8> {
    let parts: [&[u8]; 8] = [
        &[0xff; 6],
        &GUEST,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &GUEST,
        &[172, 16, 0, 2],
        &[0; 6],
        &[169, 254, 169, 254],
        &[0; 18],
    ];
    parts.concat()
}

#[test]
fn metadata_is_fetched_while_other_packets_go_by() {
    for (queues, without, flags) in [(1, 0, DATA_VALID), (2, 1 << features::GUEST_CSUM, 0)] {
        let mut config = interface("eth0");
        config.queues = queues;
        let (mut guest, far) = Guest::start(&config, without);
        guest.port.give();
        for seed in 0..10 {
            far.send(0, &frame(seed, 200));
            guest.port.send(&frame(seed, 300));
            let large = guest.fetch("/large", 1000 + u16::from(seed));
            assert_eq!(large.len(), 50_000);
        }
        assert_eq!(guest.port.flags, flags);
        assert_eq!(guest.port.others.len(), 10);
        for seed in 0..10 {
            assert_eq!(guest.port.others[usize::from(seed)], frame(seed, 200));
            assert_eq!(far.wait(0), frame(seed, 300));
        }
        assert!(
            far.receive(0).is_none(),
            "the host saw packets for the service"
        );
    }
}

#[test]
fn a_packet_that_is_too_long_for_metadata_is_counted_as_lost() {
    // Other tests of this process count there, too, but none has one that is lost.
    let lost = &METRICS.mmds.rx_accepted_err;
    let before = lost.total();
    let (net, far) = net(&interface("eth0"));
    let mut rig = Rig::start(net, 0);
    let mut long = arp_request();
    long.resize(LONGEST_FRAME, 0);
    rig.send(1, &long);
    assert_eq!(lost.total(), before);
    long.push(0);
    rig.send(1, &long);
    assert_eq!(lost.total(), before + 1);
    assert!(far.receive(0).is_none());
}

#[test]
fn metadata_is_there_when_the_other_end_is_gone() {
    let (mut guest, far) = Guest::start(&interface("eth0"), 0);
    guest.port.give();
    assert_eq!(guest.fetch("/small", 1000), "value");
    drop(far);
    // One that the backend cannot send, and does not hold up.
    guest.port.send(&frame(1, 100));
    assert_eq!(guest.fetch("/small", 1001), "value");
    guest.port.send(&frame(2, 100));
    assert_eq!(guest.port.rig.link_status(), 1);
    let driver = &mut guest.port.rig.driver;
    driver.start(u64::MAX, 256);
    guest.port.send = driver.chain(&[&[0; 2000]], &[]);
    guest.port.give();
    assert_eq!(guest.fetch("/small", 1002), "value");
}

#[test]
fn metadata_is_behind_the_cable_that_is_pulled_out() {
    let (mut guest, _far) = Guest::start(&interface("eth0"), 0);
    guest.port.give();
    guest.port.rig.plug(false);
    assert_eq!(guest.port.rig.link_status(), 0);
    guest.port.send(&arp_request());
    guest.port.rig.plug(true);
    std::thread::sleep(Duration::from_millis(20));
    assert!(guest.port.take().is_none(), "an answer from before");
    assert_eq!(guest.fetch("/small", 1000), "value");
}

#[test]
fn an_answer_waits_for_buffers_and_is_sent_again_unasked() {
    let (mut guest, _far) = Guest::start(&interface("eth0"), 0);
    guest.port.send(&arp_request());
    // Four connections; nobody acknowledges what is answered.
    for port in 0..4 {
        let syn = [
            [0x06, 1, 0x23, 0x45, 0x67, 1].as_slice(),
            &GUEST,
            &[8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 172, 16, 0, 2],
            &[169, 254, 169, 254, 4, port, 0, 80, 1, 2, 3, 4, 0, 0, 0, 0],
            &[0x50, 2, 0xff, 0xff, 0, 0, 0, 0],
        ];
        guest.port.send(&syn.concat());
    }
    std::thread::sleep(Duration::from_millis(20));
    guest.port.give();
    let mut answers = Vec::new();
    let until = Instant::now() + PATIENCE;
    // Once, and after a second or so again.
    while answers.len() < 9 {
        assert!(Instant::now() < until, "only {} answers", answers.len());
        match guest.port.take() {
            Some(frame) => answers.push(frame),
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    assert_eq!(answers[0][12..14], [8, 6]);
    for answer in &answers[1..] {
        assert_eq!(answer[12..14], [8, 0]);
        assert_eq!(answer[47], 0x12, "SYN and ACK");
    }
}
