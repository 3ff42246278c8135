//! The guest's side of sockets, for tests.

use super::super::packet::{HEADER_SIZE, HOST_CID, Header, SHUTDOWN_BOTH, TYPE_STREAM, operation};
use husk_virtio::F_INDIRECT_DESC;
use husk_virtio::testing::{Buffers, Driver, Layout, PATIENCE};
use std::collections::HashMap;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

pub const CID: u64 = 42;
const RX: usize = 0;
const TX: usize = 1;
/// Room for the largest packet that a test sends.
const TX_ROOM: u64 = 256 << 10;

/// A driver of a vsock device.
pub struct Guest<'a> {
    pub driver: &'a mut Driver,
    /// Sizes of the readable buffers of a packet; the rest is in one more.
    pub tx_layout: Vec<usize>,
    rx: Vec<(Buffers, u64)>,
    lent: HashMap<u16, usize>,
    tx: u64,
    tx_table: u64,
}

impl<'a> Guest<'a> {
    /// With `count` receive chains, each of writable buffers of these sizes.
    pub fn new(driver: &'a mut Driver, rx: &[usize], count: usize, tx: &[usize]) -> Self {
        let mut guest = Self {
            tx: driver.allocate(TX_ROOM),
            tx_table: driver.allocate(4096),
            rx: Vec::new(),
            lent: HashMap::new(),
            tx_layout: tx.to_vec(),
            driver,
        };
        for _ in 0..count {
            guest.offer(rx);
        }
        guest
    }

    /// One more receive chain.
    pub fn offer(&mut self, sizes: &[usize]) {
        let chain = self.driver.chain(&[], sizes);
        let table = self.driver.allocate(4096);
        self.rx.push((chain, table));
        self.lend(self.rx.len() - 1);
    }

    fn layout(&self) -> Layout {
        match self.driver.features & F_INDIRECT_DESC {
            0 => Layout::Direct,
            _ => Layout::Indirect,
        }
    }

    fn lend(&mut self, index: usize) {
        let layout = self.layout();
        let (chain, table) = &self.rx[index];
        let head = self.driver.queues[RX].add(chain, layout, *table);
        self.lent.insert(head, index);
        self.driver.registers.notify(RX as u16);
    }

    /// Send a packet, and wait until the device has taken it.
    pub fn send(&mut self, header: Header, data: &[u8]) {
        self.post(header, data);
        self.driver.wait_used(TX);
    }

    /// Send a packet, one at a time.
    pub fn post(&mut self, header: Header, data: &[u8]) {
        let bytes = [&header.to_bytes(), data].concat();
        self.driver
            .mem
            .write_slice(&bytes, GuestAddress(self.tx))
            .unwrap();
        let mut chain = Buffers::default();
        let (mut at, mut left) = (self.tx, bytes.len());
        for &size in self.tx_layout.iter().chain([&bytes.len()]) {
            let size = size.min(left);
            if size > 0 {
                chain.readable.push((at, size as u32));
            }
            at += size as u64;
            left -= size;
        }
        let layout = self.layout();
        self.driver.queues[TX].add(&chain, layout, self.tx_table);
        self.driver.registers.notify(TX as u16);
    }

    /// A packet, if there is one.
    pub fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        assert_eq!(self.driver.registers.status(), 15);
        let (head, written) = self.driver.queues[RX].take_used()?;
        let index = self.lent.remove(&head).unwrap();
        let bytes = self.rx[index].0.written(&self.driver.mem, written as usize);
        self.lend(index);
        let header = Header::from_bytes(bytes[..HEADER_SIZE].try_into().unwrap());
        let data = bytes[HEADER_SIZE..].to_vec();
        assert_eq!(header.len as usize, data.len());
        assert_eq!(header.dst_cid, CID);
        Some((header, data))
    }

    /// The next packet.
    #[track_caller]
    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(packet) = self.try_receive() {
                return packet;
            }
            assert!(Instant::now() < until, "no packet comes");
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// The next packet is this.
    #[track_caller]
    pub fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    /// All that the device had to say has been received.
    #[track_caller]
    pub fn assert_quiet(&mut self) {
        let stray = Socket::new(9_999_999, 9_999_999);
        self.send(stray.packet(operation::RW, 0), &[]);
        let header = self.expect(operation::RST);
        assert_eq!(header.dst_port, 9_999_999, "{header:?}");
        assert_eq!(self.try_receive(), None);
    }
}

/// A socket of the guest's.
#[derive(Clone, Debug)]
pub struct Socket {
    pub guest: u32,
    pub host: u32,
    /// Our buffer, and the bytes taken out of it.
    pub alloc: u32,
    pub taken: u32,
    pub sent: u32,
    peer_alloc: u32,
    peer_forwarded: u32,
    /// What came.
    pub data: Vec<u8>,
    /// SHUTDOWN flags of the host's.
    pub shut: u32,
    pub reset: bool,
    /// CREDIT_REQUESTs that came.
    pub asked: u32,
}

impl Socket {
    pub fn new(guest: u32, host: u32) -> Self {
        Self {
            guest,
            host,
            alloc: 64 << 10,
            taken: 0,
            sent: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
            data: Vec::new(),
            shut: 0,
            reset: false,
            asked: 0,
        }
    }

    /// Connect to a port of the host's, where someone listens.
    #[track_caller]
    pub fn connect(guest: &mut Guest, own: u32, port: u32) -> Self {
        let mut socket = Self::new(own, port);
        guest.send(socket.packet(operation::REQUEST, 0), &[]);
        let header = guest.expect(operation::RESPONSE);
        socket.note(&header, &[]);
        socket
    }

    /// Accept what a program of the host asks for.
    #[track_caller]
    pub fn accept(guest: &mut Guest) -> Self {
        let header = guest.expect(operation::REQUEST);
        let mut socket = Self::new(header.dst_port, header.src_port);
        socket.note(&header, &[]);
        guest.send(socket.packet(operation::RESPONSE, 0), &[]);
        socket
    }

    pub fn packet(&self, op: u16, len: usize) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: self.guest,
            dst_port: self.host,
            len: len as u32,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: self.alloc,
            fwd_cnt: self.taken,
        }
    }

    pub fn shutdown(&self, flags: u32) -> Header {
        Header {
            flags,
            ..self.packet(operation::SHUTDOWN, 0)
        }
    }

    /// Bytes that may be sent.
    pub fn credit(&self) -> usize {
        (self.peer_alloc - self.sent.wrapping_sub(self.peer_forwarded)) as usize
    }

    /// Send data, whatever the credit.
    pub fn write(&mut self, guest: &mut Guest, data: &[u8]) {
        guest.send(self.packet(operation::RW, data.len()), data);
        self.sent = self.sent.wrapping_add(data.len() as u32);
    }

    /// Take a packet for this socket.
    #[track_caller]
    pub fn note(&mut self, header: &Header, data: &[u8]) {
        assert_eq!((header.src_port, header.dst_port), (self.host, self.guest));
        assert_eq!(header.src_cid, HOST_CID);
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        self.data.extend(data);
        let unread = self.data.len() as u32 - self.taken;
        assert!(unread <= self.alloc, "more data than there was credit for");
        match header.op {
            operation::SHUTDOWN => self.shut |= header.flags & SHUTDOWN_BOTH,
            operation::RST => self.reset = true,
            operation::CREDIT_REQUEST => self.asked += 1,
            _ => {}
        }
    }

    /// Receive a packet and take its data.
    #[track_caller]
    pub fn pump(&mut self, guest: &mut Guest) -> u16 {
        let (header, data) = guest.receive();
        self.note(&header, &data);
        header.op
    }

    /// The application has read all that came; the device is told.
    pub fn read_all(&mut self, guest: &mut Guest) {
        self.taken = self.data.len() as u32;
        guest.send(self.packet(operation::CREDIT_UPDATE, 0), &[]);
    }

    /// Close as a driver does, and see it done.
    #[track_caller]
    pub fn close(&mut self, guest: &mut Guest) {
        guest.send(self.shutdown(SHUTDOWN_BOTH), &[]);
        while !self.reset {
            self.pump(guest);
        }
    }
}
