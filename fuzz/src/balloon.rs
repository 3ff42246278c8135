//! The memory balloon.

use crate::bytes::{Few, Number};
use crate::guest::{Chain, Guest, Subject};
use arbitrary::Arbitrary;
use husk_config::DeviceUpdate;
use husk_virtio::VirtioDevice;
use husk_virtio::testing::Driver;

/// The device under test.
pub struct Balloon;

/// What a driver says.
#[derive(Debug, Arbitrary)]
pub enum Request {
    /// Inflate or deflate: page numbers from one on, and steps to the next.
    Pages {
        /// Deflate.
        deflate: bool,
        /// The first.
        first: u32,
        /// What is added for each next.
        steps: Few<i8, 64>,
    },
    /// Statistics: tag and value.
    Statistics(Few<(u16, u64), 16>),
    /// A hinting command or none, and buffers that are not used.
    Hint {
        /// The command's number.
        command: Option<u32>,
        /// Their lengths.
        unused: Few<Number, 8>,
    },
    /// Buffers that are not used.
    Report(Few<Number, 8>),
}

/// What the host does.
#[derive(Debug, Arbitrary)]
pub enum Host {
    /// Asks for memory.
    Amount(u32),
    /// Asks for statistics at this interval.
    Interval(u16),
    /// The timer has fired.
    Tick,
    /// The device goes on from this hinting command.
    Load(u32),
}

impl Subject for Balloon {
    type Request = Request;
    type Host = Host;

    fn new(variant: u8) -> (Self, Box<dyn VirtioDevice>) {
        let config = husk_config::Balloon {
            amount_mib: variant.into(),
            deflate_on_oom: variant & 1 != 0,
            stats_polling_interval_s: u16::from(variant >> 1 & 1),
            free_page_hinting: variant & 4 == 0,
            free_page_reporting: variant & 8 == 0,
        };
        let device = husk_devices::balloon::Balloon::new(&config).expect("a timer");
        (Self, Box::new(device))
    }

    fn chain(&self, request: Request) -> Chain {
        let lengths = |few: Few<Number, 8>| few.0.iter().map(|number| number.get()).collect();
        match request {
            Request::Pages {
                deflate,
                first,
                steps,
            } => {
                let mut page = first;
                let mut data = page.to_le_bytes().to_vec();
                for step in steps.0 {
                    page = page.wrapping_add_signed(step.into());
                    data.extend(page.to_le_bytes());
                }
                Chain {
                    queue: deflate.into(),
                    readable: vec![data],
                    ..Chain::default()
                }
            }
            Request::Statistics(all) => {
                let entry = |(tag, value): (u16, u64)| {
                    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
                };
                Chain {
                    queue: 2,
                    readable: vec![all.0.into_iter().flat_map(entry).collect()],
                    ..Chain::default()
                }
            }
            Request::Hint { command, unused } => Chain {
                queue: 3,
                readable: command
                    .map(|command| command.to_le_bytes().to_vec())
                    .into_iter()
                    .collect(),
                writable: lengths(unused),
            },
            Request::Report(unused) => Chain {
                queue: 4,
                writable: lengths(unused),
                ..Chain::default()
            },
        }
    }

    fn host(&mut self, action: Host, guest: &mut Guest) {
        let update = |amount_mib, stats_polling_interval_s| DeviceUpdate::Balloon {
            amount_mib,
            stats_polling_interval_s,
            hinting: None,
        };
        match action {
            Host::Amount(mib) => guest.update(update(Some(mib), None)),
            Host::Interval(seconds) => guest.update(update(None, Some(seconds))),
            Host::Tick => guest.with_device(|device| drop(device.source_ready(0))),
            Host::Load(command) => guest.pause(move |device| drop(device.load(command.into()))),
        }
    }

    fn check(&mut self, driver: &mut Driver) {
        let page = 0x200_u32;
        driver.request(0, &[&page.to_le_bytes()], &[]);
        driver.request(1, &[&page.to_le_bytes()], &[]);
    }
}
