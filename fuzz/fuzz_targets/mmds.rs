//! The metadata service: a guest's frames, sound in part, and time that passes.
#![no_main]

use arbitrary::Arbitrary;
use husk_config::{MmdsConfig, MmdsVersion};
use husk_fuzz::bytes::{Bytes, Few, Rare};
use husk_mmds::{MAC, Mmds, Server, Stack};
use libfuzzer_sys::fuzz_target;
use std::time::{Duration, Instant};

const GUEST: [u8; 6] = [0x52, 1, 2, 3, 4, 5];
/// Most that a guest that takes nothing can make wait.
const MOST_WAITING: usize = 32;
const SYN: u8 = 0x02;
const PSH_ACK: u8 = 0x18;

#[derive(Debug, Arbitrary)]
enum Event {
    /// Anything.
    Frame(Bytes),
    /// About the service's address, as ARP goes, or nearly.
    Arp(u8, Rare<Bytes>),
    /// TCP, as one of a few connections goes on, or nearly.
    Segment {
        port: u8,
        flags: Rare<u8>,
        /// Away from what is next.
        sequence: Rare<u32>,
        window: u16,
        options: Rare<Bytes>,
        request: Request,
    },
    /// The guest opens a connection.
    Open(u8),
    /// The guest takes some frames.
    Take(u8),
    /// Milliseconds.
    Wait(u16),
    Reset,
}

#[derive(Debug, Arbitrary)]
enum Request {
    Nothing,
    Get(u8),
    Token,
    Bytes(Bytes),
}

#[derive(Debug, Arbitrary)]
struct History {
    version_2: bool,
    events: Few<Event, 200>,
}

/// What a guest knows of a connection.
#[derive(Clone, Copy, Default)]
struct Peer {
    next: u32,
    acknowledged: u32,
}

struct World {
    stack: Stack,
    now: Instant,
    peers: [Peer; 8],
}

impl World {
    fn receive(&mut self, mut frame: Vec<u8>) {
        // Whoever takes others gets them, too.
        let _ = self.stack.takes(&frame);
        self.stack.receive(&mut frame, self.now);
    }

    fn segment(
        &mut self,
        port: u8,
        flags: u8,
        moved: u32,
        window: u16,
        options: &[u8],
        data: &[u8],
    ) {
        let index = usize::from(port % 8);
        let peer = &mut self.peers[index];
        let sequence = peer.next.wrapping_add(moved);
        if moved == 0 {
            let syn = u32::from(flags & SYN != 0);
            peer.next = peer.next.wrapping_add(data.len() as u32 + syn);
        }
        let mut options = options.to_vec();
        options.truncate(40);
        options.resize(options.len().next_multiple_of(4), 0);
        let offset = ((20 + options.len()) / 4 << 4) as u8;
        let length = (40 + options.len() + data.len()) as u16;
        let parts: [&[u8]; 16] = [
            &MAC,
            &GUEST,
            &[8, 0, 0x45, 0],
            &length.to_be_bytes(),
            &[0, 0, 0, 0, 64, 6, 0, 0],
            &[172, 16, 0, 2],
            &[169, 254, 169, 254],
            &[4, index as u8],
            &[0, 80],
            &sequence.to_be_bytes(),
            &peer.acknowledged.to_be_bytes(),
            &[offset, flags],
            &window.to_be_bytes(),
            &[0; 4],
            &options,
            data,
        ];
        self.receive(parts.concat());
    }

    /// Take a frame, as far as it is one of a connection.
    fn take(&mut self) -> bool {
        let Some(frame) = self.stack.frame() else {
            return false;
        };
        assert!((42..=1514).contains(&frame.len()), "{} bytes", frame.len());
        if frame[12..14] == [8, 0] && frame[23] == 6 {
            let length = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
            assert_eq!(14 + length, frame.len(), "IPv4 says otherwise");
            let header = usize::from(frame[46] >> 4) * 4;
            let sequence = u32::from_be_bytes([frame[38], frame[39], frame[40], frame[41]]);
            let data = (length - 20 - header) as u32;
            let marks = u32::from(frame[47] & SYN != 0) + u32::from(frame[47] & 1);
            let peer = &mut self.peers[usize::from(frame[37] % 8)];
            peer.acknowledged = sequence.wrapping_add(data + marks);
        }
        self.stack.taken();
        true
    }

    fn run(&mut self, event: Event) {
        match event {
            Event::Frame(bytes) => self.receive(bytes.0),
            Event::Arp(operation, Rare(change)) => {
                let parts: [&[u8]; 8] = [
                    &[0xff; 6],
                    &GUEST,
                    &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation % 4],
                    &GUEST,
                    &[172, 16, 0, 2],
                    &[0; 6],
                    &[169, 254, 169, 254],
                    &[0; 18],
                ];
                let mut frame = parts.concat();
                let change = change.map_or(Vec::new(), |change| change.0);
                for (to, from) in frame.iter_mut().skip(14).zip(change) {
                    *to = from;
                }
                self.receive(frame);
            }
            Event::Segment {
                port,
                flags,
                sequence,
                window,
                options,
                request,
            } => {
                let data = match request {
                    Request::Nothing => Vec::new(),
                    Request::Get(which) => {
                        let path = ["/", "/a", "/large", "/x"][usize::from(which % 4)];
                        format!("GET {path} HTTP/1.{}\r\n\r\n", which >> 2 & 1).into_bytes()
                    }
                    Request::Token => {
                        let put = "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 9\r\n\r\n";
                        put.into()
                    }
                    Request::Bytes(bytes) => bytes.0,
                };
                let options = options.0.map_or(Vec::new(), |options| options.0);
                let (flags, moved) = (flags.0.unwrap_or(PSH_ACK), sequence.0.unwrap_or(0));
                self.segment(port, flags, moved, window, &options, &data);
            }
            Event::Open(port) => {
                self.segment(port, SYN, 0, 60_000, &[], &[]);
                while self.take() {}
            }
            Event::Take(count) => {
                for _ in 0..count {
                    if !self.take() {
                        self.stack.poll(self.now);
                    }
                }
            }
            Event::Wait(ms) => {
                self.now += Duration::from_millis(ms.into());
                self.stack.poll(self.now);
            }
            Event::Reset => self.stack.reset(),
        }
    }

    /// The guest is gone: after a while nothing of it is left.
    fn check(&mut self) {
        let mut waiting = 0;
        while self.take() {
            waiting += 1;
        }
        assert!(waiting <= MOST_WAITING, "{waiting} frames");
        for _ in 0..10_000 {
            let Some(next) = self.stack.deadline(self.now) else {
                return;
            };
            self.now = self.now.max(next);
            self.stack.poll(self.now);
            while self.take() {}
        }
        panic!("there is no end of it");
    }
}

fuzz_target!(|history: History| {
    let mmds = Mmds::new(10_000);
    let value = serde_json::json!({"a": {"b": 1}, "large": "x".repeat(9000)});
    mmds.put(value).expect("room for it");
    let mut config = MmdsConfig::new(["eth0"]);
    if history.version_2 {
        config.version = MmdsVersion::V2;
    }
    let server = Server::new(mmds, &config).expect("random numbers");
    let stack = Stack::new(server, config.address()).expect("random numbers");
    let mut world = World {
        stack,
        now: Instant::now(),
        peers: Default::default(),
    };
    for event in history.events.0 {
        world.run(event);
    }
    world.check();
});
