//! The user network, with the real passt.

use super::*;
use husk_config::{Forward, UserNetwork};
use std::net::TcpListener;
use std::process::{Command, Stdio};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

fn user_network(forwards: Vec<Forward>) -> NetworkInterface {
    let mut config = interface("eth0");
    config.user = Some(UserNetwork { forwards });
    config.guest_mac = Some("52:54:00:12:34:56".into());
    config
}

/// A passt in a network of its own, for it does not start without a way out. What it is told comes behind.
fn command() -> Command {
    const SCRIPT: &str = "ip link set lo up
        ip tuntap add dev out mode tap
        ip addr add 10.214.0.2/24 dev out
        ip link set out up
        ip route add default via 10.214.0.1
        exec passt \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--net", "--", "sh", "-ec", SCRIPT, "sh"]);
    command
}

/// A device with such a passt, and the process.
fn started(forwards: Vec<Forward>) -> (Net, rustix::process::Pid) {
    let config = user_network(forwards);
    let user = config.user.clone().unwrap();
    let passt = Passt::start_as(command(), &config, &user).unwrap();
    let process = passt.process();
    let net = Net::with_backend(&config, Box::new(passt)).unwrap();
    (net, process)
}

/// DHCPDISCOVER, in UDP, in IPv4, in Ethernet, with `padding` bytes behind.
fn discover(padding: usize) -> Vec<u8> {
    let mut dhcp = vec![1, 1, 6, 0, 0xca, 0xfe, 0xba, 0xbe];
    dhcp.extend([0; 20]);
    dhcp.extend(MAC);
    dhcp.extend([0; 10 + 64 + 128]);
    dhcp.extend([0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255]);
    dhcp.extend(vec![0; padding]);
    let udp_length = (dhcp.len() + 8) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((udp_length + 20).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    let sum: u32 = ip
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend([0, 68, 0, 67]);
    frame.extend(udp_length.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(dhcp);
    frame
}

/// Of an answer to it: the message type (2: offer).
fn is_offer(packet: &[u8]) -> bool {
    let (header, frame) = packet.split_at(12);
    let udp = &frame[14 + 20..];
    let answers = frame[12..14] == [8, 0] && udp[..4] == [0, 67, 0, 68];
    if answers {
        assert_eq!(header[0], 2, "the checksum is said to be sound");
        assert_eq!(frame[..6], MAC);
        let mut options = &udp[8 + 240..];
        while options[0] != 53 {
            options = &options[2 + usize::from(options[1])..];
        }
        assert_eq!(options[..3], [53, 1, 2], "DHCPOFFER");
    }
    answers
}

/// Wait for the offer among whatever else passt says (router advertisements, say).
#[track_caller]
fn wait_offer(rig: &mut Rig, given: &[(u16, u64)]) {
    while !is_offer(&rig.take(0, given)) {}
}

#[test]
fn passt_gives_the_guest_an_address() {
    let (net, _) = started(Vec::new());
    let mut rig = Rig::start(net, 0);
    let mut mtu = [0; 2];
    rig.driver.registers.read_config(10, &mut mtu);
    assert_eq!(u16::from_le_bytes(mtu), 65520);
    let given = rig.give(0, 64, 2048);
    for _ in 0..3 {
        rig.send(1, &discover(0));
        wait_offer(&mut rig, &given);
    }
    // Another driver (a rebooted guest) goes on with the same passt.
    rig.driver.start(u64::MAX, 256);
    let given = rig.give(0, 64, 2048);
    rig.send(1, &discover(0));
    wait_offer(&mut rig, &given);
    assert_eq!(rig.link_status(), 1);
}

#[test]
fn a_busy_passt_holds_the_guest_up_and_gets_whole_frames() {
    let (net, process) = started(Vec::new());
    let mut rig = Rig::start(net, 0);
    let given = rig.give(0, 200, 2048);
    rig.send(1, &discover(0));
    wait_offer(&mut rig, &given);

    rustix::process::kill_process(process, rustix::process::Signal::STOP).unwrap();
    let chain = rig.driver.chain(&[&[0; 12], &discover(60_000)], &[]);
    for _ in 0..100 {
        rig.driver.queues[1].add(&chain, Layout::Direct, 0);
        rig.driver.registers.notify(1);
    }
    // 6 MB are more than any socket takes; some were sent, and one in part.
    rig.driver.wait_used(1);
    std::thread::sleep(Duration::from_millis(20));
    let mut done = 1;
    while rig.driver.queues[1].take_used().is_some() {
        done += 1;
    }
    assert!(done < 100, "all were sent");
    rustix::process::kill_process(process, rustix::process::Signal::CONT).unwrap();
    for _ in done..100 {
        rig.driver.wait_used(1);
    }
    // Were one frame not whole, passt would understand none after it.
    rig.send(1, &discover(0));
    wait_offer(&mut rig, &given);
    assert_eq!(rig.link_status(), 1);
}

#[test]
fn when_passt_dies_the_link_goes_down_and_the_guest_goes_on() {
    let (net, process) = started(Vec::new());
    let mut rig = Rig::start(net, 0);
    rig.give(0, 4, 2048);
    rig.driver.registers.take_interrupt();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    rig.wait_link_down();
    rig.send(1, &discover(0));
}

#[test]
fn passt_ends_with_the_device() {
    let (net, process) = started(Vec::new());
    drop(net);
    assert!(rustix::process::test_kill_process(process).is_err());
}

#[test]
fn a_forwarded_port_leads_to_the_guest() {
    // Below those that Linux gives to whoever asks for any.
    let host = 20_000 + (std::process::id() % 10_000) as u16;
    let (net, process) = started(vec![Forward { host, guest: 8080 }]);
    let mut rig = Rig::start(net, 0);
    let given = rig.give(0, 200, 2048);
    rig.send(1, &discover(0));
    wait_offer(&mut rig, &given);
    // Linux answers for passt; the connection stays until the guest has seen it.
    let script = format!("exec 3<>/dev/tcp/127.0.0.1/{host} && read line");
    let mut client = Command::new("nsenter")
        .args(["-t", &process.to_string(), "-n", "bash", "-c", &script])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    // passt either knows the guest's address and sends the SYN, or asks for it first: both are for port 8080's owner.
    loop {
        let packet = rig.take(0, &given);
        let frame = &packet[12..];
        let asks = frame[12..14] == [8, 6];
        let tcp = frame[12..14] == [8, 0] && frame[14 + 9] == 6;
        if tcp {
            assert_eq!(frame[14 + 20 + 2..][..2], 8080u16.to_be_bytes());
            assert_ne!(frame[14 + 20 + 13] & 2, 0, "SYN");
        }
        if asks || tcp {
            break;
        }
    }
    drop(client.stdin.take());
    client.wait().unwrap();
}

#[test]
fn a_port_that_is_taken_is_an_error_before_the_guest_starts() {
    let taken = TcpListener::bind(("0.0.0.0", 0)).unwrap();
    let host = taken.local_addr().unwrap().port();
    let error = Net::new(&user_network(vec![Forward { host, guest: 80 }])).err();
    let text = error.unwrap().to_string();
    assert!(text.contains(&format!("port {host}")), "{text}");
    assert!(text.contains("in use"), "{text}");
    drop(taken);
    let twice = [80, 81].map(|guest| Forward { host, guest });
    assert!(Net::new(&user_network(twice.to_vec())).is_err());
}
