//! What the device does with its queues.

use super::*;
use crate::net::backend::MOST;
use husk_config::{RateLimiter as Limits, TokenBucket};
use husk_virtio::testing::{Subject, check_device};
use std::cell::RefCell;
use std::sync::atomic::Ordering;

const MERGEABLE: u64 = 1 << MRG_RXBUF;

fn kit(pairs: u16, eager: &[usize]) {
    let far = RefCell::new(None);
    let mut config = interface("eth0");
    config.queues = pairs;
    check_device(&Subject {
        memory: husk_virtio::testing::memory,
        make: &|| {
            let (backend, other) = pipe(pairs);
            *far.borrow_mut() = Some(other);
            Box::new(Net::with_backend(&config, Box::new(backend)).unwrap())
        },
        use_again: None,
        use_it: &|driver| {
            let far = far.borrow();
            let far = far.as_ref().unwrap();
            // What wild drivers have sent before.
            while far.receive(0).is_some() {}
            for seed in 0..30 {
                let sent = frame(seed, 60 + 40 * usize::from(seed));
                driver.request(1, &[&[0; 12], &sent[..20], &sent[20..]], &[]);
                assert_eq!(far.wait(0), sent);
                far.send(0, &sent);
                let got = driver.request(0, &[], &[12, 100, 1400]);
                assert_eq!(got[12..], sent);
            }
        },
        eager,
    });
}

#[test]
fn it_is_a_sound_device() {
    kit(1, &[1]);
}

#[test]
fn it_is_a_sound_device_with_many_queues() {
    kit(2, &[1, 3, 4]);
}

#[test]
fn a_large_packet_takes_as_many_buffers_as_it_needs() {
    let (mut rig, far) = Rig::with_pipe(&interface("eth0"), 0);
    let given = rig.give(0, 100, 1536);
    // The first comes unexpected, so that its end has to be copied; the second is written where it belongs.
    for seed in 0..2 {
        let sent = frame(seed, 65_000);
        far.send(0, &sent);
        let got = rig.take(0, &given);
        assert_eq!(got[10..12], [43, 0], "(12 + 65000) / 1536 buffers");
        assert!(got[12..] == sent, "not what was sent");
    }
    far.send(0, &frame(9, 14));
    assert_eq!(rig.take(0, &given)[12..], frame(9, 14));
    // No more than those were taken.
    assert_eq!(rig.driver.queues[0].lent(), 100 - 2 * 43 - 1);
}

#[test]
fn buffers_that_were_ready_for_a_large_packet_take_the_next_one_and_come_back() {
    let (mut rig, far) = Rig::with_pipe(&interface("eth0"), 0);
    let given = rig.give(0, 100, 1536);
    far.send(0, &frame(1, 65_000));
    assert!(rig.take(0, &given)[12..] == frame(1, 65_000));
    // Many are ready now; each of these takes one of them, in order.
    for seed in 2..9 {
        std::thread::sleep(Duration::from_millis(1));
        far.send(0, &frame(seed, 100));
        let got = rig.take(0, &given);
        assert_eq!(got[10..12], [1, 0]);
        assert_eq!(got[12..], frame(seed, 100));
    }
    let mut state = None;
    rig.driver.registers.with_core(&mut |core| {
        core.suspend();
        state = core.save();
    });
    let queue = state.unwrap().queues[0].state;
    assert_eq!(queue.next_available, 43 + 7);
    rig.driver.registers.resume();
    far.send(0, &frame(9, 20_000));
    assert!(rig.take(0, &given)[12..] == frame(9, 20_000));
}

#[test]
fn a_packet_waits_for_buffers_and_is_not_torn() {
    let (mut rig, far) = Rig::with_pipe(&interface("eth0"), 0);
    let sent = frame(3, 20_000);
    far.send(0, &sent);
    far.send(0, &frame(4, 100));
    let mut given = rig.give(0, 3, 1000);
    given.extend(rig.give(0, 5, 2000));
    std::thread::sleep(Duration::from_millis(5));
    assert!(rig.driver.queues[0].take_used().is_none());
    given.extend(rig.give(0, 10, 1000));
    let got = rig.take(0, &given);
    assert_eq!(got[10..12], [16, 0], "(20000 + 12 - 13000) / 1000 more");
    assert!(got[12..] == sent);
    assert_eq!(rig.take(0, &given)[12..], frame(4, 100));
}

#[test]
fn a_driver_that_stops_meanwhile_finds_all_its_buffers_again() {
    let (mut rig, far) = Rig::with_pipe(&interface("eth0"), 0);
    far.send(0, &frame(3, 20_000));
    rig.give(0, 3, 1000);
    std::thread::sleep(Duration::from_millis(5));
    rig.driver.start(u64::MAX, 256);
    far.send(0, &frame(4, 100));
    let given = rig.give(0, 3, 1000);
    // The large one was lost with the queue that it waited in, or came too late for it: the small one comes in any case.
    let more = rig.give(0, 60, 1000);
    let given = [given, more].concat();
    let mut got = rig.take(0, &given);
    if got.len() > 1000 {
        got = rig.take(0, &given);
    }
    assert_eq!(got[12..], frame(4, 100));
}

#[test]
fn without_mergeable_buffers_a_packet_too_large_for_one_is_lost() {
    let (mut rig, far) = Rig::with_pipe(&interface("eth0"), MERGEABLE);
    let given = rig.give(0, 4, 1526);
    far.send(0, &frame(1, 5000));
    far.send(0, &frame(2, 1514));
    let got = rig.take(0, &given);
    assert_eq!(got[10..12], [1, 0]);
    assert_eq!(got[12..], frame(2, 1514));
}

#[test]
fn a_packet_that_all_buffers_together_cannot_hold_is_lost() {
    let (mut rig, far) = Rig::with_pipe(&interface("eth0"), 0);
    rig.driver.start(u64::MAX, 16);
    let given = rig.give(0, 16, 1000);
    far.send(0, &frame(1, 20_000));
    far.send(0, &frame(2, 100));
    assert_eq!(rig.take(0, &given)[12..], frame(2, 100));
}

#[test]
fn a_buffer_without_room_for_a_header_needs_a_reset() {
    let (mut rig, far) = Rig::with_pipe(&interface("eth0"), 0);
    rig.give(0, 1, 11);
    far.send(0, &frame(1, 100));
    let registers = &rig.driver.registers;
    wait("the device takes it", || registers.status() & 0x40 != 0);
}

#[test]
fn packets_that_no_network_has_are_lost_and_their_buffers_come_back() {
    let (mut rig, far) = Rig::with_pipe(&interface("eth0"), 0);
    let long = vec![0; MOST];
    for bad in [&[][..], &[1], &[0; 13], &long] {
        rig.send(1, bad);
    }
    rig.driver.request(1, &[&[1; 5]], &[]);
    rig.driver.request(1, &[], &[100]);
    rig.send(1, &frame(1, 14));
    assert_eq!(far.wait(0), frame(1, 14));
    assert_eq!(far.receive(0), None);
}

#[test]
fn the_header_goes_to_the_host_as_the_driver_wrote_it() {
    let (mut rig, far) = Rig::with_pipe(&interface("eth0"), 0);
    let header = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
    let whole = [&header[..], &frame(1, 60_000)].concat();
    rig.driver
        .request(1, &[&whole[..7], &whole[7..30_000], &whole[30_000..]], &[]);
    assert!(far.receive(0).unwrap() == whole);
}

#[test]
fn a_pulled_cable_is_seen_by_the_guest_and_nothing_passes() {
    let (mut rig, far) = Rig::with_pipe(&interface("eth0"), 0);
    let given = rig.give(0, 8, 1600);
    assert_eq!(rig.link_status(), 1);
    rig.driver.registers.take_interrupt();
    rig.plug(false);
    rig.wait_link_down();
    far.send(0, &frame(1, 60));
    rig.send(1, &frame(2, 60));
    wait("what comes is not taken away", || far.unread(0) == 0);
    assert_eq!(far.receive(0), None);
    rig.plug(true);
    assert_eq!(rig.link_status(), 1);
    assert!(rig.driver.registers.take_interrupt());
    far.send(0, &frame(3, 60));
    rig.send(1, &frame(4, 60));
    assert_eq!(rig.take(0, &given)[12..], frame(3, 60));
    assert_eq!(far.wait(0), frame(4, 60));
}

#[test]
fn a_backend_that_is_gone_is_a_link_that_is_down() {
    let (mut rig, far) = Rig::with_pipe(&interface("eth0"), 0);
    rig.give(0, 8, 1600);
    rig.driver.registers.take_interrupt();
    drop(far);
    rig.wait_link_down();
    for _ in 0..300 {
        rig.send(1, &frame(1, 60));
    }
    rig.plug(true);
    assert_eq!(rig.link_status(), 0);
    rig.driver.start(u64::MAX, 256);
    rig.send(1, &frame(1, 60));
    assert_eq!(rig.link_status(), 0);
}

fn command(rig: &mut Rig, queue: usize, bytes: &[u8]) -> Vec<u8> {
    rig.driver.request(queue, &[bytes], &[1])
}

#[test]
fn the_driver_chooses_how_many_pairs_of_queues_there_are() {
    let mut config = interface("eth0");
    config.queues = 3;
    let (mut rig, far) = Rig::with_pipe(&config, 0);
    let mut most = [0; 2];
    rig.driver.registers.read_config(8, &mut most);
    assert_eq!(u16::from_le_bytes(most), 3);
    assert_eq!(rig.driver.queues.len(), 7);
    assert_eq!(far.pairs.load(Ordering::SeqCst), 1);

    let given = rig.give(4, 4, 1600);
    far.send(2, &frame(1, 60));
    rig.send(5, &frame(2, 60));
    assert_eq!(far.receive(2), None, "sent from a pair that is not used");

    let refused = [1];
    for bad in [
        &[4, 0, 0, 0][..],
        &[4, 0, 4, 0],
        &[4, 0, 0, 0x80],
        &[4, 0, 2],
        &[4, 1, 2, 0],
        &[0, 0, 1],
        &[],
    ] {
        assert_eq!(command(&mut rig, 6, bad), refused, "{bad:?}");
    }
    assert_eq!(command(&mut rig, 6, &[4, 0, 3, 0]), [0]);
    assert_eq!(far.pairs.load(Ordering::SeqCst), 3);
    assert_eq!(rig.take(4, &given)[12..], frame(1, 60));
    rig.send(5, &frame(3, 60));
    assert_eq!(far.wait(2), frame(3, 60));

    // A new driver begins with one.
    rig.driver.start(u64::MAX, 256);
    assert_eq!(far.pairs.load(Ordering::SeqCst), 1);
}

#[test]
fn a_driver_without_multiqueue_has_its_control_queue_behind_the_first_pair() {
    let mut config = interface("eth0");
    config.queues = 2;
    let (mut rig, _far) = Rig::with_pipe(&config, 1 << MQ);
    assert_eq!(command(&mut rig, 2, &[0, 0, 1]), [1]);
}

#[test]
fn what_was_saved_goes_on_with_as_many_pairs() {
    let mut config = interface("eth0");
    config.queues = 3;
    let make = || Net::with_backend(&config, Box::new(pipe(3).0)).unwrap();
    let mut before = make();
    before.pairs = 2;
    before.plugged = false;
    let mut after = make();
    after.load(before.save()).unwrap();
    assert!(!after.is_up());
    after.start(1 << MQ | 1 << CTRL_VQ, Vec::new()).unwrap();
    assert_eq!(after.pairs, 2);
    assert!(make().load(serde_json::json!({"pairs": "x"})).is_err());
}

#[test]
fn limits_hold_packets_up_and_lose_none() {
    let bucket = |size| {
        Some(TokenBucket {
            size,
            one_time_burst: None,
            refill_time: 20,
        })
    };
    let limits = Limits {
        bandwidth: bucket(5000),
        ops: bucket(3),
    };
    let mut config = interface("eth0");
    config.rx_rate_limiter = Some(limits);
    config.tx_rate_limiter = Some(limits);
    let (mut rig, far) = Rig::with_pipe(&config, 0);
    let given = rig.give(0, 100, 1600);
    let start = Instant::now();
    for seed in 0..12 {
        far.send(0, &frame(seed, 1000));
    }
    for seed in 0..12 {
        assert_eq!(rig.take(0, &given)[12..], frame(seed, 1000));
    }
    // Three at once, then three every 20 ms. A busy machine makes it longer, never shorter.
    assert!(start.elapsed().as_millis() >= 55, "{:?}", start.elapsed());

    let start = Instant::now();
    for seed in 0..12 {
        rig.send(1, &frame(seed, 1000));
        assert_eq!(far.wait(0), frame(seed, 1000));
    }
    assert!(start.elapsed().as_millis() >= 55, "{:?}", start.elapsed());
}

#[test]
fn limits_may_change_while_packets_wait() {
    let hour = |size| {
        let bucket = TokenBucket {
            size,
            one_time_burst: None,
            refill_time: 3_600_000,
        };
        Limits {
            bandwidth: None,
            ops: Some(bucket),
        }
    };
    let mut config = interface("eth0");
    config.rx_rate_limiter = Some(hour(1));
    config.tx_rate_limiter = Some(hour(1));
    let (mut rig, far) = Rig::with_pipe(&config, 0);
    let given = rig.give(0, 10, 1600);
    let chain = rig.driver.chain(&[&[0; 12], &frame(7, 60)], &[]);
    for seed in 0..3 {
        far.send(0, &frame(seed, 60));
        rig.driver.queues[1].add(&chain, Layout::Direct, 0);
    }
    rig.driver.registers.notify(1);
    assert_eq!(rig.take(0, &given)[12..], frame(0, 60));
    far.wait(0);
    std::thread::sleep(Duration::from_millis(5));
    assert!(rig.driver.queues[0].take_used().is_none());
    assert_eq!(far.receive(0), None);
    let update = DeviceUpdate::Network {
        rx_rate_limiter: Some(hour(0)),
        tx_rate_limiter: Some(hour(0)),
        link_up: None,
    };
    rig.update(update).unwrap();
    for seed in 1..3 {
        assert_eq!(rig.take(0, &given)[12..], frame(seed, 60));
        assert_eq!(far.wait(0), frame(7, 60));
    }
}

#[test]
fn a_queue_that_is_reset_alone_comes_back_elsewhere() {
    let (mut rig, far) = Rig::with_pipe(&interface("eth0"), 0);
    assert_ne!(rig.driver.features & F_RING_RESET, 0);
    rig.give(0, 8, 1600);
    for index in 0..2 {
        rig.driver.registers.reset_queue(index);
        let queue = rig.driver.new_queue(index, 64);
        rig.driver.registers.enable_queue(index, &queue.state);
        rig.driver.queues[usize::from(index)] = queue;
    }
    far.send(0, &frame(1, 3000));
    let given = rig.give(0, 8, 1600);
    assert_eq!(rig.take(0, &given)[12..], frame(1, 3000));
    rig.send(1, &frame(2, 60));
    assert_eq!(far.wait(0), frame(2, 60));
}

#[test]
fn packets_come_in_order_and_none_is_lost() {
    let (mut rig, far) = Rig::with_pipe(&interface("eth0"), 0);
    std::thread::scope(|scope| {
        let far = &far;
        scope.spawn(move || {
            for at in 0..2000 {
                far.send(0, &frame(at as u8, 60 + at % 1400));
            }
        });
        let mut next = 0;
        for _ in 0..20 {
            // Buffers come and go, so that the device runs out of them now and then.
            let given = rig.give(0, 100, 2048);
            for _ in 0..100 {
                let wanted = frame(next as u8, 60 + next % 1400);
                assert!(rig.take(0, &given)[12..] == wanted, "packet {next}");
                next += 1;
            }
        }
    });
}

#[test]
fn the_configuration_tells_address_and_mtu() {
    let mut config = interface("eth0");
    config.guest_mac = Some("52:54:00:12:34:56".into());
    config.mtu = Some(9000);
    let (rig, _far) = Rig::with_pipe(&config, 0);
    let mut space = [0; 12];
    rig.driver.registers.read_config(0, &mut space);
    assert_eq!(
        space,
        [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0, 1, 0, 0x28, 0x23]
    );
    assert_ne!(rig.driver.features & (1 << MTU), 0);
}
