//! The state machine of a vsock connection: any packets and any host, in any order.
#![no_main]

use arbitrary::Arbitrary;
use husk_devices::vsock::connection::{ANSWER_TICKS, BUFFER_SIZE, Connection, Reaction};
use husk_devices::vsock::packet::{Header, operation};
use husk_fuzz::bytes::Number;
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
enum Event {
    Packet {
        op: u8,
        length: Number,
        flags: u8,
        buf_alloc: Number,
        fwd_cnt: Number,
    },
    Forward(Number),
    SendsNoMore,
    ReceivesNoMore,
    Tick,
    Abort,
    Control,
    Data(Number),
}

#[derive(Debug, Arbitrary)]
struct History {
    /// The host has asked for it, else the guest.
    by_host: bool,
    buf_alloc: Number,
    events: Vec<Event>,
}

/// What must hold for the connection, from what was said.
struct Model {
    connection: Connection,
    /// Bytes of the guest's that wait for the host's program.
    buffered: u64,
    /// The guest has reset it, and nothing was sent since.
    reset: bool,
}

impl Model {
    fn packet(&mut self, header: &Header) {
        let over = self.connection.is_over();
        let reaction = self.connection.receive(header);
        assert!(
            !over || reaction == Reaction::Nothing,
            "it goes on after its end"
        );
        if reaction == Reaction::Data {
            self.buffered += u64::from(header.len);
        }
        assert!(
            self.buffered <= u64::from(BUFFER_SIZE),
            "more than there is room for"
        );
        if header.op == operation::RST {
            assert!(self.connection.is_finished(), "a reset is answered");
            self.reset = true;
        }
    }

    fn control(&mut self) {
        // Opening, shutting down, an update and a request, and an RST after all.
        for _ in 0..8 {
            assert!(
                self.connection
                    .next_control()
                    .is_none_or(|(op, _)| !self.reset && op != operation::RW),
                "the guest was told something after its reset"
            );
        }
        assert_eq!(
            self.connection.next_control(),
            None,
            "there is no end of it"
        );
        self.connection.credit_fields();
    }

    fn data(&mut self, most: u32) {
        if !self.connection.takes_data() {
            return;
        }
        let credit = self.connection.credit_or_ask();
        self.connection.sent(most.min(credit));
    }

    fn run(&mut self, event: Event) {
        match event {
            Event::Packet {
                op,
                length,
                flags,
                buf_alloc,
                fwd_cnt,
            } => self.packet(&Header {
                op: op.into(),
                len: length.get(),
                flags: flags.into(),
                buf_alloc: buf_alloc.get(),
                fwd_cnt: fwd_cnt.get(),
                ..Header::default()
            }),
            Event::Forward(count) => {
                let count = u64::from(count.get()).min(self.buffered);
                self.buffered -= count;
                self.connection.forwarded(count as u32);
            }
            Event::SendsNoMore => self.connection.host_sends_no_more(),
            Event::ReceivesNoMore => self.connection.host_receives_no_more(),
            Event::Tick => self.connection.tick(),
            Event::Abort => self.connection.abort(),
            Event::Control => self.control(),
            Event::Data(most) => self.data(most.get()),
        }
    }
}

fuzz_target!(|history: History| {
    let asked = Header {
        op: operation::REQUEST,
        buf_alloc: history.buf_alloc.get(),
        ..Header::default()
    };
    let connection = match history.by_host {
        true => Connection::requested(),
        false => Connection::accepted(&asked),
    };
    let mut model = Model {
        connection,
        buffered: 0,
        reset: false,
    };
    for event in history.events {
        model.run(event);
    }
    // The host goes: whatever the guest does not do, it ends.
    model.connection.host_sends_no_more();
    model.connection.host_receives_no_more();
    model.control();
    for _ in 0..ANSWER_TICKS {
        model.connection.tick();
    }
    model.control();
    let connection = &model.connection;
    assert!(connection.is_finished(), "it never ends");
    assert!(!connection.wants_to_send(true) && !connection.has_deadline());
});
