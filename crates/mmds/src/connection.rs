//! One TCP connection of a guest: requests in, responses out, one after the other.

use crate::http::MOST;
use crate::server::Server;
use husk_metrics::MmdsMetrics;
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use std::time::{Duration, Instant};

/// How long a connection may do nothing, or take for one request.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a socket's buffers. A response that is longer goes out as the guest takes it.
const RECEIVE: usize = MOST;
const SEND: usize = 8192;

/// What belongs to a socket.
pub struct Connection {
    /// What was received and not answered yet, less than [`MOST`] bytes.
    request: Vec<u8>,
    response: Vec<u8>,
    /// Bytes of it that the socket has taken.
    sent: usize,
    /// Nothing comes after this response.
    close: bool,
    /// When it last got on: it was opened, or a request began, or a part of a response was sent.
    since: Instant,
    /// It has come, and is counted.
    open: Option<Open>,
}

/// A connection that is counted until it is dropped.
struct Open(&'static MmdsMetrics);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.connections_destroyed.inc();
    }
}

/// A socket for a connection to come.
pub fn socket() -> Socket<'static> {
    let buffer = |size| SocketBuffer::new(vec![0; size]);
    let mut socket = Socket::new(buffer(RECEIVE), buffer(SEND));
    // Whole responses are written at once, and a request is answered at once: waiting would save no packet.
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket
}

impl Connection {
    /// One that is not there yet.
    pub fn new(now: Instant) -> Self {
        Self {
            request: Vec::new(),
            response: Vec::new(),
            sent: 0,
            close: false,
            since: now,
            open: None,
        }
    }

    /// It is there since now.
    pub fn opened(&mut self, now: Instant) {
        self.since = now;
    }

    /// When it last got on.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// When it is given up, if nothing happens.
    pub fn deadline(&self) -> Instant {
        self.since + PATIENCE
    }

    /// Take in and give out what can be.
    pub fn work(&mut self, socket: &mut Socket, server: &Server, now: Instant) {
        self.open.get_or_insert_with(|| {
            server.metrics.connections_created.inc();
            Open(server.metrics)
        });
        if matches!(socket.state(), State::Listen | State::SynReceived) {
            return;
        }
        loop {
            if !self.send(socket, now) || self.close {
                return;
            }
            let before = self.request.len();
            self.receive(socket);
            if before == 0 && !self.request.is_empty() {
                self.since = now;
            }
            // What is there may be a request, even if nothing has come since the last one.
            let Some(reply) = self.next(server, now) else {
                if !socket.may_recv() {
                    self.end(socket);
                }
                return;
            };
            self.request.drain(..reply.taken.min(self.request.len()));
            self.response = reply.bytes;
            self.close = reply.close;
        }
    }

    fn next(&self, server: &Server, now: Instant) -> Option<crate::Reply> {
        match self.request.is_empty() {
            true => None,
            false => server.reply(&self.request, now),
        }
    }

    fn receive(&mut self, socket: &mut Socket) {
        while self.request.len() < MOST && socket.can_recv() {
            let room = MOST - self.request.len();
            let taken = socket.recv(|data| {
                let count = room.min(data.len());
                self.request.extend(data.iter().take(count));
                (count, count)
            });
            if !matches!(taken, Ok(1..)) {
                return;
            }
        }
    }

    /// Send what is left of the response; true when nothing is.
    fn send(&mut self, socket: &mut Socket, now: Instant) -> bool {
        let rest = self.response.get(self.sent..).unwrap_or_default();
        if rest.is_empty() {
            return true;
        }
        match socket.send_slice(rest) {
            Ok(0) => return false,
            Ok(count) => self.sent += count,
            // The guest has ended it the hard way.
            Err(_) => {
                self.end(socket);
                return false;
            }
        }
        self.since = now;
        if self.sent < self.response.len() {
            return false;
        }
        // Not kept: a guest can hold many connections open.
        self.response = Vec::new();
        self.sent = 0;
        if self.close {
            self.end(socket);
        }
        true
    }

    fn end(&mut self, socket: &mut Socket) {
        self.close = true;
        self.request = Vec::new();
        self.response = Vec::new();
        self.sent = 0;
        socket.close();
    }
}
