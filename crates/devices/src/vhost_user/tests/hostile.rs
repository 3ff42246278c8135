//! Servers that answer wrongly, late or not at all, and what is no server.

use super::*;

/// A server may have the kicks' eventfds filled, and writing to them wait, as they are its own as well. That stops the vCPU that kicks,
/// and nobody else.
#[test]
fn a_server_that_fills_kicks_stops_only_who_kicks() {
    for pci in [false, true] {
        let mut guest = Guest::new(
            pci,
            Character {
                fills_kicks: true,
                ..Character::default()
            },
        );
        guest.driver.start(u64::MAX, 64);
        let (registers, size) = guest.driver.registers.raw();
        let doorbell = if pci { size - 0x1000 } else { 0x50 };
        std::thread::scope(|scope| {
            let vcpu = scope.spawn(move || registers.write(doorbell, &[0; 4]));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!vcpu.is_finished(), "it does not wait");
            guest.update().unwrap();
            assert_eq!(guest.driver.registers.status(), 15);
            assert_eq!(guest.capacity(), SECTORS);
            guest.server.leave();
        });
        guest.needs_reset();
    }
}

/// Why the disk of such a server is refused.
fn refused(change: fn(&mut Character), queues: u16) -> String {
    let mut character = Character::default();
    change(&mut character);
    let server = Server::start(character);
    let mut drive = drive(&server.path);
    drive.queues = queues;
    let asked = Instant::now();
    let error = VhostUserBlock::new(&drive).err().expect("it is refused");
    assert!(asked.elapsed() < Duration::from_secs(20));
    error.to_string()
}

#[test]
fn servers_that_lack_something_are_refused() {
    for (change, why) in [
        (
            (|c| c.features &= !(1 << 30)) as fn(&mut Character),
            "protocol features",
        ),
        (|c| c.features &= !(1 << 32), "virtio 1"),
        (|c| c.protocol &= !(1 << 9), "configuration space"),
        (|c| c.protocol &= !1, "1 queues, and 2"),
        (|c| c.queues = 1, "1 queues, and 2"),
        (|c| c.queues = 0, "0 queues, and 2"),
        (|c| c.config[20] = 1, "blocks of 513 bytes"),
        (|c| c.config[..8].fill(0xff), "sectors"),
    ] {
        let said = refused(change, 2);
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn wrong_answers_are_refused() {
    fn only(request: u32, own: u32, answer: Vec<u8>, change: fn(&mut Vec<u8>)) -> Option<Vec<u8>> {
        let mut answer = answer;
        if request == own {
            change(&mut answer);
        }
        Some(answer)
    }
    for (twist, why) in [
        // Another request's; another version; no answer at all; too long, wildly or not; too short.
        (
            (|r, a| only(r, 1, a, |a| a[0] = 2)) as fn(u32, Vec<u8>) -> Option<Vec<u8>>,
            "answers wrongly (request GetFeatures)",
        ),
        (|r, a| only(r, 15, a, |a| a[4] = 4 | 2), "answers wrongly"),
        (|r, a| only(r, 15, a, |a| a[4] = 1), "answers wrongly"),
        (
            |r, a| only(r, 1, a, |a| a[8..12].fill(0xff)),
            "answers wrongly",
        ),
        (|r, a| only(r, 1, a, |a| a[8] = 9), "answers wrongly"),
        (
            |r, a| {
                only(r, 1, a, |a| {
                    a[8] = 4;
                    a.truncate(16);
                })
            },
            "answers wrongly",
        ),
        (|r, a| only(r, 17, a, |a| a[8] = 0), "answers wrongly"),
        // A refusal of what has no answer else, and of the configuration space, as servers have it.
        (
            |r, a| only(r, 3, a, |a| a[12] = 1),
            "refuses (request SetOwner)",
        ),
        (
            |r, a| {
                only(r, 24, a, |a| {
                    a[8..12].fill(0);
                    a.truncate(12);
                })
            },
            "refuses (request GetConfig)",
        ),
        (
            |r, a| {
                only(r, 24, a, |a| {
                    a[8] = 20;
                    a.truncate(32);
                })
            },
            "refuses (request GetConfig)",
        ),
        // Nothing, or half of it, for ever.
        (|r, a| (r != 1).then_some(a), "does not answer within"),
        (
            |r, a| only(r, 24, a, |a| a.truncate(20)),
            "does not answer within",
        ),
    ] {
        let server = Server::start(Character {
            twist,
            ..Character::default()
        });
        let mut drive = drive(&server.path);
        drive.queues = 2;
        let asked = Instant::now();
        let said = VhostUserBlock::new(&drive).err().expect(why).to_string();
        assert!(said.contains(why), "{why}: {said}");
        assert!(asked.elapsed() < Duration::from_secs(20), "{why}");
    }
}

#[test]
fn a_server_that_stops_wrongly_or_not_at_all_is_left() {
    for twist in [
        // A wild position; another queue; silence; a refusal to start.
        (|r, mut a: Vec<u8>| {
            if r == 11 {
                a[18] = 1;
            }
            Some(a)
        }) as fn(u32, Vec<u8>) -> Option<Vec<u8>>,
        |r, mut a| {
            if r == 11 {
                a[12] = 7;
            }
            Some(a)
        },
        |r, a| (r != 11).then_some(a),
    ] {
        let mut guest = Guest::new(false, Character::default());
        guest.driver.start(u64::MAX, 64);
        use_disk(&mut guest.driver);
        guest.server.character.lock().unwrap().twist = twist;
        let asked = Instant::now();
        guest.driver.registers.set_status(0);
        assert!(asked.elapsed() < Duration::from_secs(20));
        // The next driver has the next connection.
        guest.driver.start(u64::MAX, 64);
        use_disk(&mut guest.driver);
        assert_eq!(guest.server.clients.load(Ordering::SeqCst), 2);
    }
    let mut guest = Guest::new(false, Character::default());
    guest.server.character.lock().unwrap().twist = |r, mut a| {
        if r == 9 {
            a[12] = 1;
        }
        Some(a)
    };
    guest.driver.set_up(u64::MAX, 64);
    guest.driver.registers.set_status(15);
    assert_ne!(guest.driver.registers.status() & 0x40, 0);
}

#[test]
fn what_is_no_socket_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let gone = folder.path().join("gone");
    drop(std::os::unix::net::UnixListener::bind(&gone).unwrap());
    for path in [&file, &gone, &folder.path().join("nothing")] {
        let error = VhostUserBlock::new(&drive(path)).err().unwrap();
        assert!(
            error.to_string().contains("start the vhost-user server"),
            "{error}"
        );
    }
    // One that takes no more callers.
    let full = folder.path().join("full");
    let _listener = std::os::unix::net::UnixListener::bind(&full).unwrap();
    let mut waiting = Vec::new();
    loop {
        let flags = rustix::net::SocketFlags::NONBLOCK;
        let kind = rustix::net::SocketType::STREAM;
        let family = rustix::net::AddressFamily::UNIX;
        let socket = rustix::net::socket_with(family, kind, flags, None).unwrap();
        let address = rustix::net::SocketAddrUnix::new(&full).unwrap();
        if rustix::net::connect(&socket, &address).is_err() || waiting.len() > 5000 {
            break;
        }
        waiting.push(socket);
    }
    let asked = Instant::now();
    assert!(VhostUserBlock::new(&drive(&full)).is_err());
    assert!(asked.elapsed() < Duration::from_secs(20));
}
