//! Devices whose saved state somebody has changed: they are refused, or come up as whatever that is.

use crate::bytes::{Few, Rare};
use crate::guest::{Action, Guest, Program, Subject, make};
use crate::json::{Change, change};
use arbitrary::Arbitrary;

/// What is done before the device is saved, what becomes of its state, and what its guest does then.
#[derive(Debug, Arbitrary)]
pub struct Saved<R, H> {
    changes: Few<Change, 8>,
    /// The device that takes its place is of another one.
    variant: Rare<u8>,
    after: Few<Action<R, H>, 32>,
    before: Program<R, H>,
}

/// Any device.
#[derive(Debug, Arbitrary)]
pub enum Input {
    /// The balloon.
    Balloon(Saved<crate::balloon::Request, crate::balloon::Host>),
    /// A disk.
    Sync(Saved<crate::block::Request, crate::block::Host>),
    /// The other engine.
    Uring(Saved<crate::block::Request, crate::block::Host>),
    /// The entropy device.
    Entropy(Saved<crate::entropy::Request, crate::entropy::Host>),
    /// A network interface.
    Net(Saved<crate::net::Request, crate::net::Host>),
    /// The vsock device.
    Vsock(Saved<crate::vsock::Request, crate::vsock::Host>),
}

/// Run an input.
pub fn run(input: Input) {
    match input {
        Input::Balloon(saved) => replace::<crate::balloon::Balloon>(saved),
        Input::Sync(saved) => replace::<crate::block::Sync>(saved),
        Input::Uring(saved) => replace::<crate::block::Uring>(saved),
        Input::Entropy(saved) => replace::<crate::entropy::Entropy>(saved),
        Input::Net(saved) => replace::<crate::net::Net>(saved),
        Input::Vsock(saved) => replace::<crate::vsock::Vsock>(saved),
    }
}

/// Save one device, and load another in its place.
fn replace<S: Subject>(saved: Saved<S::Request, S::Host>) {
    let pci = saved.before.pci;
    let variant = saved.variant.0.unwrap_or(saved.before.variant);
    let (mut subject, mut guest) = Guest::of::<S>(&saved.before);
    guest.run(&mut subject, saved.before.actions.0);
    guest.wait();
    guest.driver.registers.suspend();
    let mut state = guest.driver.registers.save();
    change(&mut state, &saved.changes.0);
    // Its sockets are the other one's.
    let mem = guest.driver.mem.clone();
    guest.driver.registers = make(pci, crate::echo::Echo::boxed(), &mem);
    drop(subject);
    let (mut subject, device) = S::new(variant);
    guest.driver.registers = make(pci, device, &mem);
    if guest.driver.registers.load(state).is_ok() {
        // As for a snapshot before the guest goes on.
        guest.driver.registers.save();
        guest.driver.registers.resume();
        // One that was refused may have other queues than its driver knows.
        guest.run(&mut subject, saved.after.0);
        guest.wait();
    }
    guest.driver.start(u64::MAX, 16);
    subject.check(&mut guest.driver);
}
