//! Vsock: much of it, and its ends.

use crate::common::guest::{Kernel, LIMIT};
use crate::common::{Vm, assert_same_bytes, temp_dir};
use crate::help::{Accept, connect, guest, words};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

/// One connection, a pattern that the guest makes and knows again when it comes back.
pub fn sockets_carry_500_mb_each_way(kernel: &Kernel, flags: &[&str]) {
    const BYTES: u64 = 500_000_000;
    let dir = temp_dir();
    let echo = UnixListener::bind(dir.path().join("v_6001")).unwrap();
    let mut guest = guest(kernel, &format!("tool send 6001 {BYTES}\n"));
    guest.limit *= 4;
    let vsock = format!("cid=3,uds={}", dir.path().join("v").display());
    let mut vm = guest.start(&words(
        "--cmdline quiet --vsock",
        &[&[&*vsock], flags].concat(),
    ));
    let stream = vm.accept(&echo);
    let start = Instant::now();
    let mut reader = stream.try_clone().unwrap();
    let moved = std::io::copy(&mut reader, &mut &stream).unwrap();
    drop((reader, stream));
    vm.expect(&format!("tool: {BYTES} bytes came back\n"));
    eprintln!("{moved} bytes there and back in {:.1?}", start.elapsed());
    vm.finish().expect_status(0);
}

/// Bytes that either side sends where something is to be sent: more than one side's buffer has room for.
const SOME: usize = 300_000;

/// Half or all of a connection is closed by either end, with data under way or not; connections from the host and from the
/// guest. Nothing that was sent before is lost, and nobody waits for ever.
pub fn either_end_of_a_connection_closes_first(kernel: &Kernel, flags: &[&str]) {
    let dir = temp_dir();
    let socket = dir.path().join("v");
    let listener = UnixListener::bind(dir.path().join("v_7001")).unwrap();
    let script = format!(
        "tool behave from 7000 {0}\ntool behave to 7001 {0}\n",
        MODES.len()
    );
    let guest = guest(kernel, &script);
    let vsock = format!("cid=3,uds={}", socket.display());
    let mut vm = guest.start(&words(
        "--cmdline quiet --vsock",
        &[&[&*vsock], flags].concat(),
    ));
    vm.expect("tool: behaving\n");
    for mode in MODES {
        meet(&mut vm, connect(&socket, 7000), mode);
    }
    vm.expect("tool: behaved\n");
    for mode in MODES {
        let stream = vm.accept(&listener);
        meet(&mut vm, stream, mode);
    }
    vm.expect("tool: behaved\n");
    let ended = vm.finish();
    ended.expect_status(0);
    assert_eq!(ended.stderr, "");
}

/// What the guest does with a connection; see its tool.
const MODES: [char; 6] = ['c', 'h', 'r', 'x', 'u', 'g'];

/// The host's side of one connection.
#[track_caller]
fn meet(vm: &mut Vm, mut stream: UnixStream, mode: char) {
    let sent: Vec<u8> = (0..SOME).map(|i| (i % 251) as u8).collect();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream.write_all(&[mode as u8]).unwrap();
    let mut received = Vec::new();
    let mut guest_reads = 0;
    match mode {
        // The guest closes, all of it or its half.
        'c' => drop(stream.read_to_end(&mut received).unwrap()),
        'h' => {
            stream.read_to_end(&mut received).unwrap();
            stream.write_all(&sent).unwrap();
            guest_reads = SOME;
        }
        // The host closes its half.
        'r' => {
            stream.write_all(&sent).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            stream.read_to_end(&mut received).unwrap();
            guest_reads = SOME;
        }
        // The host closes all of it: behind what it sent, or with the guest's data under way.
        'x' => {
            stream.write_all(&sent).unwrap();
            guest_reads = SOME;
        }
        'u' => stream.read_exact(&mut [0; 1000]).unwrap(),
        // The guest closes, with the host's data under way.
        _ => {
            let gone = loop {
                match stream.write_all(&sent) {
                    Ok(()) => {}
                    Err(e) => break e,
                }
            };
            let expected = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
            assert!(expected.contains(&gone.kind()), "{gone}");
        }
    }
    drop(stream);
    if ['c', 'h', 'r'].contains(&mode) {
        assert_same_bytes(&format!("what came in mode {mode}"), &received, &sent);
    }
    vm.expect(&format!("tool: {mode} read {guest_reads}\n"));
}
