//! The service with a second stack at the other end of the cable, in the guest's place. The clock is the test's.

use super::*;
use crate::connection::PATIENCE;
use crate::{DEFAULT_LIMIT, Mmds};
use husk_config::{MmdsConfig, MmdsVersion};
use husk_metrics::MmdsMetrics;
use serde_json::json;
use smoltcp::socket::tcp::SocketBuffer;
use smoltcp::wire::Ipv4Address;

const GUEST_MAC: [u8; 6] = [0x52, 1, 2, 3, 4, 5];
const GUEST: [u8; 4] = [172, 16, 0, 2];
const SERVICE: [u8; 4] = [169, 254, 169, 254];
const ROUTER: [u8; 6] = [0x02, 0xaa, 0xbb, 0xcc, 0xdd, 0xee];

/// A guest's end of the cable.
#[derive(Default)]
struct End {
    incoming: VecDeque<Vec<u8>>,
    out: Out,
}

impl Device for End {
    type RxToken<'a> = Taken;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _time: Time) -> Option<(Taken, Outgoing<'_>)> {
        let frame = self.incoming.pop_front()?;
        Some((Taken(frame), Outgoing(&mut self.out)))
    }

    fn transmit(&mut self, _time: Time) -> Option<Outgoing<'_>> {
        Some(Outgoing(&mut self.out))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut all = DeviceCapabilities::default();
        all.medium = Medium::Ethernet;
        all.max_transmission_unit = LONGEST_OUT;
        // As a guest's driver that leaves them to the device; what comes back is verified.
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

/// A service, and a guest.
struct Rig {
    mmds: Arc<Mmds>,
    stack: Stack,
    interface: Interface,
    end: End,
    sockets: SocketSet<'static>,
    now: Instant,
    next_port: u16,
    /// One frame of so many is lost, either way.
    loses: usize,
    frames: usize,
    /// Who answers when the guest asks who has the service's address, if not the service.
    router: Option<[u8; 6]>,
}

impl Rig {
    fn new(version: MmdsVersion) -> Self {
        let mmds = Mmds::new(DEFAULT_LIMIT);
        mmds.put(json!({"a": {"b": "c"}})).unwrap();
        let mut config = MmdsConfig::new(["eth0"]);
        config.version = version;
        let metrics = Box::leak(Box::default());
        let server = Server::with_metrics(mmds.clone(), &config, metrics).unwrap();
        let stack = Stack::new(server, config.address()).unwrap();
        let mut end = End::default();
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(GUEST_MAC)));
        let mut interface = Interface::new(config, &mut end, Time::ZERO);
        interface.update_ip_addrs(|all| {
            // "ip route add 169.254.169.254 dev eth0"
            all.extend([IpCidr::Ipv4(Ipv4Cidr::new(GUEST.into(), 0))]);
        });
        let now = stack.epoch;
        Self {
            mmds,
            stack,
            interface,
            end,
            sockets: SocketSet::new(Vec::new()),
            now,
            next_port: 40_000,
            loses: usize::MAX,
            frames: 0,
            router: None,
        }
    }

    fn connect(&mut self) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 60_000]);
        let mut socket = Socket::new(buffer(), buffer());
        let remote = (Ipv4Address::from(SERVICE), 80);
        self.next_port += 1;
        socket
            .connect(self.interface.context(), remote, self.next_port)
            .unwrap();
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn is_lost(&mut self) -> bool {
        self.frames += 1;
        self.frames.is_multiple_of(self.loses)
    }

    /// Carry frames until there are no more, at one time.
    fn settle(&mut self) {
        loop {
            let mut quiet = true;
            let time = self.stack.time(self.now);
            self.interface.poll(time, &mut self.end, &mut self.sockets);
            while let Some(mut frame) = self.end.out.frames.pop_front() {
                quiet = false;
                assert!(self.stack.takes(&frame), "{frame:x?}");
                if self.answered_by_router(&frame) || self.is_lost() {
                    continue;
                }
                self.stack.receive(&mut frame, self.now);
            }
            while let Some(frame) = self.stack.frame().map(<[u8]>::to_vec) {
                quiet = false;
                self.stack.taken();
                // It does not ask a guest that has said where it is.
                assert!(self.router.is_none() || frame[ETHERTYPE] == IPV4);
                if !self.is_lost() {
                    self.end.incoming.push_back(frame);
                }
            }
            if self
                .stack
                .deadline(self.now)
                .is_some_and(|at| at <= self.now)
            {
                quiet = false;
                self.stack.poll(self.now);
            }
            if quiet {
                return;
            }
        }
    }

    fn answered_by_router(&mut self, frame: &[u8]) -> bool {
        let Some(router) = self.router.filter(|_| frame[ETHERTYPE] == ARP) else {
            return false;
        };
        let parts: [&[u8]; 8] = [
            &GUEST_MAC,
            &router,
            &ARP,
            &[0, 1, 8, 0, 6, 4, 0, 2],
            &router,
            &SERVICE,
            &GUEST_MAC,
            &GUEST,
        ];
        self.end.incoming.push_back(parts.concat());
        true
    }

    /// Let time pass until something may happen, at most for so long.
    fn wait(&mut self, most: Duration) {
        let until = self.now + most;
        while self.now < until {
            self.settle();
            let time = self.stack.time(self.now);
            let own = self.interface.poll_delay(time, &self.sockets);
            let own = own.map(|wait| self.now + Duration::from_micros(wait.total_micros().max(1)));
            let next = [own, self.stack.deadline(self.now), Some(until)];
            self.now = next.into_iter().flatten().min().unwrap().min(until);
            self.stack.poll(self.now);
        }
        self.settle();
    }

    /// What the service says to `request` until it ends the connection or says no more for a while.
    fn ask(&mut self, request: &str) -> String {
        let handle = self.connect();
        self.settle();
        self.say(handle, request);
        let text = self.hear(handle);
        self.sockets.remove(handle);
        text
    }

    fn say(&mut self, handle: SocketHandle, text: &str) {
        // While packets are lost, connecting may take its time.
        for _ in 0..100 {
            if self.socket(handle).may_send() {
                break;
            }
            self.wait(Duration::from_millis(100));
        }
        let sent = self.socket(handle).send_slice(text.as_bytes());
        assert_eq!(sent, Ok(text.len()));
    }

    fn hear(&mut self, handle: SocketHandle) -> String {
        let mut text = Vec::new();
        let mut silent = 0;
        while silent < 30 && self.socket(handle).may_recv() {
            self.settle();
            let socket = self.socket(handle);
            let before = text.len();
            while socket.can_recv() {
                socket
                    .recv(|data| {
                        text.extend(data.iter());
                        (data.len(), ())
                    })
                    .unwrap();
            }
            silent = if text.len() > before { 0 } else { silent + 1 };
            if silent > 0 {
                self.wait(Duration::from_millis(100));
            }
        }
        String::from_utf8(text).unwrap()
    }

    fn metrics(&self) -> &'static MmdsMetrics {
        self.stack.server.metrics
    }

    fn open(&self) -> usize {
        let all = self.stack.connections.iter();
        let states = all.map(|(handle, _)| self.stack.sockets.get::<Socket>(*handle).state());
        states.filter(|state| *state != State::Listen).count()
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
}

fn body(response: &str) -> &str {
    response.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}

/// A SYN to the service.
fn syn(source: [u8; 4], port: u16) -> Vec<u8> {
    let port = port.to_be_bytes();
    let parts: [&[u8]; 9] = [
        &MAC,
        &GUEST_MAC,
        &IPV4,
        &[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0],
        &source,
        &SERVICE,
        &port,
        &[0, 80, 1, 2, 3, 4, 0, 0, 0, 0, 0x50, 0x02],
        &[0xff, 0xff, 0, 0, 0, 0],
    ];
    parts.concat()
}

#[test]
fn a_guest_fetches_with_and_without_a_token() {
    let mut rig = Rig::new(MmdsVersion::V1);
    assert_eq!(body(&rig.ask(&get("/a/b"))), "c");
    assert_eq!(body(&rig.ask(&get("/a"))), "b");
    assert!(rig.ask(&get("/x")).starts_with("HTTP/1.1 404 "));

    let mut rig = Rig::new(MmdsVersion::V2);
    assert!(rig.ask(&get("/a/b")).starts_with("HTTP/1.1 401 "));
    let put = "PUT /latest/api/token HTTP/1.0\r\nX-metadata-token-ttl-seconds: 9\r\n\r\n";
    let answer = rig.ask(put);
    let token = body(&answer);
    let with = format!("GET /a/b HTTP/1.0\r\nX-metadata-token: {token}\r\n\r\n");
    assert_eq!(body(&rig.ask(&with)), "c");
    rig.wait(Duration::from_secs(9));
    assert!(rig.ask(&with).starts_with("HTTP/1.0 401 "));
}

#[test]
fn the_largest_answer_arrives_whole_even_if_packets_are_lost() {
    let text: String = (0..50_000)
        .map(|at| char::from(b'a' + at as u8 % 26))
        .collect();
    for loses in [usize::MAX, 13, 5] {
        let mut rig = Rig::new(MmdsVersion::V1);
        rig.mmds.put(json!({"large": text})).unwrap();
        rig.loses = loses;
        let answer = rig.ask(&get("/large"));
        assert!(
            body(&answer) == text,
            "loses one of {loses}: {} bytes",
            answer.len()
        );
    }
}

#[test]
fn a_guest_needs_no_route_of_its_own_to_the_service() {
    let mut rig = Rig::new(MmdsVersion::V1);
    rig.router = Some(ROUTER);
    assert_eq!(body(&rig.ask(&get("/a/b"))), "c");
}

#[test]
fn what_is_for_others_is_left_alone() {
    let rig = Rig::new(MmdsVersion::V1);
    let mut frame = syn(GUEST, 1000);
    assert!(rig.stack.takes(&frame));
    assert!(rig.stack.takes(&frame[..34]));
    for length in 0..34 {
        assert!(!rig.stack.takes(&frame[..length]), "{length}");
    }
    frame[33] = 253;
    assert!(!rig.stack.takes(&frame));
    let mut arp = [[0xff; 6].as_slice(), &GUEST_MAC, &ARP, &[0; 24], &SERVICE].concat();
    assert!(rig.stack.takes(&arp));
    assert!(!rig.stack.takes(&arp[..41]));
    arp[41] = 253;
    assert!(!rig.stack.takes(&arp));
    let ipv6 = [&MAC, &GUEST_MAC, &[0x86, 0xdd][..], &SERVICE.repeat(10)].concat();
    assert!(!rig.stack.takes(&ipv6));
}

#[test]
fn a_connection_carries_one_request_after_the_other() {
    let mut rig = Rig::new(MmdsVersion::V1);
    let handle = rig.connect();
    rig.settle();
    let keep = "GET /a/b HTTP/1.1\r\n\r\n";
    for _ in 0..3 {
        rig.say(handle, keep);
        let answer = rig.hear(handle);
        assert!(answer.contains("Connection: keep-alive\r\n"));
        assert_eq!(body(&answer), "c");
    }
    // All at once, and one byte at a time.
    rig.say(handle, &keep.repeat(100));
    let answer = rig.hear(handle);
    assert_eq!(answer.matches("\r\n\r\nc").count(), 100);
    for byte in keep.chars() {
        rig.say(handle, &byte.to_string());
        rig.settle();
    }
    assert_eq!(body(&rig.hear(handle)), "c");
    rig.say(handle, "nonsense\r\n\r\n");
    assert!(rig.hear(handle).starts_with("HTTP/1.1 400 "));
    assert!(!rig.socket(handle).may_recv(), "it stays open");
}

#[test]
fn a_guest_that_shuts_down_its_half_is_answered() {
    let mut rig = Rig::new(MmdsVersion::V1);
    let handle = rig.connect();
    rig.settle();
    rig.say(handle, "GET /a/b HTTP/1.1\r\n\r\n");
    rig.socket(handle).close();
    rig.settle();
    let mut text = [0; 1000];
    let count = rig.socket(handle).recv_slice(&mut text).unwrap();
    assert!(text[..count].ends_with(b"\r\n\r\nc"));
    rig.wait(Duration::from_secs(1));
    assert_eq!(rig.open(), 0);
}

#[test]
fn who_does_nothing_is_not_waited_for() {
    let mut rig = Rig::new(MmdsVersion::V1);
    rig.mmds.put(json!({"large": "x".repeat(50_000)})).unwrap();
    let silent = rig.connect();
    let slow = rig.connect();
    let deaf = rig.connect();
    rig.settle();
    rig.say(deaf, &get("/large").repeat(3));
    for byte in "GET /".chars() {
        rig.say(slow, &byte.to_string());
        rig.wait(PATIENCE / 6);
    }
    assert_eq!(rig.open(), 3);
    rig.wait(PATIENCE);
    for handle in [silent, slow, deaf] {
        assert_eq!(rig.socket(handle).state(), State::Closed, "no reset came");
    }
    assert_eq!(rig.open(), 0);
    assert_eq!(body(&rig.ask(&get("/large"))).len(), 50_000);
}

#[test]
fn connections_are_bounded_and_old_ones_make_room() {
    let mut rig = Rig::new(MmdsVersion::V1);
    let all: Vec<_> = (0..MOST_CONNECTIONS).map(|_| rig.connect()).collect();
    rig.settle();
    for handle in &all {
        rig.say(*handle, &get("/a/b"));
    }
    let refused = rig.connect();
    rig.settle();
    assert_eq!(rig.socket(refused).state(), State::Closed);
    for handle in all {
        assert_eq!(body(&rig.hear(handle)), "c");
    }
    rig.wait(2 * PATIENCE);

    let mut rig = Rig::new(MmdsVersion::V1);
    let idle: Vec<_> = (0..MOST_CONNECTIONS).map(|_| rig.connect()).collect();
    rig.wait(EVICTABLE);
    assert_eq!(body(&rig.ask(&get("/a/b"))), "c");
    assert!(rig.open() <= MOST_CONNECTIONS);
    assert_eq!(rig.socket(idle[7]).state(), State::Established);
}

#[test]
fn a_flood_is_outlived() {
    let mut rig = Rig::new(MmdsVersion::V1);
    for round in 0..20_000u32 {
        let [_, _, high, low] = round.to_be_bytes();
        // Nobody takes what is answered.
        let mut frame = syn([10, 0, high, low], 1000 + (round % 7) as u16);
        rig.stack.receive(&mut frame, rig.now);
        assert!(rig.stack.connections.len() <= MOST_CONNECTIONS);
        assert!(rig.stack.out.frames.len() + rig.stack.out.spare.len() <= MOST_FRAMES);
    }
    while rig.stack.frame().is_some() {
        rig.stack.taken();
    }
    rig.wait(EVICTABLE);
    assert_eq!(body(&rig.ask(&get("/a/b"))), "c");
    rig.wait(3 * PATIENCE);
    assert_eq!(rig.open(), 0);
    assert_eq!(
        rig.stack.deadline(rig.now),
        None,
        "there is nothing to wait for"
    );
}

#[test]
fn garbage_is_lost() {
    let mut rig = Rig::new(MmdsVersion::V1);
    let mut state = 1u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize
    };
    for _ in 0..30_000 {
        let mut frame = syn(GUEST, (random() % 4) as u16);
        frame.resize(random() % 100, 0);
        for _ in 0..random() % 4 {
            if let Some(byte) = (!frame.is_empty()).then(|| random() % frame.len()) {
                frame[byte] = random() as u8;
            }
        }
        rig.stack.receive(&mut frame, rig.now);
        while rig.stack.frame().is_some() {
            rig.stack.taken();
        }
        rig.now += Duration::from_micros(random() as u64 % 2000);
    }
    rig.stack.receive(&mut [0; LONGEST_FRAME + 1], rig.now);
    rig.wait(3 * PATIENCE);
    assert_eq!(body(&rig.ask(&get("/a/b"))), "c");
}

#[test]
fn a_driver_that_begins_anew_finds_a_new_service() {
    let mut rig = Rig::new(MmdsVersion::V1);
    let old = rig.connect();
    rig.settle();
    rig.say(old, "GET /a");
    rig.settle();
    let mut frame = syn(GUEST, 1000);
    rig.stack.receive(&mut frame, rig.now);
    rig.stack.reset();
    assert!(rig.stack.frame().is_none());
    assert_eq!(rig.open(), 0);
    assert_eq!(body(&rig.ask(&get("/a/b"))), "c");
}

#[test]
fn frames_connections_and_tokens_are_counted() {
    let mut rig = Rig::new(MmdsVersion::V2);
    let m = rig.metrics();
    rig.ask(&get("/a/b"));
    rig.ask("GET /a HTTP/1.0\r\nX-metadata-token: x\r\n\r\n");
    rig.wait(2 * PATIENCE);
    assert_eq!((m.rx_no_token.total(), m.rx_invalid_token.total()), (1, 1));
    let (created, destroyed) = (&m.connections_created, &m.connections_destroyed);
    assert_eq!((created.total(), destroyed.total()), (2, 2));
    assert!(m.rx_accepted.total() > 8 && m.tx_frames.total() > 4);
    assert_eq!(m.rx_accepted.total(), m.rx_count.total());
    assert!(m.tx_bytes.total() > 42 * m.tx_frames.total());
    let mut udp = syn(GUEST, 1000);
    udp[PROTOCOL] = 17;
    rig.stack.receive(&mut udp, rig.now);
    rig.stack.receive(&mut [0; LONGEST_FRAME + 1], rig.now);
    let odd = (&m.rx_accepted_unusual, &m.rx_accepted_err);
    assert_eq!((odd.0.total(), odd.1.total()), (1, 1));
    let mut frame = syn(GUEST, 1001);
    rig.stack.receive(&mut frame, rig.now);
    assert_eq!((created.total(), destroyed.total()), (3, 2));
    // Answers wait, and the guest's driver never takes them.
    let (waiting, sent) = (rig.stack.out.frames.len(), m.tx_frames.total());
    assert!(waiting > 0);
    assert_eq!(m.tx_errors.total(), 0);
    rig.stack.reset();
    assert_eq!((created.total(), destroyed.total()), (3, 3));
    assert_eq!(m.tx_errors.total(), waiting as u64);
    assert_eq!(m.tx_frames.total(), sent);
}
