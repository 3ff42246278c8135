//! Guests that break the rules, programs that do, and what is limited.

use super::super::packet::{HEADER_SIZE, Header, SHUTDOWN_BOTH, operation};
use super::super::{MAX_CONNECTIONS, RX, TX, muxer};
use super::guest::{Guest, Socket};
use super::{Machine, accept, ask, assert_ended, connect, fill, ok};
use husk_virtio::testing::PATIENCE;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

#[test]
fn a_guest_that_ignores_credit_is_cut_off() {
    let mut machine = Machine::new();
    let listener = machine.listen(52);
    let mut guest = machine.guest();
    let mut socket = Socket::connect(&mut guest, 5, 52);
    let host = accept(&listener);
    fill(&mut guest, &mut socket);
    socket.write(&mut guest, b"x");
    guest.expect(operation::RST);
    drop(host);
    // Others are not concerned.
    Socket::connect(&mut guest, 6, 52).close(&mut guest);
}

#[test]
fn there_is_a_limit_and_room_again_below_it() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    // For other tests there is to be something left.
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
    let mut machine = Machine::new();
    let path = machine.path();
    let listener = machine.listen(52);
    let server = std::thread::spawn(move || {
        let connections = listener.incoming().take(MAX_CONNECTIONS + 1);
        connections.map(Result::unwrap).collect::<Vec<_>>()
    });
    let mut guest = machine.guest();
    let mut open: Vec<Socket> = (0..MAX_CONNECTIONS as u32)
        .map(|own| Socket::connect(&mut guest, own, 52))
        .collect();
    let refused = Socket::new(5000, 52);
    guest.send(refused.packet(operation::REQUEST, 0), &[]);
    guest.expect(operation::RST);
    assert_ended(&connect(&path));
    open[500].close(&mut guest);
    Socket::connect(&mut guest, 5000, 52);
    server.join().unwrap();
}

#[test]
fn a_program_that_never_accepts_is_not_waited_for() {
    let mut machine = Machine::new();
    let listener = machine.listen(52);
    rustix::net::listen(&listener, 0).unwrap();
    let mut guest = machine.guest();
    Socket::connect(&mut guest, 1, 52);
    let second = Socket::new(2, 52);
    guest.send(second.packet(operation::REQUEST, 0), &[]);
    assert_eq!(guest.expect(operation::RST).dst_port, 2);
}

#[test]
fn a_program_that_says_something_else_is_dropped() {
    let mut machine = Machine::new();
    let path = machine.path();
    let mut guest = machine.guest();
    for line in [
        "\n",
        "CONNECT\n",
        "CONNECT 1 2\n",
        "CONNECT +1\n",
        "CONNECT 4294967296\n",
        "GET / HTTP/1.1\r\n",
        "CONNECT 00000000000000000000000000000000000000001\n",
    ] {
        let mut stream = connect(&path);
        stream.write_all(line.as_bytes()).unwrap();
        assert_ended(&stream);
    }
    // Silent, and gone in the middle of the line.
    let silent = connect(&path);
    let mut gone = connect(&path);
    gone.write_all(b"CONNE").unwrap();
    drop(gone);
    // In pieces it is as good.
    let mut slow = connect(&path);
    for byte in b"connect 4294967295\n" {
        slow.write_all(&[*byte]).unwrap();
        std::thread::yield_now();
    }
    let socket = Socket::accept(&mut guest);
    assert_eq!(socket.guest, u32::MAX);
    assert_eq!(ok(&slow), socket.host);
    assert_ended(&silent);
    guest.assert_quiet();
}

#[test]
fn what_leads_nowhere_is_answered_with_a_reset() {
    let mut machine = Machine::new();
    let stale = machine.listen(53);
    drop(stale);
    let mut guest = machine.guest();
    let socket = Socket::new(5, 52);
    let request = socket.packet(operation::REQUEST, 0);
    let cases = [
        ("nobody listens", request),
        (
            "nobody listens any more",
            Header {
                dst_port: 53,
                ..request
            },
        ),
        (
            "another context",
            Header {
                dst_cid: 3,
                ..request
            },
        ),
        (
            "a context of 64 bits",
            Header {
                dst_cid: 2 | 1 << 32,
                ..request
            },
        ),
        ("a datagram", Header { kind: 3, ..request }),
        ("seqpacket", Header { kind: 2, ..request }),
        ("data for nobody", socket.packet(operation::RW, 0)),
        ("a shutdown for nobody", socket.shutdown(SHUTDOWN_BOTH)),
        (
            "a response to nobody",
            socket.packet(operation::RESPONSE, 0),
        ),
        ("no operation", socket.packet(0, 0)),
        ("data that is not there", socket.packet(operation::RW, 1)),
        (
            "data of 4 GiB",
            socket.packet(operation::REQUEST, u32::MAX as usize),
        ),
    ];
    for (what, header) in cases {
        guest.send(header, &[]);
        let answer = guest.expect(operation::RST);
        assert_eq!(answer.src_cid, header.dst_cid, "{what}");
        assert_eq!(answer.src_port, header.dst_port, "{what}");
        assert_eq!((answer.dst_port, answer.kind), (5, header.kind), "{what}");
    }
    // No answer: a reset, and what another guest would have sent.
    guest.send(socket.packet(operation::RST, 0), &[]);
    guest.send(
        Header {
            src_cid: 4,
            ..request
        },
        &[],
    );
    guest.assert_quiet();
}

#[test]
fn what_makes_no_sense_ends_the_connection_and_no_other() {
    let mut machine = Machine::new();
    let listener = machine.listen(52);
    let mut guest = machine.guest();
    let mut good = Socket::connect(&mut guest, 1, 52);
    let mut end = accept(&listener);
    let ends: [fn(&Socket) -> Header; 5] = [
        |socket| socket.packet(operation::REQUEST, 0),
        |socket| socket.packet(operation::RESPONSE, 0),
        |socket| socket.packet(0, 0),
        |socket| socket.packet(0xffff, 0),
        |socket| socket.packet(operation::RW, 100),
    ];
    for header in ends {
        let socket = Socket::connect(&mut guest, 5, 52);
        let host = accept(&listener);
        guest.send(header(&socket), b"only a few bytes");
        guest.expect(operation::RST);
        assert_ended(&host);
        guest.assert_quiet();
    }
    good.write(&mut guest, b"fine");
    let mut data = [0; 4];
    end.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"fine");
}

#[test]
fn answers_are_not_piled_up_for_a_guest_that_takes_none() {
    const MORE: usize = 100;
    let mut machine = Machine::new();
    let mut guest = Guest::new(&mut machine.driver, &[100], 0, &[]);
    let header = Socket::new(5, 52).packet(operation::RW, 0);
    for _ in 0..muxer::MAX_ANSWERS {
        guest.send(header, &[]);
    }
    for _ in 0..MORE {
        guest.post(header, &[]);
    }
    // The second comes after all that was there at the first.
    guest.driver.registers.write_config(0, &[0]);
    guest.driver.registers.write_config(0, &[0]);
    assert_eq!(guest.driver.queues[1].lent(), MORE);
    assert_eq!(guest.driver.queues[1].take_used(), None);
    for _ in 0..4 {
        guest.offer(&[100]);
    }
    // What has found room is taken without another kick.
    for _ in 0..4 {
        guest.driver.wait_used(1);
    }
    for _ in 0..muxer::MAX_ANSWERS + MORE {
        guest.expect(operation::RST);
    }
    for _ in 4..MORE {
        guest.driver.wait_used(1);
    }
    assert_eq!(guest.try_receive(), None);
}

#[test]
fn a_guest_that_opens_and_resets_and_takes_nothing_leaves_nothing() {
    let mut machine = Machine::new();
    let listener = machine.listen(52);
    let mut guest = Guest::new(&mut machine.driver, &[100], 0, &[]);
    for _ in 0..2 * MAX_CONNECTIONS {
        let socket = Socket::new(5, 52);
        guest.send(socket.packet(operation::REQUEST, 0), &[]);
        guest.send(socket.packet(operation::RST, 0), &[]);
        let host = accept(&listener);
        assert_ended(&host);
    }
    guest.offer(&[4096]);
    guest.assert_quiet();
}

#[test]
fn short_packets_and_small_buffers_need_a_reset() {
    for short in [true, false] {
        let mut machine = Machine::new();
        let path = machine.path();
        let driver = &mut machine.driver;
        let queue = if short { TX } else { RX };
        let chain = match short {
            true => driver.chain(&[&[0; HEADER_SIZE - 1]], &[]),
            false => driver.chain(&[], &[HEADER_SIZE]),
        };
        driver.queues[usize::from(queue)].add(&chain, husk_virtio::testing::Layout::Direct, 0);
        driver.registers.notify(queue);
        let _host = (!short).then(|| ask(&path, 1));
        let until = Instant::now() + PATIENCE;
        while driver.registers.status() & 0x40 == 0 {
            assert!(Instant::now() < until, "the device takes it");
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}
