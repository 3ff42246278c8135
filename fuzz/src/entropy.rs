//! The entropy device.

use crate::bytes::{Few, Number};
use crate::guest::{Chain, Guest, Subject};
use arbitrary::Arbitrary;
use husk_config::{DeviceUpdate, RateLimiter, TokenBucket};
use husk_virtio::VirtioDevice;
use husk_virtio::testing::Driver;

/// The device under test.
pub struct Entropy;

/// Buffers to fill.
#[derive(Debug, Arbitrary)]
pub struct Request {
    lengths: Few<Number, 8>,
}

/// What the host does.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Host {
    /// Limits come and go.
    Limit(bool),
}

/// Limits that an input runs into and does not wait for: `bytes` and 8 operations each millisecond. None are lifted.
pub fn limits(bytes: Option<u64>) -> RateLimiter {
    let bucket = |size| TokenBucket {
        size,
        one_time_burst: None,
        refill_time: 1,
    };
    RateLimiter {
        bandwidth: Some(bucket(bytes.unwrap_or(0))),
        ops: Some(bucket(bytes.map_or(0, |_| 8))),
    }
}

impl Subject for Entropy {
    type Request = Request;
    type Host = Host;

    fn new(variant: u8) -> (Self, Box<dyn VirtioDevice>) {
        let config = husk_config::Entropy {
            rate_limiter: (variant & 1 != 0).then(|| limits(Some(64 << 10))),
        };
        let device = husk_devices::entropy::Entropy::new(&config).expect("a timer");
        (Self, Box::new(device))
    }

    fn chain(&self, request: Request) -> Chain {
        Chain {
            writable: request
                .lengths
                .0
                .iter()
                .map(|number| number.get())
                .collect(),
            ..Chain::default()
        }
    }

    fn host(&mut self, action: Host, guest: &mut Guest) {
        let Host::Limit(on) = action;
        guest.update(DeviceUpdate::Entropy {
            rate_limiter: limits(on.then_some(64 << 10)),
        });
    }

    fn check(&mut self, driver: &mut Driver) {
        assert_eq!(driver.request(0, &[], &[100, 1, 50]).len(), 151);
    }
}
