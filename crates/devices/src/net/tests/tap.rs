//! Real tap devices, which only root may make.

use super::*;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::atomic::AtomicU32;

/// A tap device for one test, deleted at its end, with 10.213.N.1/24 on the host's side.
struct Host {
    name: String,
    net: u8,
}

impl Host {
    fn new(kind: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let host = Self {
            name: format!("hk{}n{number}", std::process::id()),
            net: (std::process::id() % 16) as u8 * 16 + number as u8,
        };
        let name = &host.name;
        let tap = ["tuntap", "add", "dev", name, "mode", "tap"];
        ip(&[&tap[..], kind].concat());
        ip(&[
            "addr",
            "add",
            &format!("10.213.{}.1/24", host.net),
            "dev",
            name,
        ]);
        ip(&["link", "set", name, "up"]);
        host
    }

    fn interface(&self) -> NetworkInterface {
        let mut config = interface("eth0");
        config.host_dev_name = self.name.clone();
        config
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["link", "del", &self.name])
            .output();
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output();
    let output = output.expect("these tests need ip, of Debian's package iproute2");
    let why = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments:?}: {why}");
}

const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// Do what a guest at 10.213.N.2 does until the host's kernel knows it: answer ARP. Any other frame is given back.
fn next_ip(rig: &mut Rig, given: &[(u16, u64)], net: u8) -> Vec<u8> {
    loop {
        let packet = rig.take(0, given);
        let frame = &packet[12..];
        if frame[12..14] == [8, 6] && frame[14 + 24..14 + 28] == [10, 213, net, 2] {
            let asker = &frame[6..12];
            let mut answer = [asker, &GUEST, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &GUEST].concat();
            answer.extend([10, 213, net, 2]);
            answer.extend(&frame[14 + 8..14 + 18]);
            rig.send(1, &answer);
        } else if frame[12..14] == [8, 0] && frame[30..34] == [10, 213, net, 2] {
            return packet;
        }
    }
}

#[test]
fn frames_pass_between_the_hosts_kernel_and_the_guest() {
    let host = Host::new(&[]);
    let mut rig = Rig::start(Net::new(&host.interface()).unwrap(), 0);
    for bit in features_of_a_tap() {
        assert_ne!(rig.driver.features & 1 << bit, 0, "feature {bit}");
    }
    let given = rig.give(0, 200, 2048);
    let socket = UdpSocket::bind(format!("10.213.{}.1:0", host.net)).unwrap();
    socket.connect(format!("10.213.{}.2:7", host.net)).unwrap();
    let sent = frame(5, 1000);
    socket.send(&sent).unwrap();
    let packet = next_ip(&mut rig, &given, host.net);
    assert_eq!(packet[0], 1, "NEEDS_CSUM: Linux leaves the checksum out");
    assert_eq!(packet[12 + 42..], sent);

    // The answer, with ports, addresses and MACs turned around, and the checksum left to Linux.
    let mut answer = packet[12..].to_vec();
    answer.copy_within(6..12, 0);
    answer[6..12].copy_from_slice(&GUEST);
    let (from, to): ([u8; 4], [u8; 4]) = (
        answer[26..30].try_into().unwrap(),
        answer[30..34].try_into().unwrap(),
    );
    answer[26..30].copy_from_slice(&to);
    answer[30..34].copy_from_slice(&from);
    answer[34..38].rotate_left(2);
    // The checksum field holds the sum of the pseudo header, which is the same both ways.
    let header = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
    rig.driver.request(1, &[&header, &answer], &[]);
    let mut got = [0; 2000];
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let count = socket.recv(&mut got).unwrap();
    assert_eq!(got[..count], sent);
}

fn features_of_a_tap() -> Vec<u32> {
    use crate::net::features::*;
    vec![
        CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, HOST_TSO4, HOST_TSO6, HOST_ECN,
        MRG_RXBUF, MAC, STATUS,
    ]
}

#[test]
fn a_guest_that_takes_no_offloads_gets_whole_checksums() {
    let host = Host::new(&[]);
    let without = features_of_a_tap().iter().map(|bit| 1 << bit).sum::<u64>();
    let mut rig = Rig::start(Net::new(&host.interface()).unwrap(), without);
    let given = rig.give(0, 200, 2048);
    let socket = UdpSocket::bind(format!("10.213.{}.1:0", host.net)).unwrap();
    socket.connect(format!("10.213.{}.2:7", host.net)).unwrap();
    socket.send(&frame(5, 1000)).unwrap();
    assert_eq!(next_ip(&mut rig, &given, host.net)[0] & 1, 0);
}

#[test]
fn large_segments_go_to_the_host_in_one_piece() {
    let host = Host::new(&[]);
    let mut rig = Rig::start(Net::new(&host.interface()).unwrap(), 0);
    // Bytes and packets that the interface has received.
    let received = || -> [u64; 2] {
        let text = std::fs::read_to_string("/proc/net/dev").unwrap();
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        let (_, numbers) = lines.find(|(name, _)| name.trim() == host.name).unwrap();
        let mut numbers = numbers.split_whitespace().map(|n| n.parse().unwrap());
        [numbers.next().unwrap(), numbers.next().unwrap()]
    };
    // TCP over IPv4 to nobody, 60000 bytes, for Linux to cut up into segments of 1448 (VIRTIO_NET_HDR_GSO_TCPV4).
    let mut segment = [&[0xff; 6][..], &GUEST, &[8, 0]].concat();
    segment.extend([0x45, 0, 0xea, 0x88, 0, 0, 0, 0, 64, 6, 0, 0]);
    segment.extend([10, 213, host.net, 2, 10, 213, host.net, 1]);
    segment.extend([
        0, 9, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0, 1, 0, 0, 0, 0, 0,
    ]);
    segment.extend(frame(1, 60_000));
    let header = |kind: u8| [1, kind, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    let before = received()[0];
    rig.driver
        .request(1, &[&header(1), &segment[..100], &segment[100..]], &[]);
    assert!(received()[0] >= before + 60_000);
    // What Linux finds no sense in is lost, and the next packet is not.
    rig.driver.request(1, &[&header(99), &segment], &[]);
    let before = received()[1];
    rig.send(1, &segment[..1000]);
    assert_eq!(received()[1], before + 1);
    assert_eq!(rig.link_status(), 1);
}

#[test]
fn a_deleted_tap_is_a_link_that_is_down() {
    let host = Host::new(&[]);
    let mut rig = Rig::start(Net::new(&host.interface()).unwrap(), 0);
    let given = rig.give(0, 10, 2048);
    rig.driver.registers.take_interrupt();
    drop(host);
    rig.wait_link_down();
    rig.send(1, &frame(1, 60));
    rig.driver.start(u64::MAX, 256);
    rig.send(1, &frame(1, 60));
    assert_eq!(rig.link_status(), 0);
    drop(given);
}

#[test]
fn an_interface_that_is_down_loses_packets_and_nothing_else() {
    let host = Host::new(&[]);
    ip(&["link", "set", &host.name, "down"]);
    let mut rig = Rig::start(Net::new(&host.interface()).unwrap(), 0);
    rig.send(1, &frame(1, 60));
    assert_eq!(rig.link_status(), 1);
}

#[test]
fn a_tap_of_many_queues_takes_one_driver_with_any_number() {
    let host = Host::new(&["multi_queue"]);
    for queues in [1, 4] {
        let mut config = host.interface();
        config.queues = queues;
        let mut rig = Rig::start(Net::new(&config).unwrap(), 0);
        let given = rig.give(0, 100, 2048);
        if queues > 1 {
            for pairs in [4, 1, 3, 3, 4] {
                let answer = rig.driver.request(8, &[&[4, 0, pairs, 0]], &[1]);
                assert_eq!(answer, [0], "{pairs} pairs");
                let status = rig.link_status();
                assert_eq!(status, 1, "queues that are not used look gone");
            }
            let answer = rig.driver.request(8, &[&[4, 0, 1, 0]], &[1]);
            assert_eq!(answer, [0]);
        }
        let socket = UdpSocket::bind(format!("10.213.{}.1:0", host.net)).unwrap();
        socket.connect(format!("10.213.{}.2:7", host.net)).unwrap();
        socket.send(&frame(5, 1000)).unwrap();
        let packet = next_ip(&mut rig, &given, host.net);
        assert_eq!(packet[12 + 42..], frame(5, 1000));
        assert_eq!(rig.link_status(), 1);
    }
}

fn refusal(config: &NetworkInterface) -> String {
    let text = Net::new(config).err().expect("it is taken").to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn what_is_no_free_tap_is_refused_with_what_to_do() {
    let mut config = interface("eth0");
    config.host_dev_name = "hkmissing".into();
    let text = refusal(&config);
    assert!(text.contains("sudo ip tuntap add dev hkmissing"), "{text}");
    config.host_dev_name = "lo".into();
    assert!(refusal(&config).contains("lo is no tap"));

    let host = Host::new(&[]);
    let _net = Net::new(&host.interface()).unwrap();
    assert!(refusal(&host.interface()).contains("in use"));

    let single = Host::new(&[]);
    let mut config = single.interface();
    config.queues = 2;
    assert!(refusal(&config).contains("multi_queue"));
    config.queues = 32;
    assert!(refusal(&config).contains("1 to 31"));
}

#[test]
fn a_tap_may_come_as_a_descriptor() {
    let host = Host::new(&[]);
    let by_name = Tap::open(&host.name, 1).unwrap();
    let number = by_name.sources()[0].0;
    let mut config = interface("eth0");
    config.tap_fd = Some(number);
    let mut rig = Rig::start(Net::new(&config).unwrap(), 0);
    // The descriptor that was given is not needed any more.
    drop(by_name);
    let given = rig.give(0, 100, 2048);
    let socket = UdpSocket::bind(format!("10.213.{}.1:0", host.net)).unwrap();
    socket.connect(format!("10.213.{}.2:7", host.net)).unwrap();
    socket.send(&frame(5, 100)).unwrap();
    next_ip(&mut rig, &given, host.net);

    config.queues = 2;
    assert!(refusal(&config).contains("name the tap"));
    config.queues = 1;
    let file = tempfile::tempfile().unwrap();
    for bad in [-1, 1_000_000, file.as_raw_fd()] {
        config.tap_fd = Some(bad);
        assert!(refusal(&config).contains(&format!("descriptor {bad} ")));
    }
}
