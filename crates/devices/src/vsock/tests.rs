//! The device, driven by a guest's side, with programs of the host at the other end.

mod guest;
mod hostile;

use super::connection::BUFFER_SIZE;
use super::packet::{HEADER_SIZE, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, operation};
use super::*;
use guest::{CID, Guest, Socket};
use husk_virtio::testing::{Driver, Mmio, PATIENCE, Subject, check_device, memory};
use husk_virtio::{DeviceThread, F_EVENT_IDX, F_INDIRECT_DESC};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Instant;

/// A VM with the device, and the folder of its sockets.
struct Machine {
    driver: Driver,
    folder: tempfile::TempDir,
    _thread: Arc<DeviceThread>,
}

impl Machine {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let device = device(&folder.path().join("v")).unwrap();
        Self::with(folder, device)
    }

    fn with(folder: tempfile::TempDir, device: Vsock) -> Self {
        let thread = Arc::new(DeviceThread::start("vsock", || ()).unwrap());
        let mem = memory();
        let registers = Mmio::new(Box::new(device), &thread, &mem);
        let mut driver = Driver::new(Box::new(registers), mem);
        driver.start(u64::MAX, 256);
        Self {
            driver,
            folder,
            _thread: thread,
        }
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("v")
    }

    /// The guest's side, as Linux has it.
    fn guest(&mut self) -> Guest<'_> {
        Guest::new(&mut self.driver, &[4096], 32, &[HEADER_SIZE])
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.path().join(format!("v_{port}"))).unwrap()
    }
}

fn device(path: &Path) -> Result<Vsock, Error> {
    Vsock::new(&husk_config::Vsock {
        guest_cid: CID as u32,
        uds_path: path.into(),
        vsock_id: None,
    })
}

/// A program of the host's that connects to the device.
fn connect(path: &Path) -> UnixStream {
    impatient(UnixStream::connect(path).unwrap())
}

/// A program of the host's that is connected to by the guest.
fn accept(listener: &UnixListener) -> UnixStream {
    impatient(listener.accept().unwrap().0)
}

fn impatient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A program of the host's that asks for a port.
fn ask(path: &Path, port: u32) -> UnixStream {
    let mut stream = connect(path);
    let line = format!("CONNECT {port}\n");
    stream.write_all(line.as_bytes()).unwrap();
    stream
}

/// The port that `OK` tells.
#[track_caller]
fn ok(stream: &UnixStream) -> u32 {
    let mut line = String::new();
    // One byte at a time: nothing that comes behind is lost.
    let mut reader = BufReader::with_capacity(1, stream);
    reader.read_line(&mut line).unwrap();
    let port = line.strip_prefix("OK ").and_then(|l| l.strip_suffix('\n'));
    port.unwrap_or_else(|| panic!("{line:?}")).parse().unwrap()
}

#[track_caller]
fn assert_ended(mut stream: &UnixStream) {
    match stream.read(&mut [0; 16]) {
        Ok(count) => assert_eq!(count, 0),
        Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset),
    }
}

fn pattern(length: usize, seed: u32) -> Vec<u8> {
    let byte = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8;
    (0..length as u32).map(byte).collect()
}

fn echo(listener: UnixListener, connections: usize) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let serve = |stream: UnixStream| {
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut &stream, &mut &stream);
                let _ = stream.shutdown(Shutdown::Write);
            })
        };
        let incoming = listener.incoming().take(connections);
        let all: Vec<_> = incoming.map(|stream| serve(stream.unwrap())).collect();
        all.into_iter().for_each(|one| one.join().unwrap());
    })
}

#[test]
fn it_passes_the_kit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v");
    let listener = UnixListener::bind(folder.path().join("v_52")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let use_it = |driver: &mut Driver| {
        let mut cid = [0; 8];
        driver.registers.read_config(0, &mut cid);
        assert_eq!(u64::from_le_bytes(cid), CID);
        let mut guest = Guest::new(driver, &[60, 2000], 4, &[7, 40]);
        // Connections that a test before this left in the backlog are dropped.
        while listener.accept().is_ok() {}
        let mut socket = Socket::connect(&mut guest, 1000, 52);
        let mut host = accept(&listener);
        socket.write(&mut guest, b"ping");
        let mut data = [0; 4];
        host.read_exact(&mut data).unwrap();
        assert_eq!(&data, b"ping");
        host.write_all(b"pong").unwrap();
        socket.pump(&mut guest);
        assert_eq!(socket.data, b"pong");
        socket.close(&mut guest);
        assert_ended(&host);

        let host = ask(&path, 7);
        let socket = Socket::accept(&mut guest);
        assert_eq!((socket.guest, ok(&host)), (7, socket.host));
    };
    check_device(&Subject {
        memory: husk_virtio::testing::memory,
        make: &|| Box::new(device(&path).unwrap()),
        use_it: &use_it,
        use_again: Some(&|driver| passes_on(driver)),
        eager: &[TX.into()],
    });
}

/// The device takes a packet and gives the buffer back: what it received into before is not ours to know.
fn passes_on(driver: &mut Driver) {
    let mut guest = Guest::new(driver, &[60], 0, &[44]);
    let stray = Socket::new(1, 2);
    guest.send(stray.packet(operation::CREDIT_UPDATE, 0), &[]);
}

/// Send all of `data` and receive as much, which is to be the same.
fn echo_all(guest: &mut Guest, socket: &mut Socket, data: &[u8]) {
    let mut rest = data;
    let until = Instant::now() + PATIENCE;
    let start = socket.data.len();
    while socket.data.len() < start + data.len() {
        let count = rest.len().min(socket.credit()).min(64 << 10);
        if count > 0 {
            let (now, later) = rest.split_at(count);
            socket.write(guest, now);
            rest = later;
        }
        while let Some((header, data)) = guest.try_receive() {
            socket.note(&header, &data);
        }
        if socket.data.len() as u32 - socket.taken > socket.alloc / 2 {
            socket.read_all(guest);
        }
        assert!(Instant::now() < until, "the echo does not come");
    }
    assert!(socket.data[start..] == *data, "the data is not the same");
}

#[test]
fn a_megabyte_goes_both_ways_in_any_layout() {
    let layouts: [(&[usize], &[usize]); 5] = [
        (&[4096], &[44]),
        (&[44, 4096], &[]),
        (&[1, 42, 5, 999, 3, 70_000], &[1, 2, 41, 1, 10_000, 7]),
        (&[45, 1], &[43, 2]),
        (&[65_580], &[11, 11, 11, 11, 1, 2, 3, 4, 5, 6, 7]),
    ];
    for features in [u64::MAX, !F_EVENT_IDX, !F_INDIRECT_DESC] {
        for (rx, tx) in layouts {
            let mut machine = Machine::new();
            let server = echo(machine.listen(52), 1);
            machine.driver.start(features, 256);
            let mut guest = Guest::new(&mut machine.driver, rx, 16, tx);
            let mut socket = Socket::connect(&mut guest, 5, 52);
            // Two bytes in each packet: less of them does as well.
            let length = if rx == [45, 1] { 2000 } else { 1 << 20 };
            echo_all(&mut guest, &mut socket, &pattern(length, 1));
            socket.close(&mut guest);
            server.join().unwrap();
        }
    }
}

#[test]
fn a_program_of_the_host_connects_to_the_guest() {
    let mut machine = Machine::new();
    let path = machine.path();
    let mut guest = machine.guest();
    let mut host = ask(&path, 1234);
    // What comes right behind the line is for the guest.
    host.write_all(b"early").unwrap();
    let mut socket = Socket::accept(&mut guest);
    assert_eq!(socket.guest, 1234);
    assert!(socket.host >= 1 << 30);
    assert_eq!(ok(&host), socket.host);
    socket.pump(&mut guest);
    assert_eq!(socket.data, b"early");
    socket.write(&mut guest, b"hello");
    let mut data = [0; 5];
    host.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"hello");

    let other = ask(&path, 1234);
    let second = Socket::accept(&mut guest);
    assert_ne!(second.host, socket.host);
    assert_eq!(ok(&other), second.host);
    socket.close(&mut guest);
    assert_ended(&host);
}

#[test]
fn a_guest_that_refuses_ends_the_programs_connection() {
    let mut machine = Machine::new();
    let path = machine.path();
    let mut guest = machine.guest();
    let host = ask(&path, 1234);
    let header = guest.expect(operation::REQUEST);
    let socket = Socket::new(header.dst_port, header.src_port);
    guest.send(socket.packet(operation::RST, 0), &[]);
    assert_ended(&host);
    guest.assert_quiet();
}

#[test]
fn a_guest_that_does_not_answer_is_not_waited_for() {
    let mut machine = Machine::new();
    let path = machine.path();
    let mut guest = machine.guest();
    let host = ask(&path, 1234);
    guest.expect(operation::REQUEST);
    assert_ended(&host);
    guest.expect(operation::RST);
}

#[test]
fn a_guest_may_end_its_direction_and_still_receive() {
    let mut machine = Machine::new();
    let listener = machine.listen(52);
    let mut guest = machine.guest();
    let mut socket = Socket::connect(&mut guest, 5, 52);
    let mut host = accept(&listener);
    socket.write(&mut guest, b"question");
    guest.send(socket.shutdown(SHUTDOWN_SEND), &[]);
    let mut question = String::new();
    host.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    host.write_all(b"answer").unwrap();
    socket.pump(&mut guest);
    assert_eq!(socket.data, b"answer");
    drop(host);
    while socket.shut != SHUTDOWN_BOTH {
        socket.pump(&mut guest);
    }
    guest.send(socket.packet(operation::RST, 0), &[]);
    guest.assert_quiet();
}

#[test]
fn a_program_may_end_its_direction_and_still_receive() {
    let mut machine = Machine::new();
    let listener = machine.listen(52);
    let mut guest = machine.guest();
    let mut socket = Socket::connect(&mut guest, 5, 52);
    let mut host = accept(&listener);
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    while socket.shut == 0 {
        socket.pump(&mut guest);
    }
    assert_eq!(
        (socket.shut, &socket.data[..]),
        (SHUTDOWN_SEND, &b"question"[..])
    );
    socket.write(&mut guest, b"answer");
    socket.close(&mut guest);
    let mut answer = String::new();
    host.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
}

#[test]
fn a_guest_that_receives_no_more_stops_the_program_from_sending() {
    let mut machine = Machine::new();
    let listener = machine.listen(52);
    let mut guest = machine.guest();
    let mut socket = Socket::connect(&mut guest, 5, 52);
    let mut host = accept(&listener);
    guest.send(socket.shutdown(SHUTDOWN_RECEIVE), &[]);
    // The other direction goes on, and shows that this one has ended.
    socket.write(&mut guest, b"more");
    let mut data = [0; 4];
    host.read_exact(&mut data).unwrap();
    let error = host.write_all(b"no").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    drop(host);
    while socket.shut != SHUTDOWN_BOTH {
        socket.pump(&mut guest);
    }
}

#[test]
fn a_program_that_goes_is_waited_for_by_nobody() {
    let mut machine = Machine::new();
    let listener = machine.listen(52);
    let mut guest = machine.guest();
    let mut socket = Socket::connect(&mut guest, 5, 52);
    let mut host = accept(&listener);
    host.write_all(b"last words").unwrap();
    drop(host);
    while socket.shut != SHUTDOWN_BOTH {
        socket.pump(&mut guest);
    }
    assert_eq!(socket.data, b"last words");
    // On its way; then no RST comes from the guest, so the device ends it.
    socket.write(&mut guest, b"too late");
    while !socket.reset {
        socket.pump(&mut guest);
    }
    guest.send(socket.packet(operation::RW, 0), &[]);
    guest.expect(operation::RST);
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut machine = Machine::new();
    let listener = machine.listen(52);
    let mut guest = machine.guest();
    let mut socket = Socket::new(5, 52);
    socket.alloc = 1000;
    guest.send(socket.packet(operation::REQUEST, 0), &[]);
    socket.pump(&mut guest);
    let mut host = accept(&listener);
    let data = pattern(5500, 3);
    host.write_all(&data).unwrap();
    for round in 1..=5 {
        while socket.asked < round {
            socket.pump(&mut guest);
        }
        assert_eq!(socket.data.len(), 1000 * round as usize);
        guest.assert_quiet();
        socket.read_all(&mut guest);
    }
    while socket.data.len() < data.len() {
        socket.pump(&mut guest);
    }
    assert_eq!(socket.data, data);
}

/// Send until there is no more credit: the data.
fn fill(guest: &mut Guest, socket: &mut Socket) -> Vec<u8> {
    let mut data = Vec::new();
    loop {
        while let Some((header, data)) = guest.try_receive() {
            socket.note(&header, &data);
        }
        if socket.credit() == 0 {
            // What was just taken is told when one asks.
            guest.send(socket.packet(operation::CREDIT_REQUEST, 0), &[]);
            while socket.pump(guest) != operation::CREDIT_UPDATE {}
            if socket.credit() == 0 {
                return data;
            }
        }
        let part = pattern(socket.credit().min(50_000), data.len() as u32);
        socket.write(guest, &part);
        data.extend(part);
    }
}

#[test]
fn a_slow_program_gets_everything_and_the_guest_waits() {
    for closes_first in [false, true] {
        let mut machine = Machine::new();
        let listener = machine.listen(52);
        let mut guest = machine.guest();
        let mut socket = Socket::connect(&mut guest, 5, 52);
        let mut host = accept(&listener);
        let mut wanted = fill(&mut guest, &mut socket);
        assert!(wanted.len() > BUFFER_SIZE as usize);
        let mut data = vec![0; 100];
        if closes_first {
            socket.close(&mut guest);
            host.read_to_end(&mut data).unwrap();
            data.drain(..100);
        } else {
            data.resize(wanted.len(), 0);
            host.read_exact(&mut data).unwrap();
            // Room is told of without being asked.
            while socket.credit() < BUFFER_SIZE as usize / 2 {
                socket.pump(&mut guest);
            }
            socket.write(&mut guest, b"more");
            wanted.extend(b"more");
            data.extend([0; 4]);
            let at = data.len() - 4;
            host.read_exact(&mut data[at..]).unwrap();
        }
        assert!(data == wanted, "the data is not the same");
    }
}

#[test]
fn data_for_a_program_that_went_does_not_take_the_guests_room() {
    let mut machine = Machine::new();
    let listener = machine.listen(52);
    let mut guest = machine.guest();
    let mut socket = Socket::connect(&mut guest, 5, 52);
    let host = accept(&listener);
    fill(&mut guest, &mut socket);
    drop(host);
    while socket.shut == 0 {
        socket.pump(&mut guest);
    }
    assert_eq!(socket.credit(), BUFFER_SIZE as usize);
}

#[test]
fn two_hundred_connections_take_turns() {
    const COUNT: u32 = 200;
    let mut machine = Machine::new();
    let path = machine.path();
    let server = echo(machine.listen(52), COUNT as usize);
    let mut guest = machine.guest();
    let sockets = (0..COUNT).map(|own| Socket::connect(&mut guest, own, 52));
    let mut sockets: Vec<Socket> = sockets.collect();
    let hosts: Vec<_> = (0..COUNT).map(|_| ask(&path, 77)).collect();
    let accepted: Vec<_> = hosts.iter().map(|_| Socket::accept(&mut guest)).collect();
    for host in &hosts {
        let port = ok(host);
        assert!(accepted.iter().any(|socket| socket.host == port));
    }
    let data = |own: u32| pattern(9000, own);
    for socket in &mut sockets {
        socket.write(&mut guest, &data(socket.guest));
    }
    while sockets.iter().any(|socket| socket.data.len() < 9000) {
        let (header, data) = guest.receive();
        sockets[header.dst_port as usize].note(&header, &data);
    }
    for socket in &mut sockets {
        assert!(socket.data == data(socket.guest), "{}", socket.guest);
        socket.close(&mut guest);
    }
    server.join().unwrap();
}

#[test]
fn a_program_with_a_short_backlog_gets_all_connections() {
    const COUNT: u32 = 40;
    let mut machine = Machine::new();
    let listener = machine.listen(52);
    rustix::net::listen(&listener, 1).unwrap();
    let mut guest = machine.guest();
    let sockets: Vec<Socket> = (0..COUNT).map(|own| Socket::new(own, 52)).collect();
    for socket in &sockets {
        guest.send(socket.packet(operation::REQUEST, 0), &[]);
    }
    // One is given up meanwhile.
    guest.send(sockets[30].packet(operation::RST, 0), &[]);
    let server = std::thread::spawn(move || {
        let connections = listener.incoming().take(COUNT as usize - 1);
        connections.map(Result::unwrap).collect::<Vec<_>>()
    });
    for _ in 0..COUNT - 1 {
        guest.expect(operation::RESPONSE);
    }
    server.join().unwrap();
}

#[test]
fn a_reset_ends_connections_and_new_ones_come() {
    let mut machine = Machine::new();
    let path = machine.path();
    let listener = machine.listen(52);
    let mut guest = machine.guest();
    Socket::connect(&mut guest, 5, 52);
    let there = accept(&listener);
    let here = ask(&path, 9);
    Socket::accept(&mut guest);
    ok(&here);
    machine.driver.registers.set_status(0);
    assert_ended(&there);
    assert_ended(&here);
    // Nobody drives the device: who connects now waits for it.
    let waiting = ask(&path, 10);
    machine.driver.start(u64::MAX, 256);
    let mut guest = machine.guest();
    let socket = Socket::accept(&mut guest);
    assert_eq!(ok(&waiting), socket.host);
}

#[test]
fn what_a_guest_has_sent_outlives_a_reset_and_the_guest() {
    for (closes, resets) in [(true, false), (false, false), (true, true), (false, true)] {
        let mut machine = Machine::new();
        let listener = machine.listen(52);
        let mut guest = machine.guest();
        let mut socket = Socket::connect(&mut guest, 5, 52);
        let mut host = accept(&listener);
        let mut sent = fill(&mut guest, &mut socket);
        assert!(sent.len() > BUFFER_SIZE as usize, "the socket took it all");
        if closes {
            guest.post(socket.shutdown(SHUTDOWN_BOTH), &[]);
        } else {
            // Not even taken out of the queue, perhaps.
            host.read_exact(&mut vec![0; 200_000]).unwrap();
            sent.drain(..200_000);
        }
        if resets {
            machine.driver.registers.set_status(0);
        }
        let reader = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            let mut got = Vec::new();
            host.read_to_end(&mut got).unwrap();
            got
        });
        drop(machine);
        assert!(reader.join().unwrap() == sent, "{closes} {resets}");
    }
}

#[test]
fn a_program_that_reads_nothing_keeps_no_vm_from_ending() {
    let mut machine = Machine::new();
    let listener = machine.listen(52);
    let mut guest = machine.guest();
    let mut socket = Socket::connect(&mut guest, 5, 52);
    let host = accept(&listener);
    fill(&mut guest, &mut socket);
    drop(machine);
    drop(host);
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let folder = tempfile::tempdir().unwrap();
    let mut device = device(&folder.path().join("v")).unwrap();
    let state = device.save();
    device.load(state).unwrap();
    let mut machine = Machine::with(folder, device);
    let told = machine.driver.request(EVENT.into(), &[], &[8]);
    assert_eq!(told, 0_u32.to_le_bytes());
    // Once.
    let chain = machine.driver.chain(&[], &[8]);
    let layout = husk_virtio::testing::Layout::Direct;
    machine.driver.queues[usize::from(EVENT)].add(&chain, layout, 0);
    machine.driver.registers.notify(EVENT);
    machine.guest().assert_quiet();
    assert!(
        machine.driver.queues[usize::from(EVENT)]
            .take_used()
            .is_none()
    );
}

#[test]
fn the_socket_is_never_anothers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v");
    let refusal = |path: &Path| device(path).err().unwrap();
    let first = device(&path).unwrap();
    assert!(matches!(refusal(&path), Error::InUse(_)));
    // Its file is gone with it, but not what has taken its place.
    std::fs::remove_file(&path).unwrap();
    let second = device(&path).unwrap();
    drop(first);
    assert!(path.exists());
    drop(second);
    assert!(!path.exists());
    drop(UnixListener::bind(&path).unwrap());
    let stale = refusal(&path);
    assert!(matches!(stale, Error::Stale(_)));
    assert!(stale.to_string().contains("remove it"));
    assert!(path.exists());
    assert!(matches!(refusal(&path.join("x")), Error::Listen(..)));
}

#[test]
fn packets_bytes_and_connections_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v");
    let listener = UnixListener::bind(folder.path().join("v_52")).unwrap();
    let metrics = Arc::new(VsockMetrics::default());
    let config = husk_config::Vsock {
        guest_cid: CID as u32,
        uds_path: path,
        vsock_id: None,
    };
    let device = Vsock::with_metrics(&config, Arc::clone(&metrics)).unwrap();
    let thread = Arc::new(DeviceThread::start("vsock", || ()).unwrap());
    let mem = memory();
    let registers = Box::new(Mmio::new(Box::new(device), &thread, &mem));
    let mut driver = Driver::new(registers, mem);
    driver.start_badly();
    driver.start(u64::MAX, 64);
    driver.registers.write_config(0, &[9; 8]);
    let mut guest = Guest::new(&mut driver, &[4096], 32, &[HEADER_SIZE]);
    let mut lost = connect(&config.uds_path);
    lost.write_all(b"hello?\n").unwrap();
    assert_ended(&lost);
    let mut socket = Socket::connect(&mut guest, 1000, 52);
    let mut host = accept(&listener);
    socket.write(&mut guest, b"ping");
    host.read_exact(&mut [0; 4]).unwrap();
    host.write_all(b"pong back").unwrap();
    while socket.data.len() < 9 {
        socket.pump(&mut guest);
    }
    socket.close(&mut guest);
    assert_ended(&host);
    let m = &metrics;
    assert_eq!((m.tx_bytes_count.total(), m.rx_bytes_count.total()), (4, 9));
    // From the guest: REQUEST, RW, SHUTDOWN at least. To it: RESPONSE, RW, RST at least.
    assert!(m.tx_packets_count.total() >= 3 && m.rx_packets_count.total() >= 3);
    assert!(m.tx_queue_event_count.total() >= 3);
    assert_eq!((m.conns_added.total(), m.conns_removed.total()), (1, 1));
    assert_eq!(m.conns_killed.total(), 0);
    assert_eq!(m.conn_event_fails.total(), 1);
    assert_eq!((m.activate_fails.total(), m.cfg_fails.total()), (1, 1));
}
