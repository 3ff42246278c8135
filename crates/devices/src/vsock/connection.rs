//! One connection as the guest sees it: a state machine with no sockets and no clock, so that it can be fuzzed alone.

use super::packet::{Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, operation};
use std::num::Wrapping;

/// Bytes of a guest's data that wait for the host's program, at most, for each connection: what `buf_alloc` says.
pub const BUFFER_SIZE: u32 = 256 << 10;
/// The guest is told of new room at the latest when it is this much.
const UPDATE_AFTER: u32 = BUFFER_SIZE / 4;
/// Ticks that the guest has for an answer to a REQUEST, or to a SHUTDOWN of both directions: 2 to 2.5 s.
pub const ANSWER_TICKS: u8 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest is being asked.
    Requested,
    /// Data may flow.
    Open,
    /// Nothing comes from the guest any more, and nothing goes to it but an RST. `deliver`: what it had sent before is good.
    Over { deliver: bool },
}

/// What the host's side has to do about a packet of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// Look at the connection's state, which may have changed.
    Nothing,
    /// The guest has accepted: tell the host's program.
    Opened,
    /// Take the packet's data, and call [`Connection::forwarded`] as it leaves the buffer.
    Data,
}

/// A connection. Counters are modulo 2^32, as in packets (5.10.6.3).
#[derive(Clone, Debug)]
pub struct Connection {
    phase: Phase,
    /// REQUEST or RESPONSE, until it is sent.
    opening: Option<u16>,
    /// An RST is to be sent.
    reset: bool,
    /// A CREDIT_UPDATE is to be sent.
    update: bool,
    /// A CREDIT_REQUEST is to be sent.
    ask: bool,
    /// One was sent since the guest last gave credit.
    asked: bool,
    /// Data bytes from the guest.
    received: Wrapping<u32>,
    /// Those that have left our buffer.
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest knows it.
    told: Wrapping<u32>,
    /// Data bytes to the guest.
    sent: Wrapping<u32>,
    /// The guest's buf_alloc and fwd_cnt.
    guest_alloc: u32,
    guest_forwarded: Wrapping<u32>,
    /// SHUTDOWN flags: the guest's; the host's; the host's as the guest knows them.
    guest_shut: u32,
    host_shut: u32,
    told_shut: u32,
    /// Until the guest has to have answered.
    ticks: Option<u8>,
}

impl Connection {
    /// The host asks the guest: a REQUEST is to be sent.
    pub fn requested() -> Self {
        Self::new(Phase::Requested, operation::REQUEST)
    }

    /// The guest has asked with `request`, and the host accepts: a RESPONSE is to be sent.
    pub fn accepted(request: &Header) -> Self {
        let mut connection = Self::new(Phase::Open, operation::RESPONSE);
        connection.take_credit(request);
        connection
    }

    fn new(phase: Phase, opening: u16) -> Self {
        Self {
            phase,
            opening: Some(opening),
            reset: false,
            update: false,
            ask: false,
            asked: false,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            guest_alloc: 0,
            guest_forwarded: Wrapping(0),
            guest_shut: 0,
            host_shut: 0,
            told_shut: 0,
            ticks: (phase == Phase::Requested).then_some(ANSWER_TICKS),
        }
    }

    /// A packet from the guest. The caller has checked that its data is there.
    pub fn receive(&mut self, header: &Header) -> Reaction {
        if let Phase::Over { .. } = self.phase {
            // 5.10.6.5: an RST is not answered with one.
            self.reset &= header.op != operation::RST;
            return Reaction::Nothing;
        }
        self.take_credit(header);
        match (header.op, self.phase) {
            (operation::RST, _) => {
                self.phase = Phase::Over { deliver: true };
                self.ticks = None;
            }
            (operation::RESPONSE, Phase::Requested) if self.opening.is_none() => {
                self.phase = Phase::Open;
                self.ticks = None;
                return Reaction::Opened;
            }
            (operation::RW, Phase::Open) => return self.receive_data(header.len),
            (operation::SHUTDOWN, Phase::Open) => self.receive_shutdown(header.flags),
            (operation::CREDIT_UPDATE, Phase::Open) => {}
            (operation::CREDIT_REQUEST, Phase::Open) => self.update = true,
            _ => self.abort(),
        }
        Reaction::Nothing
    }

    fn receive_data(&mut self, length: u32) -> Reaction {
        if self.guest_shut & SHUTDOWN_SEND != 0 || length > self.room() {
            self.abort();
            return Reaction::Nothing;
        }
        self.received += length;
        if self.host_shut & SHUTDOWN_RECEIVE != 0 {
            // It was on its way when the host's program went.
            self.forwarded(length);
            return Reaction::Nothing;
        }
        Reaction::Data
    }

    fn receive_shutdown(&mut self, flags: u32) {
        self.guest_shut |= flags & SHUTDOWN_BOTH;
        if self.guest_shut == SHUTDOWN_BOTH {
            // The data that it sent is here: it need not wait for the host's program.
            self.phase = Phase::Over { deliver: true };
            self.reset = true;
            self.ticks = None;
        }
        self.nobody_reads();
    }

    /// The host's program is gone, and the guest does not want what it had sent: there is nothing left to wait for.
    fn nobody_reads(&mut self) {
        if self.host_shut & SHUTDOWN_RECEIVE != 0 && self.guest_shut & SHUTDOWN_RECEIVE != 0 {
            self.host_shut |= SHUTDOWN_SEND;
        }
    }

    /// Bytes that the guest may send at the moment.
    fn room(&self) -> u32 {
        BUFFER_SIZE.saturating_sub((self.received - self.forwarded).0)
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_alloc = header.buf_alloc;
        self.guest_forwarded = Wrapping(header.fwd_cnt);
        self.asked &= self.credit() == 0;
    }

    fn credit(&self) -> u32 {
        let under_way = (self.sent - self.guest_forwarded).0;
        self.guest_alloc.saturating_sub(under_way)
    }

    /// `length` bytes of the guest's data have left the buffer.
    pub fn forwarded(&mut self, length: u32) {
        self.forwarded += length;
        if (self.forwarded - self.told).0 >= UPDATE_AFTER {
            self.update = true;
        }
    }

    /// The host's program sends no more, and all that it has sent was sent on.
    pub fn host_sends_no_more(&mut self) {
        self.host_shut |= SHUTDOWN_SEND;
    }

    /// The host's program receives no more: it is gone, or cannot be written to.
    pub fn host_receives_no_more(&mut self) {
        if self.phase == Phase::Requested {
            return self.abort();
        }
        self.host_shut |= SHUTDOWN_RECEIVE;
        self.nobody_reads();
    }

    /// End it at once with an RST, whatever was under way.
    pub fn abort(&mut self) {
        // A guest that knows nothing of the connection, or has ended it, need not know that it has ended.
        self.reset |= !self.is_over() && self.opening != Some(operation::REQUEST);
        self.phase = Phase::Over { deliver: false };
        self.ticks = None;
    }

    /// The guest is gone, or has forgotten all connections. What it had sent is good.
    pub fn forget(&mut self) {
        if !self.is_over() {
            self.phase = Phase::Over { deliver: true };
        }
        self.reset = false;
        self.ticks = None;
    }

    /// A tick of the clock has passed.
    pub fn tick(&mut self) {
        if let Some(ticks) = &mut self.ticks {
            *ticks = ticks.saturating_sub(1);
            if *ticks == 0 {
                self.abort();
            }
        }
    }

    /// Whether [`Connection::tick`] is wanted.
    pub fn has_deadline(&self) -> bool {
        self.ticks.is_some()
    }

    /// Whether the guest has done with it, but for an RST that may have to be sent.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over { .. })
    }

    /// Whether nothing is to be sent any more.
    pub fn is_finished(&self) -> bool {
        self.is_over() && !self.reset
    }

    /// Whether what the guest has sent is to reach the host's program.
    pub fn delivers(&self) -> bool {
        let over = matches!(self.phase, Phase::Over { deliver: false });
        !over && self.host_shut & SHUTDOWN_RECEIVE == 0
    }

    /// Whether the guest sends no more.
    pub fn guest_sends_no_more(&self) -> bool {
        self.is_over() || self.guest_shut & SHUTDOWN_SEND != 0
    }

    /// Whether the guest receives no more.
    pub fn guest_receives_no_more(&self) -> bool {
        self.is_over() || self.guest_shut & SHUTDOWN_RECEIVE != 0
    }

    /// Whether data of the host's program may go to the guest, once there is credit.
    pub fn takes_data(&self) -> bool {
        self.phase == Phase::Open
            && self.host_shut & SHUTDOWN_SEND == 0
            && self.guest_shut & SHUTDOWN_RECEIVE == 0
    }

    /// Bytes that may go to the guest now; asks the guest for more when there are none.
    pub fn credit_or_ask(&mut self) -> u32 {
        let credit = self.credit();
        if credit == 0 && !self.asked {
            self.ask = true;
            self.asked = true;
        }
        credit
    }

    /// Whether [`Connection::next_control`] has something, or data that is there could be sent or asked for.
    pub fn wants_to_send(&self, data_is_there: bool) -> bool {
        let control = match self.phase {
            Phase::Over { .. } => self.reset,
            Phase::Requested => self.opening.is_some(),
            Phase::Open => {
                let shut = self.host_shut != self.told_shut;
                self.opening.is_some() || shut || self.update || self.ask
            }
        };
        control || data_is_there && self.takes_data() && (self.credit() > 0 || !self.asked)
    }

    /// The next packet without data for the guest: operation and flags. Until it is None, no data may be sent. Always sent
    /// with [`Connection::credit_fields`].
    pub fn next_control(&mut self) -> Option<(u16, u32)> {
        if std::mem::take(&mut self.reset) {
            return Some((operation::RST, 0));
        }
        if self.is_over() {
            return None;
        }
        if let Some(opening) = self.opening.take() {
            return Some((opening, 0));
        }
        if self.phase != Phase::Open {
            return None;
        }
        if self.host_shut != self.told_shut {
            self.told_shut = self.host_shut;
            if self.told_shut == SHUTDOWN_BOTH {
                self.ticks = Some(ANSWER_TICKS);
            }
            return Some((operation::SHUTDOWN, self.told_shut));
        }
        if std::mem::take(&mut self.update) {
            return Some((operation::CREDIT_UPDATE, 0));
        }
        std::mem::take(&mut self.ask).then_some((operation::CREDIT_REQUEST, 0))
    }

    /// `length` bytes of data go to the guest, not more than [`Connection::credit_or_ask`] said.
    pub fn sent(&mut self, length: u32) {
        self.sent += length;
    }

    /// buf_alloc and fwd_cnt of a packet that is now sent.
    pub fn credit_fields(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.update = false;
        (BUFFER_SIZE, self.forwarded.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(op: u16) -> Header {
        Header {
            op,
            buf_alloc: 1000,
            ..Header::default()
        }
    }

    fn data(len: u32) -> Header {
        Header {
            len,
            ..packet(operation::RW)
        }
    }

    fn shutdown(flags: u32) -> Header {
        Header {
            flags,
            ..packet(operation::SHUTDOWN)
        }
    }

    /// One that the guest has opened and knows to be open.
    fn open() -> Connection {
        let mut connection = Connection::accepted(&packet(operation::REQUEST));
        assert_eq!(connection.next_control(), Some((operation::RESPONSE, 0)));
        assert!(!connection.wants_to_send(false));
        connection
    }

    #[track_caller]
    fn assert_reset(connection: &mut Connection) {
        assert!(connection.is_over());
        assert_eq!(connection.next_control(), Some((operation::RST, 0)));
        assert_eq!(connection.next_control(), None);
        assert!(connection.is_finished());
    }

    #[test]
    fn the_host_asks_and_the_guest_accepts_refuses_or_is_silent() {
        let asked = || {
            let mut connection = Connection::requested();
            assert!(!connection.takes_data());
            assert_eq!(connection.next_control(), Some((operation::REQUEST, 0)));
            connection
        };
        let mut connection = asked();
        assert_eq!(
            connection.receive(&packet(operation::RESPONSE)),
            Reaction::Opened
        );
        assert!(connection.takes_data() && !connection.has_deadline());

        let mut connection = asked();
        connection.receive(&packet(operation::RST));
        assert!(connection.is_finished());

        let mut connection = asked();
        for _ in 0..ANSWER_TICKS {
            assert!(connection.has_deadline() && !connection.is_over());
            connection.tick();
        }
        assert_reset(&mut connection);
    }

    #[test]
    fn a_guest_that_was_not_asked_yet_is_not_told_that_it_is_over() {
        let mut connection = Connection::requested();
        connection.host_receives_no_more();
        assert!(connection.is_finished());
        assert_eq!(connection.next_control(), None);
    }

    #[test]
    fn what_makes_no_sense_is_answered_with_a_reset() {
        for op in [0, operation::REQUEST, operation::RESPONSE, 8, u16::MAX] {
            let mut connection = open();
            connection.receive(&packet(op));
            assert_reset(&mut connection);
        }
        for op in [operation::RW, operation::SHUTDOWN, operation::REQUEST] {
            let mut connection = Connection::requested();
            connection.next_control();
            connection.receive(&packet(op));
            assert_reset(&mut connection);
        }
    }

    #[test]
    fn a_guest_can_send_what_there_is_room_for_and_not_a_byte_more() {
        let mut connection = open();
        assert_eq!(connection.receive(&data(BUFFER_SIZE)), Reaction::Data);
        assert_eq!(connection.receive(&data(0)), Reaction::Data);
        connection.forwarded(1);
        assert_eq!(connection.receive(&data(1)), Reaction::Data);
        assert_eq!(connection.receive(&data(1)), Reaction::Nothing);
        assert_reset(&mut connection);
        assert!(!connection.delivers());
    }

    #[test]
    fn the_guest_learns_of_new_room_without_asking_and_by_asking() {
        let mut connection = open();
        connection.receive(&data(BUFFER_SIZE));
        connection.forwarded(UPDATE_AFTER - 1);
        assert_eq!(connection.next_control(), None);
        connection.forwarded(1);
        assert_eq!(
            connection.next_control(),
            Some((operation::CREDIT_UPDATE, 0))
        );
        assert_eq!(connection.credit_fields(), (BUFFER_SIZE, UPDATE_AFTER));
        assert_eq!(connection.next_control(), None);
        connection.receive(&packet(operation::CREDIT_REQUEST));
        assert_eq!(
            connection.next_control(),
            Some((operation::CREDIT_UPDATE, 0))
        );
    }

    #[test]
    fn the_hosts_data_never_exceeds_the_guests_credit_and_more_is_asked_for_once() {
        let mut connection = open();
        assert_eq!(connection.credit_or_ask(), 1000);
        connection.sent(1000);
        assert!(connection.wants_to_send(true), "it has to ask");
        assert_eq!(connection.credit_or_ask(), 0);
        assert_eq!(
            connection.next_control(),
            Some((operation::CREDIT_REQUEST, 0))
        );
        assert!(!connection.wants_to_send(true));
        connection.receive(&Header {
            fwd_cnt: 400,
            ..packet(operation::CREDIT_UPDATE)
        });
        assert!(connection.wants_to_send(true));
        assert_eq!(connection.credit_or_ask(), 400);
        // Counters that cannot be, and less room than is in use, are no credit.
        for (buf_alloc, fwd_cnt) in [(1000, 1001), (10, 400), (0, 0)] {
            connection.receive(&Header {
                buf_alloc,
                fwd_cnt,
                ..packet(operation::CREDIT_UPDATE)
            });
            assert_eq!(connection.credit_or_ask(), 0, "{buf_alloc} {fwd_cnt}");
        }
    }

    #[test]
    fn counters_wrap() {
        let mut connection = open();
        let turns = u64::from(u32::MAX) / u64::from(BUFFER_SIZE) + 2;
        for _ in 0..turns {
            assert_eq!(connection.receive(&data(BUFFER_SIZE)), Reaction::Data);
            connection.forwarded(BUFFER_SIZE);
            let (op, _) = connection.next_control().unwrap();
            assert_eq!(op, operation::CREDIT_UPDATE);
            connection.credit_fields();
        }
        assert!(!connection.is_over());
    }

    #[test]
    fn a_guest_may_end_its_direction_alone() {
        let mut connection = open();
        connection.receive(&data(10));
        connection.receive(&shutdown(SHUTDOWN_SEND));
        assert!(connection.guest_sends_no_more() && connection.delivers());
        assert!(connection.takes_data() && !connection.is_over());
        connection.receive(&data(1));
        assert_reset(&mut connection);

        let mut connection = open();
        connection.receive(&shutdown(SHUTDOWN_RECEIVE));
        assert!(!connection.takes_data() && connection.delivers());
        assert_eq!(connection.receive(&data(1)), Reaction::Data);
    }

    #[test]
    fn a_guest_that_closes_is_answered_at_once_and_its_data_still_delivered() {
        let mut connection = open();
        connection.receive(&data(10));
        connection.receive(&shutdown(SHUTDOWN_SEND));
        connection.receive(&shutdown(SHUTDOWN_RECEIVE));
        assert_reset(&mut connection);
        assert!(connection.delivers());
    }

    #[test]
    fn a_host_that_closes_waits_for_the_guests_reset_but_not_for_ever() {
        let close = || {
            let mut connection = open();
            connection.host_sends_no_more();
            assert_eq!(
                connection.next_control(),
                Some((operation::SHUTDOWN, SHUTDOWN_SEND))
            );
            assert!(!connection.has_deadline(), "half-closed is no hurry");
            connection.host_receives_no_more();
            assert_eq!(
                connection.next_control(),
                Some((operation::SHUTDOWN, SHUTDOWN_BOTH))
            );
            connection
        };
        let mut connection = close();
        // What was on its way is dropped, and is no offence.
        assert_eq!(connection.receive(&data(10)), Reaction::Nothing);
        assert!(!connection.is_over());
        connection.receive(&packet(operation::RST));
        assert!(connection.is_finished());

        let mut connection = close();
        (0..ANSWER_TICKS).for_each(|_| connection.tick());
        assert_reset(&mut connection);
    }

    #[test]
    fn a_reset_is_never_answered_with_a_reset() {
        let mut connection = open();
        connection.receive(&packet(99));
        connection.receive(&packet(operation::RST));
        assert!(connection.is_finished());
        assert_eq!(connection.next_control(), None);
    }

    #[test]
    fn nothing_is_left_over_when_the_host_is_gone_and_the_guest_does_not_listen() {
        for host_first in [true, false] {
            let mut connection = open();
            if host_first {
                connection.host_receives_no_more();
            }
            connection.receive(&shutdown(SHUTDOWN_RECEIVE));
            connection.host_receives_no_more();
            assert_eq!(
                connection.next_control(),
                Some((operation::SHUTDOWN, SHUTDOWN_BOTH))
            );
            assert!(connection.has_deadline());
        }
    }

    /// Any packets and any host, in any order: it ends, and keeps its promises.
    #[test]
    fn random_histories_end_and_keep_within_bounds() {
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        let mut random = move |end: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % end
        };
        for _ in 0..20_000 {
            let mut connection = match random(2) {
                0 => Connection::requested(),
                _ => Connection::accepted(&packet(operation::REQUEST)),
            };
            let mut buffered = 0;
            for _ in 0..random(60) {
                match random(8) {
                    0 => connection.host_sends_no_more(),
                    1 if random(4) == 0 => connection.host_receives_no_more(),
                    2 => {
                        let part = random(buffered + 1);
                        connection.forwarded(part as u32);
                        buffered -= part;
                    }
                    3 => {
                        let credit = connection.credit_or_ask();
                        if connection.takes_data() {
                            connection.sent(random(u64::from(credit) + 1) as u32);
                        }
                    }
                    4 | 5 => while connection.next_control().is_some() {},
                    _ => {
                        let header = Header {
                            op: [5, 5, 5, 5, 2, 4, 6, 7, 3, 1, 0][random(11) as usize],
                            len: random(u64::from(BUFFER_SIZE) + 2) as u32,
                            flags: random(8) as u32,
                            buf_alloc: random(5000) as u32,
                            fwd_cnt: random(5000) as u32,
                            ..Header::default()
                        };
                        if connection.receive(&header) == Reaction::Data {
                            buffered += u64::from(header.len);
                        }
                        assert!(buffered <= u64::from(BUFFER_SIZE));
                    }
                }
            }
            connection.abort();
            while connection.next_control().is_some() {}
            assert!(connection.is_finished() && !connection.wants_to_send(true));
        }
    }
}
